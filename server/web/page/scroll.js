// Keeps the end of the conversation in sight while it grows, unless a reader has left it.

import { byId } from "./dom.js";

const NEAR = 80; // pixels

const page = document.documentElement;
const distance = () => page.scrollHeight - innerHeight - scrollY;

let followed = true;

export function start() {
	byId("jump").addEventListener("click", toEnd);
	addEventListener("scroll", look, { passive: true });
	new ResizeObserver(() => (followed ? toEnd() : look())).observe(byId("turns"));
}

function look() {
	followed = distance() < NEAR;
	byId("jump").hidden = followed || byId("part-chat").hidden;
}

export function toEnd() {
	if (byId("part-chat").hidden) return;
	scrollTo({ top: page.scrollHeight, behavior: "instant" });
	look();
}
