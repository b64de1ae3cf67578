// Where conversations are kept: in this browser, under an entry each, and nowhere else. Those that it has no room for
// are here until it has, or the page is left.

import { Conversation, isConversation, newId } from "./conversation.js";
import { browserStorage } from "./storage.js";

const PREFIX = "microbatch-conversation-";
const FORMAT = "microbatch conversations";

const waiting = new Map(); // by id, those without room

export const entry = (id) => PREFIX + id;
export const isFull = () => waiting.size > 0;

// All that are kept, the latest first.
export function all() {
	const entries = Object.keys(browserStorage).filter((key) => key.startsWith(PREFIX));
	const ids = new Set([...waiting.keys(), ...entries.map((key) => key.slice(PREFIX.length))]);
	return [...ids].map(load).filter(Boolean).sort((a, b) => b.changed - a.changed);
}

export function load(id) {
	if (waiting.has(id)) return waiting.get(id);
	const value = parsed(browserStorage.getItem(entry(id)));
	return isConversation(value) ? new Conversation(value) : null;
}

export function save(conversation) {
	if (write(conversation)) waiting.delete(conversation.id);
	else waiting.set(conversation.id, conversation);
}

// Returns whether there was room.
function write(conversation) {
	try {
		browserStorage.setItem(entry(conversation.id), JSON.stringify(conversation));
		return true;
	} catch {
		return false;
	}
}

export function remove(id) {
	waiting.delete(id);
	browserStorage.removeItem(entry(id));
	[...waiting.values()].forEach(save); // there may be room now
}

export const exported = (conversations) => JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);

// Keeps what a file has, and returns how many that were. Raises an error in words.
export function take(text) {
	const found = parsed(text);
	if (found?.format !== FORMAT || found.version !== 1 || !Array.isArray(found.conversations)) {
		throw new Error("This file has no exported conversations.");
	}
	const wrong = found.conversations.findIndex((each) => !isConversation(each));
	if (wrong >= 0) throw new Error(`Conversation ${wrong + 1} of this file is damaged; nothing was imported.`);
	const taken = found.conversations.map(unlike).filter(Boolean);
	if (!taken.every(write)) throw new Error("The browser has no room for all of them; delete some conversations.");
	return taken.length;
}

// The conversation, under another id if that is taken; nothing if it is there already.
function unlike(conversation) {
	const kept = browserStorage.getItem(entry(conversation.id));
	if (kept === null) return conversation;
	return kept === JSON.stringify(conversation) ? null : { ...conversation, id: newId() };
}

function parsed(text) {
	try {
		return JSON.parse(text);
	} catch {
		return null;
	}
}
