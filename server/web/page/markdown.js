// A model's Markdown as elements: headings, paragraphs, lists, quotes, tables, code, emphasis, links.
// All text goes into text nodes, so whatever a model writes stays text. Links lead to http and https only.

import { button, copy, element } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}>\s?(.*)$/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const DEEPEST = 12;

// Shows `text` in `target`. Blocks whose source is as it was keep their elements.
export function show(target, text) {
	const found = blocks(text.split("\n"));
	found.forEach((block, place) => {
		const source = [block.kind, block.language, ...block.lines].join("\n");
		const old = target.children[place];
		if (old?.source === source) return;
		const made = draw(block, 0);
		made.source = source;
		old ? old.replaceWith(made) : target.append(made);
	});
	while (target.children.length > found.length) target.lastElementChild.remove();
}

export function blocks(lines) {
	const found = [];
	let place = 0;
	while (place < lines.length) {
		const block = lines[place].trim() ? next(lines, place) : null;
		if (block) found.push(block);
		place = block ? block.end : place + 1;
	}
	return found;
}

function next(lines, start) {
	const line = lines[start];
	const fence = FENCE.exec(line);
	if (fence) return fenced(lines, start, fence);
	const heading = HEADING.exec(line);
	if (heading) return { kind: `h${heading[1].length}`, lines: [heading[2]], end: start + 1 };
	if (RULE.test(line)) return { kind: "hr", lines: [], end: start + 1 };
	if (QUOTE.test(line)) return run(lines, start, "quote", (each) => QUOTE.test(each));
	if (ITEM.test(line)) return run(lines, start, "list", (each, before) => inList(each, before));
	if (line.includes("|") && DIVIDER.test(lines[start + 1] ?? "") && lines[start + 1].includes("-")) {
		return run(lines, start, "table", (each) => each.includes("|"));
	}
	return run(lines, start, "p", (each) => each.trim() && !starts(each));
}

function run(lines, start, kind, belongs) {
	let end = start + 1;
	while (end < lines.length && belongs(lines[end], lines[end - 1])) end += 1;
	return { kind, lines: lines.slice(start, end), end };
}

const starts = (line) => [FENCE, HEADING, RULE, QUOTE, ITEM].some((form) => form.test(line));

// A list goes on with items, indented lines, and blank lines that one of these follows.
function inList(line, before) {
	if (!line.trim()) return Boolean(before.trim());
	return ITEM.test(line) || /^\s{2,}/.test(line) || (Boolean(before.trim()) && !starts(line));
}

function fenced(lines, start, [, mark, language]) {
	const closes = (line) => line.trim().startsWith(mark) && !line.trim().replaceAll(mark[0], "");
	let end = start + 1;
	while (end < lines.length && !closes(lines[end])) end += 1;
	return { kind: "code", lines: lines.slice(start + 1, end), language: language.trim(), end: end + 1 };
}

function draw(block, depth) {
	const { kind, lines } = block;
	if (kind === "code" || depth > DEEPEST) return code(lines.join("\n"), block.language);
	if (kind === "hr") return element("hr");
	if (kind === "list") return list(lines, depth);
	if (kind === "table") return grid(lines);
	if (kind === "quote") {
		const inner = lines.map((line) => QUOTE.exec(line)[1]);
		return element("blockquote", {}, ...blocks(inner).map((each) => draw(each, depth + 1)));
	}
	if (kind === "p") return element("p", {}, ...lined(lines));
	return element(`h${Math.min(6, Number(kind[1]) + 2)}`, {}, ...inline(lines[0])); // the page has h1 and h2
}

function code(text, language) {
	const bar = element("div.bar", {}, element("span", {}, language || "code"), button("Copy", () => copy(text)));
	return element("div.code", {}, bar, element("pre", { tabindex: "0" }, element("code", {}, text)));
}

function list(lines, depth) {
	const indent = ITEM.exec(lines[0])[1].length;
	const ordered = /\d/.test(ITEM.exec(lines[0])[2]);
	const items = [];
	for (const line of lines) {
		const item = ITEM.exec(line);
		if (item && item[1].length <= indent + 1) items.push([item[3]]);
		else items.at(-1).push(line.replace(/^ {1,4}|^\t/, ""));
	}
	const from = parseInt(ITEM.exec(lines[0])[2]);
	return element(ordered ? "ol" : "ul", ordered && from !== 1 ? { start: from } : {}, ...items.map((each) => entry(each, depth)));
}

function entry(lines, depth) {
	const inner = blocks(lines);
	const drawn = inner.map((block) => (block.kind === "p" ? lined(block.lines) : [draw(block, depth + 1)]));
	return element("li", {}, ...drawn.flat());
}

function grid(lines) {
	const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
	const row = (line, tag) => element("tr", {}, ...cells(line).map((cell) => element(tag, {}, ...inline(cell))));
	const body = lines.slice(2).map((line) => row(line, "td"));
	const made = element("table", {}, element("thead", {}, row(lines[0], "th")), element("tbody", {}, ...body));
	return element("div.wide", { tabindex: "0", role: "region", "aria-label": "Table" }, made);
}

function lined(lines) {
	return lines.flatMap((line, place) => [...(place ? [element("br")] : []), ...inline(line.trim())]);
}

const INLINE = new RegExp(
	[
		"(?<!`)(?<tick>`{1,3})(?!`)(?<code>.+?)(?<!`)\\k<tick>(?!`)",
		"\\*\\*(?<strong>\\S(?:.*?\\S)?)\\*\\*",
		"(?<![\\w*])\\*(?<em>[^\\s*](?:[^*]*[^\\s*])?)\\*(?![\\w*])",
		"(?<!\\w)_(?<em2>[^\\s_](?:[^_]*[^\\s_])?)_(?!\\w)",
		"\\[(?<label>[^\\[\\]]+)\\]\\((?<target>[^\\s()]+)\\)",
		"(?<bare>https?://[^\\s<>\"'`]*[^\\s<>\"'`.,;:!?)\\]*_])",
	].join("|"),
);

function inline(text, depth = 0) {
	const made = [];
	while (text) {
		const found = depth > DEEPEST ? null : INLINE.exec(text);
		if (!found) return [...made, text];
		if (found.index) made.push(text.slice(0, found.index));
		made.push(styled(found[0], found.groups, depth + 1));
		text = text.slice(found.index + found[0].length);
	}
	return made;
}

function styled(whole, { code, strong, em, em2, label, target, bare }, depth) {
	if (code) return element("code", {}, code);
	if (strong) return element("strong", {}, ...inline(strong, depth));
	if (em || em2) return element("em", {}, ...inline(em ?? em2, depth));
	const href = target ?? bare;
	if (!/^https?:\/\/[^/]/i.test(href)) return whole;
	return element("a", { href, rel: "noopener noreferrer", target: "_blank" }, label ?? href);
}
