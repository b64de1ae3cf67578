// Asking for an answer, or for the rest of one, and the stream that fills a message with it.

import { ask, events } from "./api.js";

export const CHAT = "v1/chat/completions";
const COMPLETIONS = "v1/completions";

// Streams an answer to `messages` into `message`, whose `asked` are the other fields of the request. `changed` is called
// after each piece. Raises what `ask` does; what was written until then is kept.
export function begin(message, messages, options) {
	return run(message, CHAT, { ...message.asked, messages }, options);
}

// Goes on where an answer stopped: the prompt is that of the chat and the answer so far, token by token, without its
// thought, which is over.
export async function goOn(message, messages, options) {
	const tokens = async (body) => (await (await ask("v1/tokenize", { body, signal: options.signal })).json()).tokens;
	const [before, after] = await Promise.all([
		tokens({ messages, enable_thinking: false }),
		tokens({ prompt: message.content, add_special_tokens: false }),
	]);
	const { enable_thinking: _, ...asked } = message.asked;
	return run(message, COMPLETIONS, { ...asked, prompt: [...before, ...after] }, options);
}

async function run(message, path, body, { id, signal, changed }) {
	const clock = new Clock(message);
	message.finish = "stopped"; // unless it comes to another end
	const response = await ask(path, { body, id, signal });
	for await (const { choices: [choice], usage } of events(response)) {
		if (usage) clock.end(usage.completion_tokens);
		if (!choice) continue;
		const { content = choice.text, reasoning_content: thought } = choice.delta ?? {};
		if (content || thought) clock.token();
		message.content += content ?? "";
		if (thought) message.thought = (message.thought ?? "") + thought;
		message.finish = choice.finish_reason ?? message.finish;
		changed();
	}
}

// Seconds to the first token, and tokens a second from then on.
class Clock {
	constructor(message) {
		this.message = message;
		this.begun = performance.now();
	}

	token() {
		this.last = performance.now();
		this.first ??= this.last;
		this.message.ttft ??= (this.first - this.begun) / 1000;
	}

	end(tokens) {
		this.message.tokens = (this.message.tokens ?? 0) + tokens;
		if (tokens > 1 && this.last > this.first) this.message.speed = ((tokens - 1) * 1000) / (this.last - this.first);
	}
}
