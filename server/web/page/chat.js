// The part where one talks with the model.

import { ask, events, hasKey, inWords } from "./api.js";
import { button, byId, copy, count, element, plural, seconds, soon, toast } from "./dom.js";
import { show } from "./markdown.js";
import { explainIn, onStatus, status, takes } from "./status.js";

const EXAMPLES = ["Write a haiku about a lighthouse.", "Show me a loop in Python."];
const PATH = "v1/chat/completions";

const turns = []; // what the model is told of the conversation
let running = null;

export function start() {
	byId("examples").append(...EXAMPLES.map((text) => button(text, () => say(text))));
	byId("composer").addEventListener("submit", (event) => (event.preventDefault(), say(byId("question").value)));
	byId("question").addEventListener("keydown", onKey);
	byId("question").addEventListener("input", grow);
	byId("part-chat").addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
	byId("stop").addEventListener("click", () => running?.abort());
	byId("clear").addEventListener("click", clear);
	byId("options").open = matchMedia("(min-width: 60rem)").matches;
	explainIn("chat-note");
	onStatus(({ info }) => {
		if (info) byId("max-tokens").placeholder = info.limits.default_max_tokens || "what fits";
		if (info?.sampling) byId("temperature").placeholder = info.sampling.temperature;
		if (info?.sampling) byId("top-p").placeholder = info.sampling.top_p;
		enable();
	});
}

function onKey(event) {
	if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
	event.preventDefault();
	say(byId("question").value);
}

function grow() {
	const box = byId("question");
	box.style.height = "auto";
	box.style.height = `${box.scrollHeight + 2}px`;
}

function enable() {
	byId("send").disabled = !takes();
	byId("send").hidden = Boolean(running);
	byId("stop").hidden = !running;
}

function clear() {
	running?.abort();
	turns.length = 0;
	byId("turns").replaceChildren();
	byId("empty").hidden = false;
	byId("question").focus();
}

function number(id) {
	const field = byId(id);
	return field.value === "" || !field.validity.valid ? undefined : Number(field.value);
}

// Fields left empty are left out, so the service's own defaults hold.
function request() {
	const system = byId("system").value.trim();
	const thinking = byId("thinking").value;
	return {
		model: status.info?.names[0],
		messages: [...(system ? [{ role: "system", content: system }] : []), ...turns],
		stream: true,
		stream_options: { include_usage: true },
		temperature: number("temperature"),
		top_p: number("top-p"),
		seed: number("seed"),
		max_tokens: number("max-tokens"),
		enable_thinking: thinking ? thinking === "true" : undefined,
	};
}

function asCurl(body) {
	const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
	const key = hasKey() ? ` -H "authorization: Bearer $API_KEY"` : "";
	const url = new URL(PATH, document.baseURI);
	return `curl -N ${quoted(url.href)}${key} -H 'content-type: application/json' -d ${quoted(JSON.stringify(body))}`;
}

async function say(text) {
	if (!text.trim() || running || byId("send").disabled) return;
	const wrong = [...byId("options").querySelectorAll("input")].find((field) => !field.validity.valid);
	if (wrong) return (byId("options").open = true), wrong.reportValidity();
	running = new AbortController();
	enable();
	byId("empty").hidden = true;
	byId("question").value = "";
	grow();
	turns.push({ role: "user", content: text });
	const mine = element("article.mine", { "aria-label": "You" }, text);
	const answer = new Answer(request());
	byId("turns").append(mine, answer.card);
	answer.card.scrollIntoView({ block: "end" });
	await answer.stream(running);
	if (!answer.card.isConnected) turns.length = 0; // a new conversation was begun meanwhile
	else if (answer.failed || !answer.text) turns.pop(); // the model need not know
	else turns.push({ role: "assistant", content: answer.text });
	if (answer.failed) answer.foot.append(button("Try again", () => (mine.remove(), answer.card.remove(), say(text))));
	running = null;
	enable();
	byId("question").focus({ preventScroll: true });
}

class Answer {
	text = "";
	thought = "";
	failed = false;
	first = this.tokens = this.finish = null;

	constructor(body) {
		this.body = body;
		this.said = element("div.said");
		this.foot = element("p.foot");
		this.card = element("article.answer", { "aria-label": "Answer", "aria-busy": "true" }, this.said, this.foot);
		this.draw = soon(() => this.drawn());
	}

	async stream(controller) {
		this.begun = performance.now();
		try {
			const response = await ask(PATH, { body: this.body, signal: controller.signal });
			for await (const chunk of events(response)) this.take(chunk);
		} catch (error) {
			if (controller.signal.aborted) this.finish = "stopped by you";
			else this.fail(inWords(error));
		}
		this.end();
	}

	take({ choices: [choice], usage }) {
		if (usage) this.tokens = usage.completion_tokens;
		if (!choice) return;
		const { content, reasoning_content: thought } = choice.delta;
		if (content || thought) this.first ??= performance.now();
		this.last = performance.now();
		this.text += content ?? "";
		this.thought += thought ?? "";
		this.finish = choice.finish_reason ?? this.finish;
		this.draw();
	}

	drawn() {
		const follows = document.documentElement.scrollHeight - innerHeight - scrollY < 80;
		if (this.thought) this.drawThought();
		show(this.said, this.text);
		if (follows) scrollTo(0, document.documentElement.scrollHeight);
	}

	drawThought() {
		if (!this.folded) {
			this.folded = element("details.thought", {}, element("summary"), element("div"));
			this.card.prepend(this.folded);
		}
		this.folded.firstChild.textContent = this.text || this.finish ? "Thought" : "Thinking…";
		show(this.folded.lastChild, this.thought);
	}

	fail(words) {
		this.failed = true;
		this.card.append(element("p.note", { role: "alert" }, words));
		this.card.append(this.foot);
	}

	end() {
		this.drawn();
		this.card.removeAttribute("aria-busy");
		const facts = this.facts();
		this.foot.append(element("span", {}, facts.join(" · ")));
		if (this.text) this.foot.append(button("Copy", () => copy(this.text)));
		this.foot.append(button("Copy as curl", () => copy(asCurl(this.body))));
		if (!this.failed) toast(this.tokens ? `Answered, ${plural(this.tokens, "token")}` : "Stopped");
	}

	facts() {
		const facts = [];
		if (this.first) facts.push(`first token after ${seconds((this.first - this.begun) / 1000)}`);
		if (this.tokens) facts.push(plural(this.tokens, "token"));
		if (this.tokens > 1 && this.last > this.first) {
			facts.push(`${count(((this.tokens - 1) * 1000) / (this.last - this.first))} tokens/s`);
		}
		if (this.finish === "length") facts.push("cut at its greatest length");
		else if (this.finish && this.finish !== "stop") facts.push(this.finish);
		return facts;
	}
}
