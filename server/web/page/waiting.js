// What a request is doing before its first token, from the stream of events.

import { plural } from "./dom.js";
import { listen } from "./feed.js";

const PATIENCE = 500; // milliseconds without a token, after which somebody wants to know

// Calls `tell` with words about the request `id`. Returns what ends it.
export function follow(id, tell) {
	let leave = null;
	let started = false;
	const hear = (message) => {
		for (const row of message.rows ?? []) hear(row);
		const queued = message.tick?.queued ?? message.ticks?.queued.at(-1);
		if (message.started?.id === id) started = true;
		if (started) tell("Prefill");
		else if (queued) tell(`Queued, ${plural(queued, "request")} waiting`);
	};
	const timer = setTimeout(() => (leave = listen(hear)), PATIENCE);
	return () => {
		clearTimeout(timer);
		leave?.();
	};
}
