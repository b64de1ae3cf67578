// The part that asks several questions at once and shows how they share batches.

import { ask, events, inWords, requestId } from "./api.js";
import { byId, count, element, note, plural, seconds, soon, table, toast } from "./dom.js";
import { here, listen, toHere } from "./feed.js";
import { show } from "./markdown.js";
import { explainIn, onStatus, status, takes } from "./status.js";
import { drawLanes } from "./timeline.js";

const MOST = 64; // prompts that one request may have

const SAMPLE = `The lighthouse at Grey Point was built in 1874. Its lamp burned oil until 1923, when it was changed to electric light. The last keeper, who lived there with a family of five, left in 1968. The tower is 31 metres tall, white with two red bands, and can be visited on Sundays from May to September; a ticket costs 4 euros. The harbour of Selby is 12 kilometres to the south. The light flashes twice every 15 seconds. In the keeper's house there is now a small museum.`;

const QUESTIONS = `When was the lighthouse built?
How tall is the tower?
What burned in the lamp at first?
When did it get electric light?
When did the last keeper leave?
How large was the keeper's family?
On which day can it be visited?
What does a ticket cost?
How far away is the harbour of Selby?
How often does the light flash?
What colour is the tower?
What is in the keeper's house today?`;

let running = null;

export function start() {
	byId("document").value = SAMPLE;
	byId("questions").value = QUESTIONS;
	byId("questions").addEventListener("input", label);
	byId("ask-many").addEventListener("submit", (event) => (event.preventDefault(), go()));
	byId("ask-stop").addEventListener("click", () => running?.abort());
	explainIn("many-note");
	onStatus(enable);
	label();
}

function questions() {
	return byId("questions").value.split("\n").map((line) => line.trim()).filter(Boolean);
}

function label() {
	byId("ask").textContent = `Ask ${plural(questions().length, "question")} at once`;
}

function enable() {
	byId("ask").disabled = !takes() || Boolean(running);
	byId("ask-stop").hidden = !running;
}

async function go() {
	const asked = questions();
	if (!asked.length || asked.length > MOST) return note("many-note", `Write 1 to ${MOST} questions.`);
	note("many-note", "");
	running = new AbortController();
	enable();
	byId("shown").hidden = false;
	const round = new Round(asked, running.signal);
	const leave = listen((message) => round.hear(message));
	try {
		await round.run();
		toast(`${plural(asked.length, "answer")} complete`);
	} catch (error) {
		if (!running.signal.aborted) note("many-note", inWords(error));
	}
	running = null;
	enable();
	await round.settled();
	leave();
}

class Round {
	constructor(asked, signal) {
		this.id = requestId();
		this.signal = signal;
		this.rows = asked.map((question, place) => new Row(question, place));
		this.begun = null;
		this.over = null;
		for (const id of ["summary", "lanes", "times"]) byId(id).replaceChildren(); // those of the round before
		byId("cards").replaceChildren(...this.rows.map((row) => row.card));
		this.draw = soon(() => this.drawn());
		this.allEnded = new Promise((resolve) => (this.resolve = resolve));
	}

	async run() {
		try {
			const prompt = await Promise.all(this.rows.map((row) => this.tokens(row.question)));
			this.begun = here();
			for (const row of this.rows) row.queued = this.begun;
			this.draw();
			const response = await ask("v1/completions", { id: this.id, signal: this.signal, body: this.request(prompt) });
			for await (const chunk of events(response)) this.take(chunk);
		} finally {
			this.over = here();
			for (const row of this.rows) row.close(this.over);
			this.draw();
		}
	}

	request(prompt) {
		return {
			model: status.info?.names[0],
			prompt,
			stream: true,
			max_tokens: byId("many-tokens").valueAsNumber,
			temperature: byId("many-temperature").valueAsNumber,
		};
	}

	async tokens(question) {
		const messages = [
			{ role: "system", content: `Answer from this text alone:\n${byId("document").value}` },
			{ role: "user", content: question },
		];
		const response = await ask("v1/tokenize", { body: { messages }, signal: this.signal });
		return (await response.json()).tokens;
	}

	take({ choices }) {
		for (const { index, text, finish_reason: finish } of choices) this.rows[index].take(text, finish);
		this.draw();
	}

	// What the server says of these rows, which is truer than when text came here.
	hear({ started, ended, at, batch, rows }) {
		for (const message of rows ?? []) this.hear(message);
		const row = this.row((started ?? ended)?.id);
		if (!row) return;
		if (started) row.start(started, batch);
		else row.end(ended, at);
		if (this.rows.every((each) => each.outcome)) this.resolve();
		this.draw();
	}

	row(id) {
		if (!id?.startsWith(this.id)) return null;
		return this.rows[Number(id.slice(this.id.length + 1))];
	}

	// The stream of events may be a little behind the answers.
	settled() {
		return Promise.race([this.allEnded, new Promise((resolve) => setTimeout(resolve, 3000))]);
	}

	drawn() {
		if (this.begun === null) return;
		const end = this.over ?? here();
		drawLanes(byId("lanes"), this.rows, this.begun, end);
		byId("summary").textContent = this.summary(end);
		table(
			byId("times"),
			"Times of each question",
			["Question", "Queued", "First token", "Total", "Tokens", "Batch"],
			this.rows.map((row) => row.cells()),
		);
		if (!this.over) this.draw();
	}

	summary(end) {
		const batches = new Set(this.rows.map((row) => row.batch).filter(Boolean));
		const done = this.rows.filter((row) => row.outcome === "answered");
		const tokens = this.rows.reduce((sum, row) => sum + row.tokens, 0);
		const shared = batches.size ? `, ${batches.size === 1 ? "one batch" : `${batches.size} batches`}` : "";
		const speed = tokens && this.over ? `, ${count(tokens / (end - this.begun))} tokens/s in all` : "";
		return `${done.length} of ${this.rows.length} answered${shared}, ${seconds(end - this.begun)}${speed}.`;
	}
}

class Row {
	text = "";
	tokens = 0;
	outcome = null; // how it ended, once the server has said so
	queued = this.at = this.started = this.first = this.ended = this.batch = this.size = null;

	constructor(question, place) {
		this.question = question;
		this.place = place;
		this.said = element("div.said");
		this.foot = element("p.foot", {}, "Queued");
		this.card = element("article.card", {}, element("h4", { dir: "auto" }, `${place + 1}. ${question}`), this.said, this.foot);
		this.draw = soon(() => show(this.said, this.shown()));
	}

	take(text, finish) {
		this.first ??= here();
		this.text += text;
		if (finish) this.ended ??= here();
		this.draw();
		this.label();
	}

	shown() {
		return this.text.replace(/^[^]*<\/think>\s*/, "");
	}

	start(event, batch) {
		this.at = event.at;
		this.started = toHere(event.at);
		this.queued = this.started - event.queue_wait;
		this.batch = batch;
		this.size = event.batch_size;
		this.label();
	}

	end(event, at) {
		this.outcome = event.outcome;
		this.tokens = event.output_tokens;
		this.ended = toHere(at);
		this.queued = this.ended - event.duration;
		if (this.started) this.started = this.queued + event.queue_wait;
		if (event.ttft !== null) this.first = this.queued + event.ttft;
		this.label();
	}

	close(now) {
		this.ended ??= now;
		this.label();
	}

	label() {
		const words = [];
		if (this.first) words.push(`first token after ${seconds(this.first - this.queued)}`);
		else words.push(this.ended ? "No answer" : this.started ? "Prefill" : "Queued");
		if (this.tokens) words.push(plural(this.tokens, "token"));
		if (this.batch) words.push(`batch of ${this.size}`);
		if (this.outcome && this.outcome !== "answered") words.push(this.outcome);
		this.foot.textContent = words.join(" · ");
	}

	cells() {
		const since = (moment) => (moment === null ? "–" : seconds(moment - this.queued));
		const batch = this.batch ? `${this.batch} (${plural(this.size, "row")})` : "–";
		return [this.question, since(this.started), since(this.first), since(this.ended), count(this.tokens), batch];
	}
}
