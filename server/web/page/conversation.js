// A conversation: messages, each of which follows another, so that a question asked anew begins a branch.

const FIELDS = { id: "string", title: "string", system: "string", changed: "number" };
const MORE = { thought: "string", finish: "string", tokens: "number", ttft: "number", speed: "number", asked: "object" };
const ROLES = ["user", "assistant"];

export const newId = () => crypto.getRandomValues(new Uint32Array(3)).join("-");

export class Conversation {
	// `messages` have a `role`, their `content`, and the place of their `parent`, -1 if they are the first. `tip` is the
	// place of the last one shown, -1 if there is none.
	constructor(kept = {}) {
		const blank = { id: newId(), title: "", system: "", changed: Date.now(), messages: [], tip: -1 };
		Object.assign(this, blank, kept);
	}

	// The places of what is shown, the first message's first.
	path(tip = this.tip) {
		const found = [];
		for (let at = tip; at >= 0; at = this.messages[at].parent) found.unshift(at);
		return found;
	}

	// What the model is told up to a message.
	told(tip = this.tip) {
		const system = this.system ? [{ role: "system", content: this.system }] : [];
		return [...system, ...this.path(tip).map((place) => (({ role, content }) => ({ role, content }))(this.messages[place]))];
	}

	add(message, parent = this.tip) {
		this.tip = this.messages.push(Object.assign(message, { parent })) - 1;
		if (!this.title) this.title = message.content.trim().split("\n")[0].slice(0, 80);
	}

	// Takes over what was added to `kept`, which began as these messages: by another tab.
	follow(kept) {
		this.messages.push(...kept.slice(this.messages.length));
	}

	// The places of the messages that follow the same one, itself among them.
	branches(place) {
		const { parent } = this.messages[place];
		return this.messages.flatMap((message, other) => (message.parent === parent ? [other] : []));
	}

	// Shows the newest messages that follow the one at `place`.
	show(place) {
		for (let next = place; next >= 0; next = this.messages.findLastIndex(({ parent }) => parent === this.tip)) this.tip = next;
	}

	// Where the next question follows: one that has no answer is not told to the model.
	end() {
		const last = this.messages[this.tip];
		return last?.role === "user" ? last.parent : this.tip;
	}
}

const fits = (value, types) => Object.entries(types).every(([name, type]) => typeof value[name] === type);

// Whether what was read, perhaps from a file of somebody else's, is a conversation.
export function isConversation(value) {
	if (value === null || typeof value !== "object" || !fits(value, FIELDS) || !Array.isArray(value.messages)) return false;
	return value.messages.every(isMessage) && Number.isInteger(value.tip) && value.tip >= -1 && value.tip < value.messages.length;
}

function isMessage(value, place) {
	if (value === null || typeof value !== "object" || !ROLES.includes(value.role) || typeof value.content !== "string") return false;
	const more = Object.entries(MORE).filter(([name]) => value[name] != null);
	return fits(value, Object.fromEntries(more)) && Number.isInteger(value.parent) && value.parent >= -1 && value.parent < place;
}
