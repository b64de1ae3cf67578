// What the service says of itself, asked again and again: often while it is not ready, seldom while it is.

import { ask, Refused } from "./api.js";
import { note } from "./dom.js";

export const WORDS = {
	connecting: "Connecting.",
	starting: "Starting. The model is loading; it takes requests when that is done.",
	ready: "Ready.",
	draining: "Stopping. Accepted requests are finished, new ones are refused.",
	stopped: "Stopped.",
	failed: "Failed. The model is down and the service needs a restart; see its log.",
	unreachable: "Server unreachable, retrying.",
	locked: "This service needs an API key to tell more.",
};

export const status = { state: "connecting", info: null };
const listeners = [];
let timer;
let asked = 0;

export function onStatus(listener) {
	listeners.push(listener);
	listener(status);
}

// Says in the note `id` why questions are not taken. What it says otherwise stays until that changes.
export function explainIn(id) {
	let told;
	onStatus(({ state }) => {
		if (state !== told) note(id, ["ready", "connecting"].includes(state) ? "" : WORDS[state]);
		told = state;
	});
}

export const takes = () => ["ready", "locked"].includes(status.state);

export async function refresh() {
	clearTimeout(timer);
	const turn = ++asked;
	const found = await look();
	if (turn !== asked) return; // a later question is on its way
	Object.assign(status, found);
	for (const listener of listeners) listener(status);
	if (status.state !== "locked") timer = setTimeout(refresh, pause());
}

async function look() {
	try {
		const info = await (await ask("internal/state", { quiet: true, signal: AbortSignal.timeout(10000) })).json();
		return { state: info.state, info };
	} catch (error) {
		return { state: error instanceof Refused && error.status === 401 ? "locked" : "unreachable" };
	}
}

function pause() {
	if (status.state === "ready") return 10000;
	return status.state === "starting" ? 1000 : 2000;
}

document.addEventListener("key", refresh);
document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : refresh()));
