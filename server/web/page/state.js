// The part that says what runs and within which limits.

import { askKey, hasKey } from "./api.js";
import { byId, count, element, plural } from "./dom.js";
import { onStatus, WORDS } from "./status.js";

export function start() {
	byId("change-key").addEventListener("click", () => askKey(hasKey() ? "Another key, or none to forget this one." : undefined));
	onStatus(draw);
}

function draw({ state, info }) {
	if (byId("words").textContent !== WORDS[state]) byId("words").textContent = WORDS[state]; // which is read out
	loading(state === "starting" ? info.loading : null);
	if (!info) return;
	list("runs", runs(info));
	list("sampling", info.sampling ? sampling(info.sampling) : []);
	list("limits", limits(info));
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

const ENGINES = {
	packed: "packed: rows without padding, which join a running batch",
	generate: "generate: padded batches, one after the other",
};
const REUSE = { all: "between all requests", key: "between requests of one API key", off: "off" };

const SPECULATION = { auto: "where it saves time", off: "off" };

// Not with this engine, or not with batch invariance.
function speculation({ speculation, batch_invariant: invariant }, engine) {
	if (engine !== "packed") return "not with this engine";
	if (invariant) return "off with batch invariance";
	return SPECULATION[speculation] ?? `where it saves time, up to ${plural(speculation, "token")} a step`;
}

function runs({ names, engine, versions, uptime, model, limits }) {
	const loaded = model
		? [
				["Engine", ENGINES[engine]],
				["Parameters", `${(model.parameters / 1e9).toFixed(2)} billion`],
				["Device", model.device],
				["Precision", model.dtype],
				["Speculation", speculation(limits, engine)],
				["Prefix reuse", engine === "packed" ? REUSE[limits.prefix_sharing] : "not with this engine"],
			]
		: [];
	const installed = Object.entries(versions).map(([name, version]) => `${name} ${version}`);
	return [["Model", names.join(", ")], ...loaded, ["Versions", installed.join(", ")], ["Uptime", long(uptime)]];
}

function limits({ limits, model, engine }) {
	const tokens = (number) => plural(number, "token");
	return [
		...(model ? [["Context window", `${tokens(model.context_window)} for prompt and answer`]] : []),
		["Answer", `at most ${tokens(limits.max_output_tokens)}; ${limits.default_max_tokens ? tokens(limits.default_max_tokens) : "what fits"} if a request does not say`],
		...(limits.max_batch_size ? [["Batch", `at most ${plural(limits.max_batch_size, "row")}${model ? ` and ${tokens(model.token_budget)}` : ""}`]] : []),
		...(engine === "generate" ? [["Batch window", `an idle device waits ${limits.batch_window_ms} ms for more requests`]] : []),
		["Queue", `at most ${plural(limits.queue_size, "request")}; then requests get status 429`],
		...(limits.key_queue_size ? [["Queue of one key", `at most ${plural(limits.key_queue_size, "request")}`]] : []),
		...(limits.key_queue_tokens ? [["Tokens of one key", `at most ${tokens(limits.key_queue_tokens)} waiting`]] : []),
		["Time limit", `${exactly(limits.request_timeout_s)} from when a request is queued to its last token`],
		["Shutdown", `accepted requests may take ${exactly(limits.drain_timeout_s)} more`],
		["Request body", `at most ${limits.max_body_mib} MiB`],
		["Thinking", limits.thinking ? "on unless a request turns it off" : "off unless a request turns it on"],
	];
}

const SAMPLING = { temperature: "Temperature", top_p: "Top-p", top_k: "Top-k", min_p: "Min-p", repetition_penalty: "Repetition penalty" };
const WITHOUT = { top_k: 0, min_p: 0, repetition_penalty: 1 };

// Temperature and top-p, and whatever else has an effect.
function sampling(defaults) {
	const found = Object.entries(SAMPLING).filter(([name]) => defaults[name] !== WITHOUT[name]);
	return found.map(([name, label]) => [label, String(defaults[name])]);
}

function long(value) {
	if (value < 120) return plural(value, "second");
	const minutes = Math.floor(value / 60);
	return minutes < 120 ? plural(minutes, "minute") : plural(Math.floor(minutes / 60), "hour");
}

// In the largest unit that it is a whole number of.
function exactly(value) {
	if (value < 120 || value % 60) return plural(value, "second");
	const minutes = value / 60;
	return minutes < 120 || minutes % 60 ? plural(minutes, "minute") : plural(minutes / 60, "hour");
}
