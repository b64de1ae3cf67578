// One connection to /internal/live, open while somebody here listens and opened again when it breaks.

import { ask, events, Refused } from "./api.js";
import { refresh } from "./status.js";

const listeners = new Set();
let connection = null;
let offset = Infinity; // from the server's clock to this page's, in seconds

export const here = () => performance.now() / 1000;
export const toHere = (at) => at + offset;

// `listener` gets every message, the history first, and says in words why there are none for a while (`lost`). Returns what ends it.
export function listen(listener) {
	listeners.add(listener);
	if (connection) connection.abort(); // so that this one gets the history too
	connect();
	return () => {
		listeners.delete(listener);
		if (!listeners.size) connection?.abort();
	};
}

async function connect() {
	const mine = (connection = new AbortController());
	let locked = false;
	let lost = "Server unreachable, retrying.";
	try {
		const response = await ask("internal/live", { signal: mine.signal, quiet: true });
		for await (const message of events(response)) tell(message);
	} catch (error) {
		locked = error instanceof Refused && error.status === 401;
		if (error instanceof Refused) lost = error.message;
	}
	if (mine.signal.aborted) return;
	for (const listener of listeners) listener({ lost });
	refresh();
	if (!locked) setTimeout(() => mine === connection && listeners.size && connect(), 2000);
}

document.addEventListener("key", () => listeners.size && connect());

function tell(message) {
	if (message.now !== undefined) offset = here() - message.now;
	const at = message.tick?.at ?? message.started?.at ?? (message.ended && message.at);
	if (at) offset = Math.min(offset, here() - at); // the message that travelled fastest
	if (message.state && message.now === undefined) refresh();
	for (const listener of listeners) listener(message);
}
