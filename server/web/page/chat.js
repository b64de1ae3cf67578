// The part where one talks with the model.

import { hasKey, inWords, requestId } from "./api.js";
import { Conversation } from "./conversation.js";
import { ConversationList } from "./conversations.js";
import { button, byId, composing, copy, note, plural, sends, toast } from "./dom.js";
import { begin, CHAT, goOn } from "./generation.js";
import * as options from "./options.js";
import * as presets from "./presets.js";
import * as scroll from "./scroll.js";
import { explainIn, onStatus, takes } from "./status.js";
import { tabStorage } from "./storage.js";
import * as store from "./store.js";
import { AnswerCard, branchSwitch, questionCard } from "./turn.js";
import { follow } from "./waiting.js";

const EXAMPLES = ["Write a haiku about a lighthouse.", "Show me a loop in Python."];
const OPEN = "microbatch-open"; // which conversation this tab shows

let open = store.load(tabStorage.getItem(OPEN)) ?? new Conversation();
let running = null; // the answer that is being written: its controller, message, and conversation
let list;

export function start() {
	byId("examples").append(...EXAMPLES.map((text) => button(text, () => say(text))));
	byId("composer").addEventListener("submit", (event) => (event.preventDefault(), say(byId("question").value)));
	byId("question").addEventListener("keydown", onKey);
	byId("question").addEventListener("input", grow);
	byId("part-chat").addEventListener("keydown", (event) => event.key === "Escape" && !composing(event) && stop());
	byId("stop").addEventListener("click", stop);
	byId("new-chat").addEventListener("click", () => ((location.hash = "chat"), show(blank())));
	for (const id of ["options", "kept"]) byId(id).open = matchMedia("(min-width: 75rem)").matches;
	options.start();
	presets.start();
	scroll.start();
	list = new ConversationList((conversation = blank()) => show(conversation), retitle);
	addEventListener("storage", changedElsewhere);
	addEventListener("pagehide", () => running && keep(running));
	document.addEventListener("kept", () => list.draw(open));
	explainIn("chat-note");
	onStatus(enable);
	show(open);
}

export const focus = () => byId("question").focus({ preventScroll: true });

function onKey(event) {
	if (!sends(event)) return;
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

const stop = () => running?.controller.abort();
const blank = () => new Conversation({ system: byId("system").value.trim() });

// The conversation that is shown

function show(conversation) {
	if (conversation.id === open.id && byId("turns").childElementCount) return;
	stop();
	open = conversation;
	tabStorage.setItem(OPEN, open.id);
	byId("system").value = open.system;
	byId("system").dispatchEvent(new Event("input"));
	draw();
	tellRoom();
	scroll.toEnd();
	focus();
}

function retitle({ id, title }) {
	if (id === open.id) open.title = title;
}

// `next` is the card of an answer on its way.
function draw(next) {
	const unanswered = open.messages[open.tip]?.role === "user" && !next;
	const last = unanswered ? button("Ask again", () => regenerate(open.tip)) : next;
	byId("turns").replaceChildren(...open.path().map(card), ...(last ? [last] : []));
	byId("empty").hidden = open.tip >= 0;
	list.draw(open);
}

function card(place) {
	const message = open.messages[place];
	if (message.role === "user") return questionCard(message.content, (text) => edit(place, text), branches(place));
	const made = new AnswerCard(message);
	made.end(null, ...actions(place));
	return made.card;
}

function branches(place) {
	return branchSwitch(open.branches(place), place, (other, label) => {
		if (running) return;
		const row = open.path().indexOf(place);
		open.show(other);
		save(open);
		draw();
		const buttons = [...byId("turns").children[row].querySelectorAll(".branches button:enabled")];
		(buttons.find(({ ariaLabel }) => ariaLabel === label) ?? buttons[0]).focus(); // the one pressed is gone
	});
}

function actions(place) {
	const message = open.messages[place];
	const goesOn = place === open.tip && message.content && message.finish !== "stop";
	return [
		button("Copy as curl", () => copy(asCurl(message))),
		button("Regenerate", () => regenerate(message.parent)),
		goesOn ? button("Continue", () => proceed(place)) : null,
		branches(place),
	];
}

function asCurl({ asked, parent }) {
	const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
	const key = hasKey() ? ` -H "authorization: Bearer $API_KEY"` : "";
	const url = new URL(CHAT, document.baseURI);
	const body = JSON.stringify({ ...asked, messages: open.told(parent) });
	return `curl -N ${quoted(url.href)}${key} -H 'content-type: application/json' -d ${quoted(body)}`;
}

// What is done with it

const may = () => !running && !byId("send").disabled && !options.wrong();

function say(text) {
	if (text.trim() && may()) return ask(text, open.end());
}

function edit(place, text) {
	if (text.trim() && may()) return ask(text, open.messages[place].parent);
}

function ask(text, parent) {
	byId("question").value = "";
	grow();
	open.system = byId("system").value.trim();
	open.add({ role: "user", content: text }, parent);
	save(open);
	return answer();
}

function regenerate(question) {
	if (!may()) return;
	open.system = byId("system").value.trim();
	open.tip = question;
	return answer();
}

// Writes an answer to the question at the tip.
function answer() {
	if (!may()) return;
	const message = { role: "assistant", content: "", asked: options.asked() };
	const told = open.told();
	const made = new AnswerCard(message);
	draw(made.card);
	return write(made, (how) => begin(message, told, how));
}

// Goes on with the answer at `place`.
function proceed(place) {
	if (!may()) return;
	const message = open.messages[place];
	const told = open.told(message.parent);
	const made = new AnswerCard(message);
	made.drawn();
	byId("turns").lastElementChild.replaceWith(made.card);
	return write(made, (how) => goOn(message, told, how));
}

async function write(made, run) {
	const { message } = made;
	running = { controller: new AbortController(), message, conversation: open };
	const { signal } = running.controller;
	enable();
	made.busy("");
	scroll.toEnd();
	const id = requestId();
	const leave = follow(id, (words) => made.busy(words));
	const changed = () => {
		leave();
		made.busy("Generating");
		made.draw();
	};
	const wrong = await run({ id, signal, changed }).catch((error) => (signal.aborted ? null : inWords(error)));
	leave();
	if (wrong) message.finish = "error";
	keep(running);
	running = null;
	enable();
	if (made.card.isConnected) end(made, wrong); // else another conversation was opened meanwhile
}

function end(made, wrong) {
	const place = open.messages.indexOf(made.message);
	const question = open.tip;
	made.end(wrong, ...(place < 0 ? [button("Try again", () => regenerate(question))] : actions(place)));
	if (place < 0) open.show(question); // an earlier answer, if there is one
	const { finish, tokens } = made.message;
	if (!wrong) toast(finish === "stopped" ? "Stopped" : `Answered, ${plural(tokens, "token")}`);
	list.draw(open);
	if (!document.activeElement.matches("input, textarea, select")) focus(); // else somebody writes elsewhere
}

// Keeping it

function keep({ message, conversation }) {
	conversation.follow(store.load(conversation.id)?.messages ?? []);
	if (!message.content && !message.thought) return;
	if (!conversation.messages.includes(message)) conversation.add(message);
	if (store.load(conversation.id)) save(conversation); // else it was deleted meanwhile
}

function save(conversation) {
	conversation.changed = Date.now();
	store.save(conversation);
	tellRoom();
}

function tellRoom() {
	note("kept-note", store.isFull() ? "This browser has no room left to keep all conversations. Export or delete some." : "");
}

function changedElsewhere({ key }) {
	if (key !== null && key !== store.entry(open.id)) return list.draw(open);
	const found = store.load(open.id);
	if (running || !found) return list.draw(open);
	found.show(open.tip); // whichever branch the other tab shows
	open = found;
	draw();
}
