// The frame around the four parts: which is shown, and the service's state in the corner.

import * as chat from "./chat.js";
import { byId } from "./dom.js";
import * as live from "./live.js";
import * as many from "./many.js";
import * as scroll from "./scroll.js";
import * as state from "./state.js";
import { onStatus, refresh } from "./status.js";

const PARTS = ["chat", "many", "live", "state"];

const shown = () => (PARTS.includes(location.hash.slice(1)) ? location.hash.slice(1) : "chat");

function turn() {
	for (const part of PARTS) byId(`part-${part}`).hidden = part !== shown();
	for (const link of document.querySelectorAll("nav a")) {
		link.hash === `#${shown()}` ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
	}
	document.title = `${byId(`${shown()}-title`).textContent} – microbatch`;
	watch();
	if (shown() === "chat") chat.focus();
}

const watch = () => live.look(shown() === "live" && !document.hidden);

onStatus(({ state: word, info }) => {
	byId("pill").dataset.state = word;
	byId("pill-state").textContent = word;
	byId("pill-model").textContent = info?.names[0] ?? "";
});
for (const part of [chat, many, live, state]) part.start();
addEventListener("hashchange", () => (turn(), shown() === "chat" ? scroll.toEnd() : scrollTo(0, 0)));
document.addEventListener("visibilitychange", watch);
document.querySelector(".skip").addEventListener("click", (event) => (event.preventDefault(), byId("main").focus())); // the hash names the part
turn();
refresh();
