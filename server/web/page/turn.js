// How the messages of a conversation look: questions that can be edited, answers with their thought and facts.

import { button, composing, copy, count, element, plural, seconds, sends, soon } from "./dom.js";
import { show } from "./markdown.js";

const FINISHES = { length: "Stopped at the token limit", stopped: "Stopped", error: "Broken off" };

export function questionCard(text, edit, branches) {
	const card = element("article.turn", { "aria-label": "You" });
	const start = button("Edit", () => card.replaceChildren(editor(text, edit, () => (draw(), start.focus()))));
	const draw = () => card.replaceChildren(element("div.mine", { dir: "auto" }, text), element("p.foot", {}, start, branches));
	draw();
	return card;
}

function editor(text, edit, cancel) {
	const area = element("textarea", { "aria-label": "Your message, edited", dir: "auto", rows: Math.min(12, text.split("\n").length + 1) });
	area.value = text;
	area.onkeydown = (event) => {
		if (composing(event)) return;
		if (event.key === "Escape") cancel();
		if (!sends(event)) return;
		event.preventDefault();
		edit(area.value);
	};
	setTimeout(() => area.focus());
	const buttons = element("p.row", {}, button("Send", () => edit(area.value)), button("Cancel", cancel));
	return element("div.editor", {}, area, buttons);
}

// "‹ 2 / 3 ›", where there are several.
export function branchSwitch(places, place, choose) {
	if (places.length < 2) return null;
	const at = places.indexOf(place);
	const step = (sign, label, to) => {
		const made = button(sign, () => choose(places[to], label));
		made.setAttribute("aria-label", label);
		made.disabled = !(to in places);
		return made;
	};
	return element("span.branches", {}, step("‹", "Earlier version", at - 1), ` ${at + 1} / ${places.length} `, step("›", "Later version", at + 1));
}

export class AnswerCard {
	constructor(message) {
		this.message = message;
		this.said = element("div.said");
		this.foot = element("p.foot");
		this.card = element("article.answer", { "aria-label": "Answer" }, this.said, this.foot);
		this.draw = soon(() => this.drawn());
	}

	// While it is written. `words` say what happens meanwhile.
	busy(words) {
		this.card.setAttribute("aria-busy", "true");
		this.foot.textContent = words;
	}

	drawn() {
		if (this.message.thought) this.drawThought();
		show(this.said, this.message.content);
	}

	drawThought() {
		if (!this.folded) {
			this.folded = element("details.thought", {}, element("summary"), element("div"));
			this.card.prepend(this.folded);
		}
		const { content, thought } = this.message;
		this.folded.firstChild.textContent = content || !this.card.ariaBusy ? "Thought" : "Thinking…";
		show(this.folded.lastChild, thought);
	}

	// Complete, or as far as it came. `wrong` says why it did not come further.
	end(wrong, ...actions) {
		this.card.removeAttribute("aria-busy");
		this.drawn();
		if (wrong) this.foot.before(element("p.note", { role: "alert" }, wrong));
		const { content } = this.message;
		const shown = [content ? button("Copy", () => copy(content)) : null, ...actions].filter(Boolean);
		this.foot.replaceChildren(element("span", {}, this.facts().join(" · ")), ...shown);
	}

	facts() {
		const { ttft, tokens, speed, finish } = this.message;
		return [
			ttft == null ? null : `first token after ${seconds(ttft)}`,
			tokens == null ? null : plural(tokens, "token"),
			speed == null ? null : `${count(speed)} tokens/s`,
			finish === "stop" ? null : (FINISHES[finish] ?? finish),
		].filter(Boolean);
	}
}
