// The part that says what runs and within which limits.

import { askKey, hasKey } from "./api.js";
import { byId, count, element, plural } from "./dom.js";
import { onStatus, WORDS } from "./status.js";

export function start() {
	byId("change-key").addEventListener("click", () => askKey(hasKey() ? "Another key, or none to forget this one." : undefined));
	onStatus(draw);
}

function draw({ state, info }) {
	byId("words").textContent = WORDS[state];
	loading(state === "starting" ? info.loading : null);
	if (info) list("runs", runs(info));
	if (info) list("limits", limits(info));
}

function loading(progress) {
	byId("loading").hidden = !progress;
	if (!progress) return;
	const { step, done, total } = progress;
	byId("loading-step").textContent = total ? `${step}: ${count(done)} of ${count(total)}` : step;
	if (total) byId("progress").value = done / total;
	else byId("progress").removeAttribute("value");
}

function list(id, pairs) {
	const entries = pairs.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
	byId(id).replaceChildren(...entries);
}

function runs({ names, version, uptime, model }) {
	const loaded = model
		? [
				["Size", `${(model.parameters / 1e9).toFixed(2)} billion parameters`],
				["Device", model.device],
				["Number format", model.dtype],
			]
		: [];
	return [["Model", names.join(", ")], ...loaded, ["Version", version], ["Up for", long(uptime)]];
}

function limits({ limits, model, sampling }) {
	const tokens = (number) => plural(number, "token");
	return [
		...(model ? [["Window", `${tokens(model.context_window)} of prompt and answer`]] : []),
		["Answers", `${limits.default_max_tokens ? tokens(limits.default_max_tokens) : "what fits the window"} by default, ${count(limits.max_output_tokens)} at most`],
		...(sampling ? [["Sampling", `${chosen(sampling)} by default`]] : []),
		...(limits.max_batch_size ? [["Batches", `up to ${plural(limits.max_batch_size, "row")}${model ? ` or ${count(model.token_budget)} padded tokens` : ""}`]] : []),
		["Batch window", `${limits.batch_window_ms} ms`],
		["Queue", plural(limits.queue_size, "row")],
		...(limits.key_queue_size ? [["Queue of one key", plural(limits.key_queue_size, "row")]] : []),
		...(limits.key_queue_tokens ? [["Tokens of one key", count(limits.key_queue_tokens)]] : []),
		["Time limit", long(limits.request_timeout_s)],
		["Time to stop", long(limits.drain_timeout_s)],
		["Largest body", `${limits.max_body_mib} MiB`],
		["Thinking", limits.thinking ? "on unless a request says no" : "off unless a request asks for it"],
	];
}

// Temperature and top_p, and whatever else has an effect.
function chosen({ temperature, top_p, top_k, min_p, repetition_penalty }) {
	return [
		`temperature ${temperature}`,
		`top_p ${top_p}`,
		...(top_k ? [`top_k ${top_k}`] : []),
		...(min_p ? [`min_p ${min_p}`] : []),
		...(repetition_penalty !== 1 ? [`repetition_penalty ${repetition_penalty}`] : []),
	].join(", ");
}

function long(value) {
	if (value < 120) return `${value} s`;
	const minutes = Math.floor(value / 60);
	return minutes < 120 ? `${minutes} minutes` : `${Math.floor(minutes / 60)} hours`;
}
