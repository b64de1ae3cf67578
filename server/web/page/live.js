// The part that shows the batcher at work, from the stream of its events.

import { byId, count, note, soon, seconds, table } from "./dom.js";
import { Chart } from "./chart.js";
import { here, listen, toHere } from "./feed.js";

const KEPT = 600; // ticks, as on the server
const ROWS = 12;

const whole = (value) => count(Math.round(value));
const share = (part, all) => (all ? part / all : null);

const area = (name, value) => ({ name, value, shape: "area" });
const line = (name, value) => ({ name, value, shape: "line" });
const bars = (value) => ({ name: "", value, shape: "bars" });
const gib = ({ memory }) => (memory === null ? null : memory / 2 ** 30);

// Title, unit, the least that the highest place of the scale stands for, how numbers are written, series.
const CHARTS = [
	["Requests", "rows", 4, whole, area("running", (tick) => tick.running), line("waiting", (tick) => tick.queued)],
	["Tokens generated", "tokens/s", 10, whole, area("", (tick) => tick.speed)],
	["Size of batches at their start", "rows", 4, count, bars((tick) => share(tick.batch_rows, tick.batches))],
	["Padding in prompts", "% of positions", 10, whole, bars(padding)],
	["Time to first token, last 30 s of answers", "", 0.1, seconds, area("p95", (tick) => tick.ttft_p95), line("p50", (tick) => tick.ttft_p50)],
	["Memory of the device", "GiB", 0.5, (value) => value.toFixed(value < 10 ? 2 : 1), area("", gib)],
];

function padding({ prompt_tokens: prompt, padded_tokens: padded }) {
	return padded ? 100 * (1 - prompt / padded) : null;
}

let charts = [];
let ticks = [];
let ended = [];
let period = 0.5;
let leave = null;
const draw = soon(drawn);

export function start() {
	charts = CHARTS.map((each) => new Chart(...each));
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
	if (message.lost) return note("live-note", "The stream of events broke off and is opened again.");
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

// The speed is that of two seconds: where steps are slow, ticks without any lie between others.
function add(tick) {
	ticks.push(tick);
	if (ticks.length > KEPT) ticks.shift();
	const last = ticks.slice(-4);
	tick.speed = last.reduce((sum, each) => sum + each.tokens, 0) / last.length / period;
}

function drawn() {
	const span = Number(byId("span").value);
	const now = ticks.at(-1)?.at ?? 0;
	for (const chart of charts) chart.draw(ticks, now, span);
	table(
		byId("latest"),
		"Latest requests",
		["Ended", "Request", "Outcome", "Waited", "First token", "Whole", "Prompt", "Answer", "Batch"],
		ended.map(cells),
	);
}

function cells({ ended: row, at }) {
	const ago = Math.max(0, Math.round(here() - toHere(at)));
	return [
		`${ago} s ago`,
		row.id,
		row.outcome,
		seconds(row.queue_wait),
		seconds(row.ttft),
		seconds(row.duration),
		count(row.prompt_tokens),
		count(row.output_tokens),
		row.batch_size ? count(row.batch_size) : "–",
	];
}
