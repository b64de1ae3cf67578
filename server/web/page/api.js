// Requests to the service: the API key, errors in words, streams of server-sent events.

import { byId } from "./dom.js";
import { tabStorage } from "./storage.js";

const KEPT = "microbatch-key"; // in storage that belongs to this tab and ends with it

export class Refused extends Error {
	constructor(status, message) {
		super(message);
		this.status = status;
	}
}

export const hasKey = () => Boolean(tabStorage.getItem(KEPT));

function headers(more) {
	const key = tabStorage.getItem(KEPT);
	return { ...(key ? { authorization: `Bearer ${asBytes(key)}` } : {}), ...more };
}

// A header's characters are bytes, and fetch raises an error on any others. The service reads them as UTF-8.
const asBytes = (text) => String.fromCharCode(...new TextEncoder().encode(text));

// Short, so that a person finds it again among the latest requests and in the log.
export const requestId = () => `page-${crypto.getRandomValues(new Uint32Array(1))[0].toString(36).padStart(7, "0")}`;

let asking = null;
let declined = false; // then only what a person does asks again

// Resolves to whether a key was given. All who wait share the dialog.
export function askKey(why = "This service needs an API key.") {
	asking ??= new Promise((resolve) => {
		const dialog = byId("asks-key");
		byId("key-why").textContent = why;
		byId("key").value = "";
		const end = (given) => {
			asking = null;
			dialog.onclose = null;
			dialog.close();
			refocus();
			resolve(given);
		};
		byId("key-form").onsubmit = (event) => {
			event.preventDefault();
			const key = byId("key").value.trim();
			key ? tabStorage.setItem(KEPT, key) : tabStorage.removeItem(KEPT);
			declined = false;
			end(true);
			document.dispatchEvent(new Event("key"));
		};
		byId("key-later").onclick = dialog.onclose = () => end(false);
		dialog.showModal();
	});
	return asking;
}

// Chromium gives the focus back while the page behind the dialog is still inert: keys that are typed there are lost.
function refocus() {
	const field = document.activeElement;
	field.blur();
	field.focus({ preventScroll: true });
}

// A response with a 2xx status. Raises `Refused`, or what fetch raises where nobody answers.
export async function ask(path, { body, id, signal, quiet = false } = {}) {
	const options = { signal, headers: headers(id ? { "x-request-id": id } : {}) };
	if (body) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
	if (body) options.headers["content-type"] = "application/json";
	const response = await fetch(path, options);
	if (response.ok) return response;
	if (response.status === 401 && !(quiet && declined)) {
		const why = hasKey() ? "Invalid API key." : undefined;
		if (await askKey(why)) return ask(path, { body, id, signal, quiet });
		declined = true;
	}
	const error = await response.json().catch(() => ({}));
	throw new Refused(response.status, error.error?.message ?? `The service answered ${response.status}.`);
}

// The JSON of each event of a stream. Raises `Refused` on an event that is an error.
export async function* events(response) {
	const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
	let rest = "";
	try {
		for (;;) {
			const { value, done } = await reader.read();
			if (done) return;
			const frames = (rest + value).split("\n\n");
			rest = frames.pop();
			for (const frame of frames) {
				if (!frame.startsWith("data: ")) continue; // a comment, which keeps the connection open
				const data = frame.slice("data: ".length);
				if (data === "[DONE]") return;
				const event = JSON.parse(data);
				if (event.error) throw new Refused(response.status, event.error.message);
				yield event;
			}
		}
	} finally {
		reader.cancel().catch(() => {});
	}
}

// What to tell a person of any failure.
export function inWords(error) {
	if (error instanceof Refused) return error.message;
	return "Server unreachable. It may be restarting; try again in a moment.";
}
