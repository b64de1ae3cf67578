// System messages to choose from: some of ours, and those that a person saved in this browser.

import { byId, element } from "./dom.js";
import { browserStorage } from "./storage.js";

const KEPT = "microbatch-presets";
const OURS = {
	Brief: "Answer in one or two sentences.",
	Teacher: "Explain step by step, for somebody who is new to the subject. Give one example.",
	"Code reviewer": "You review code. Name bugs first, then what could be simpler. Show the changed lines only.",
	Translator: "Translate what the user writes into English. Answer with the translation alone.",
};

let own = {};

export function start() {
	byId("preset").addEventListener("change", ({ target }) => choose({ ...OURS, ...own }[target.value] ?? ""));
	byId("system").addEventListener("input", draw);
	byId("save-preset").addEventListener("click", () => keep({ ...own, [name(text())]: text() }));
	byId("delete-preset").addEventListener("click", () => keep(without(byId("preset").value)));
	addEventListener("storage", ({ key }) => (key === KEPT || key === null) && reread()); // another tab's
	reread();
}

const text = () => byId("system").value.trim();
const without = (gone) => Object.fromEntries(Object.entries(own).filter(([each]) => each !== gone));

// The first line, and a number where another preset has that name.
function name(words) {
	const line = words.split("\n")[0].slice(0, 40);
	const taken = { ...OURS, ...own };
	let found = line;
	for (let number = 2; found in taken; number++) found = `${line} (${number})`;
	return found;
}

function choose(system) {
	byId("system").value = system;
	byId("system").dispatchEvent(new Event("input"));
}

function keep(presets) {
	try {
		browserStorage.setItem(KEPT, JSON.stringify(presets));
		own = presets;
	} catch {
		alert("This browser has no room left to keep this. Export or delete some conversations.");
	}
	draw();
}

function reread() {
	own = read();
	draw();
}

function read() {
	try {
		const kept = Object.entries(JSON.parse(browserStorage.getItem(KEPT)) ?? {});
		return Object.fromEntries(kept.filter(([, words]) => typeof words === "string"));
	} catch {
		return {};
	}
}

function draw() {
	const options = (presets) => Object.keys(presets).map((each) => element("option", { value: each }, each)); // else its spaces are cut
	const group = (label, presets) => element("optgroup", { label }, ...options(presets));
	const found = Object.entries({ ...OURS, ...own }).find(([, words]) => words === text())?.[0];
	byId("preset").replaceChildren(element("option", { value: "" }, text() && !found ? "Your own" : "None"), group("Presets", OURS), group("Saved", own));
	byId("preset").value = found ?? "";
	byId("save-preset").hidden = !text() || found !== undefined;
	byId("delete-preset").hidden = !(found in own);
}
