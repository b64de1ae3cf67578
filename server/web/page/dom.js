// Building and finding elements. Text only ever becomes text nodes: nothing is read as HTML.

export const byId = (id) => document.getElementById(id);

// `kind` is a tag, or a tag and a class: "p.note".
export function element(kind, attributes = {}, ...children) {
	const [tag, name] = kind.split(".");
	return fill(document.createElement(tag), name ? { class: name, ...attributes } : attributes, children);
}

function fill(made, attributes, children) {
	for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
	made.append(...children.filter((child) => child != null));
	return made;
}

export function button(text, act) {
	const made = element("button", { type: "button" }, text);
	made.addEventListener("click", act);
	return made;
}

// Whether a key is the input method's. Safari says so of the one that ends a word by its code alone.
export const composing = ({ isComposing, keyCode }) => isComposing || keyCode === 229;

// Whether a key sends what is written. Where one types on the screen, Enter is the only way to a new line.
export function sends(event) {
	if (event.key !== "Enter" || event.shiftKey || composing(event)) return false;
	return event.ctrlKey || event.metaKey || !matchMedia("(pointer: coarse)").matches;
}

let fading;

// A short message, which screen readers speak.
export function toast(text) {
	byId("toast").textContent = text;
	clearTimeout(fading);
	fading = setTimeout(() => (byId("toast").textContent = ""), 3000);
}

export async function copy(text) {
	try {
		await navigator.clipboard.writeText(text);
	} catch {
		copyOldWay(text); // the clipboard is there on https and localhost only
	}
	toast("Copied");
}

function copyOldWay(text) {
	const area = element("textarea.unseen", { "aria-label": "Text to copy" });
	const before = document.activeElement;
	area.value = text;
	document.body.append(area);
	area.select();
	document.execCommand("copy");
	area.remove();
	before.focus({ preventScroll: true });
}

export function note(id, text) {
	byId(id).textContent = text;
	byId(id).hidden = !text;
}

export function table(target, caption, heads, rows) {
	const cells = (tag, row) => element("tr", {}, ...row.map((cell) => element(tag, tag === "th" ? { scope: "col" } : {}, cell)));
	target.replaceChildren(
		element("caption.unseen", {}, caption),
		element("thead", {}, cells("th", heads)),
		element("tbody", {}, ...rows.map((row) => cells("td", row))),
	);
}

// Numbers as people read them.

export function seconds(value) {
	if (value == null) return "–";
	return value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(value < 10 ? 2 : 1)} s`;
}

export function count(value) {
	return value == null ? "–" : value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 });
}

export function plural(number, noun) {
	return `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
}

// Calls `draw` a little later, once, however often it is asked meanwhile.
export function soon(draw) {
	let asked;
	return () => {
		asked ??= setTimeout(() => ((asked = undefined), draw()), 40);
	};
}
