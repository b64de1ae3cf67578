// The part that shows the batcher at work, from the stream of its events.

import { byId, count, element, note, soon, seconds, table } from "./dom.js";
import { Chart } from "./chart.js";
import { here, listen, toHere } from "./feed.js";

const KEPT = 600; // ticks, as on the server
const ROWS = 12;

const whole = (value) => count(Math.round(value));
const most = (values) => Math.max(...values);
const mean = (values) => values.reduce((sum, each) => sum + each, 0) / values.length;
const last = (values) => values.at(-1);

const CHARTS = [
	{
		title: "Requests",
		unit: "",
		least: 4,
		format: whole,
		series: [
			{ name: "running", value: (tick) => tick.running, of: most, fill: true },
			{ name: "queued", value: (tick) => tick.queued, of: most },
		],
	},
	{
		title: "Output",
		unit: "tokens/s",
		least: 10,
		format: whole,
		series: [{ name: "", value: (tick) => tick.output, of: mean, fill: true }],
	},
	{
		title: "Prefill",
		unit: "tokens/s",
		least: 10,
		format: whole,
		series: [{ name: "", value: (tick) => tick.prefill, of: mean, fill: true }],
	},
	{
		title: "Time to first token, last 30 s",
		unit: "",
		least: 0.1,
		format: seconds,
		empty: "No answers in this time.",
		series: [
			{ name: "p50", value: (tick) => tick.ttft_p50, of: last },
			{ name: "p95", value: (tick) => tick.ttft_p95, of: last },
		],
	},
	{
		title: "Tokens per step, last 30 s",
		unit: "",
		least: 2,
		format: (value) => value.toFixed(2),
		optional: true,
		empty: "Nothing was drafted in this time.",
		series: [{ name: "", value: (tick) => tick.tokens_per_step, of: last, fill: true }],
	},
	{
		title: "Prompt padding, latest batch",
		unit: "% of positions",
		least: 10,
		format: whole,
		optional: true,
		empty: "No padding in this time.",
		series: [{ name: "", value: (tick) => tick.padding, of: last, fill: true }],
	},
	{
		title: "Device memory",
		unit: "GiB",
		least: 0.5,
		format: (value) => value.toFixed(value < 10 ? 2 : 1),
		optional: true,
		empty: "Not measured in this time.",
		series: [{ name: "", value: ({ memory }) => (memory ? memory / 2 ** 30 : null), of: last, fill: true }],
	},
];

// Nothing before the first batch that has some: an engine without it need not tell of it.
function padding({ prompt_tokens: prompt, padded_tokens: padded }, before) {
	return padded && (before || padded > prompt) ? 100 * (1 - prompt / padded) : before;
}

let charts = [];
let ticks = [];
let ended = [];
let period = 0.5;
let leave = null;
const draw = soon(drawn);

export function start() {
	charts = CHARTS.map((each) => new Chart(each));
	byId("charts").append(...charts.map((chart) => chart.card));
	byId("span").addEventListener("change", draw);
	draw();
}

// Listens only while this part is seen.
export function look(seen) {
	if (seen && !leave) leave = listen(hear);
	if (!seen && leave) leave = void leave();
}

function hear(message) {
	if (message.lost) return note("live-note", message.lost);
	if (message.ticks) begin(message);
	if (message.tick) add(message.tick);
	if (message.ended) ended = [message, ...ended].slice(0, ROWS);
	draw();
}

function begin({ period: length, ticks: columns, rows }) {
	note("live-note", "");
	period = length;
	ticks = [];
	const columnsOf = Object.entries(columns);
	columns.at.forEach((_, place) => add(Object.fromEntries(columnsOf.map(([name, all]) => [name, all[place]]))));
	ended = rows.filter((each) => each.ended).reverse().slice(0, ROWS);
}

// Speeds are those of two seconds: where steps are slow, ticks without any lie between others.
function add(tick) {
	tick.padding = padding(tick, ticks.at(-1)?.padding ?? null);
	ticks.push(tick);
	if (ticks.length > KEPT) ticks.shift();
	const recent = ticks.slice(-4);
	tick.output = mean(recent.map((each) => each.tokens)) / period;
	tick.prefill = mean(recent.map((each) => each.prompt_tokens)) / period;
}

function drawn() {
	const span = Number(byId("span").value);
	const now = ticks.at(-1)?.at ?? 0;
	for (const chart of charts) chart.draw(ticks, now, span);
	table(
		byId("latest"),
		"Latest requests",
		["Ended", "Outcome", "Queued", "First token", "Total", "Prompt", "Cached", "Output", "Batch", "Request"],
		ended.map(cells),
	);
}

function cells({ ended: row, at }) {
	const ago = Math.max(0, Math.round(here() - toHere(at)));
	return [
		`${ago} s ago`,
		row.outcome,
		seconds(row.queue_wait),
		seconds(row.ttft),
		seconds(row.duration),
		count(row.prompt_tokens),
		count(row.num_cached_tokens),
		count(row.output_tokens),
		row.batch_size ? count(row.batch_size) : "–",
		element("span.id", { title: row.id }, row.id),
	];
}
