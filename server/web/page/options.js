// What is set beside the chat: fields that are left empty are left to the server.

import { byId } from "./dom.js";
import { onStatus, status } from "./status.js";

const all = () => [...byId("options").querySelectorAll("input")];

export function start() {
	onStatus(({ info }) => {
		if (!info?.sampling) return;
		byId("temperature").placeholder = info.sampling.temperature;
		byId("top-p").placeholder = info.sampling.top_p;
	});
}

// Shows the first field whose value is out of its range, and returns whether there is one.
export function wrong() {
	const field = all().find(({ validity }) => !validity.valid);
	if (!field) return false;
	byId("options").open = true;
	return !field.reportValidity();
}

function number(id) {
	const field = byId(id);
	return field.value === "" || !field.validity.valid ? undefined : Number(field.value);
}

// The fields of a request but for its messages. The server cuts the length to what fits.
export function asked() {
	const thinking = byId("thinking").value;
	return {
		model: status.info?.names[0],
		stream: true,
		stream_options: { include_usage: true },
		temperature: number("temperature"),
		top_p: number("top-p"),
		seed: number("seed"),
		max_tokens: number("max-tokens") ?? status.info?.limits.max_output_tokens,
		enable_thinking: thinking ? thinking === "true" : undefined,
	};
}
