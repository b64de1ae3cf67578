// A model's Markdown as elements, by markdown-it, highlight.js and DOMPurify. HTML in it stays text, links lead to http
// and https only, and pictures stay links: showing what a model wrote asks nobody anything.

import { button, copy, element } from "./dom.js";

const { DOMPurify, hljs, markdownit } = globalThis;

const LONGEST_COLOURED = 20_000; // characters
const CLEAN = {
	ALLOWED_TAGS: "p br hr em strong s code pre a ul ol li blockquote table thead tbody tr th td h3 h4 h5 h6 span".split(" "),
	ALLOWED_ATTR: ["href", "class", "start"],
	ALLOWED_URI_REGEXP: /^https?:\/\/[^/]/i,
	ALLOW_ARIA_ATTR: false,
	ALLOW_DATA_ATTR: false,
	RETURN_DOM_FRAGMENT: true,
};

const markdown = markdownit({ breaks: true, linkify: true }).disable("image");
markdown.validateLink = (url) => CLEAN.ALLOWED_URI_REGEXP.test(url);
markdown.linkify.set({ fuzzyLink: false, fuzzyEmail: false }); // "main.py" is no address
markdown.core.ruler.push("ours", ({ tokens }) => tokens.forEach(adjust));

function adjust(token, place, tokens) {
	if (token.type.startsWith("heading")) token.tag = `h${Math.min(6, Number(token.tag[1]) + 2)}`; // the page has h1 and h2
	const style = token.attrGet("style"); // the page's policy forbids styles in attributes
	if (style) token.attrs = [["class", style.replace("text-align:", "")]];
	if (token.type === "inline" && tokens[place - 2]?.type === "list_item_open") task(token.children[0], tokens[place - 2]);
}

function task(text, item) {
	const box = text?.type === "text" && /^\[([ x])\] /i.exec(text.content);
	if (!box) return;
	text.content = `${box[1] === " " ? "☐" : "☑"} ${text.content.slice(4)}`;
	item.attrJoin("class", "task");
}

// Shows `text` in `target`. Blocks that are as they were keep their elements, and with them what a reader selected.
export function show(target, text) {
	const found = blocks(text);
	found.forEach((html, place) => {
		const old = target.children[place];
		if (old?.source === html) return;
		const made = draw(html);
		made.source = html;
		old ? old.replaceWith(made) : target.append(made);
	});
	while (target.children.length > found.length) target.lastElementChild.remove();
}

// The HTML of each block at the top.
function blocks(text) {
	const found = [];
	const defined = {};
	let depth = 0;
	for (const token of markdown.parse(text, defined)) {
		if (!depth) found.push([]);
		found.at(-1).push(token);
		depth += token.nesting;
	}
	return found.map((tokens) => markdown.renderer.render(tokens, markdown.options, defined));
}

function draw(html) {
	const made = DOMPurify.sanitize(html, CLEAN);
	for (const link of made.querySelectorAll("a")) Object.assign(link, { rel: "noopener noreferrer", target: "_blank" });
	for (const table of made.querySelectorAll("table")) table.replaceWith(scrolled(table.cloneNode(true)));
	for (const pre of made.querySelectorAll("pre")) pre.replaceWith(code(pre.firstElementChild));
	const block = made.firstElementChild ?? element("p");
	block.dir ||= "auto"; // Arabic and Hebrew run from right to left
	return block;
}

function scrolled(table) {
	return element("div.wide", { tabindex: "0", role: "region", "aria-label": "Table" }, table);
}

function code({ className, textContent }) {
	const language = className.replace("language-", "");
	const text = textContent.replace(/\n$/, "");
	const bar = element("div.bar", {}, element("span", {}, language || "code"), button("Copy", () => copy(text)));
	return element("div.code", { dir: "ltr" }, bar, element("pre", { tabindex: "0" }, element("code", {}, coloured(text, language))));
}

function coloured(text, language) {
	if (!hljs.getLanguage(language) || text.length > LONGEST_COLOURED) return text;
	return DOMPurify.sanitize(hljs.highlight(text, { language, ignoreIllegals: true }).value, CLEAN);
}
