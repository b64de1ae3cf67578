// Asking for an answer, or for the rest of one, and the stream that fills a message with it.

import { ask, events } from "./api.js";

export const CHAT = "v1/chat/completions";

// Streams an answer to `messages` into `message`, whose `asked` are the other fields of the request. `changed` is called
// after each piece. Raises what `ask` does; what was written until then is kept.
export function begin(message, messages, options) {
	return run(message, CHAT, { ...message.asked, messages }, options);
}

// Goes on where an answer stopped. What it thought is over, whether or not the model's template opens a thought.
export function goOn(message, messages, options) {
	const { content, thought } = message;
	const begun = { role: "assistant", content, reasoning_content: thought };
	const body = { ...message.asked, messages: [...messages, begun], continue_final_message: true, add_generation_prompt: false };
	return run(message, CHAT, body, options);
}

async function run(message, path, body, { id, signal, changed }) {
	const clock = new Clock(message);
	message.finish = "stopped"; // unless it comes to another end
	const response = await ask(path, { body, id, signal });
	for await (const { choices: [choice], usage } of events(response)) {
		if (usage) clock.end(usage.completion_tokens);
		if (!choice) continue;
		const { content, reasoning_content: thought } = choice.delta;
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
