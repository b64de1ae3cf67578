// The list of kept conversations: open, rename, delete, export and import them.

import { button, byId, composing, element, plural, toast } from "./dom.js";
import { isKept } from "./storage.js";
import * as store from "./store.js";

const latest = (conversation) => store.load(conversation.id) ?? conversation; // with what was answered meanwhile

export class ConversationList {
	// `open` is called with a conversation to show, or with none for a new one; `renamed` with one that has a new title.
	constructor(open, renamed) {
		this.open = open;
		this.renamed = renamed;
		if (!isKept) byId("kept-where").textContent = "This browser forbids storage: conversations end with this page.";
		byId("export-all").addEventListener("click", () => download(store.all()));
		byId("import").addEventListener("click", () => byId("import-file").click());
		byId("import-file").addEventListener("change", (event) => this.read(event.target));
	}

	draw(current) {
		if (byId("conversations").querySelector("input")) return; // a name is being written
		const kept = store.all();
		byId("conversations").replaceChildren(...kept.map((each) => this.item(each, each.id === current.id)));
		byId("export-all").disabled = !kept.length;
	}

	item(conversation, current) {
		const name = button(conversation.title || "Untitled", () => this.open(latest(conversation)));
		name.classList.add("name");
		name.dir = "auto";
		if (!current) return element("li", {}, name);
		name.setAttribute("aria-current", "true");
		return element("li", {}, name, this.actions(conversation, name));
	}

	actions(conversation, name) {
		return element("p.foot", {},
			button("Rename", () => name.replaceWith(this.field(conversation, name))),
			button("Export", () => download([latest(conversation)])),
			button("Delete", () => this.remove(latest(conversation))),
		);
	}

	// In the name's place until Enter, Escape, or a click elsewhere, by which the list is not drawn anew: a click on what
	// is replaced between pressing and releasing would be lost.
	field(conversation, name) {
		const field = element("input", { "aria-label": "Name", value: latest(conversation).title });
		const end = (kept) => {
			field.onblur = null;
			const title = field.value.trim();
			if (kept && title) {
				const found = Object.assign(latest(conversation), { title });
				store.save(found);
				this.renamed(found);
				name.textContent = title;
			}
			field.replaceWith(name);
		};
		field.onkeydown = (event) => {
			if (composing(event) || !["Enter", "Escape"].includes(event.key)) return;
			event.stopPropagation(); // Escape stops an answer elsewhere
			event.preventDefault(); // else Enter also presses what has the focus next
			end(event.key === "Enter");
			document.dispatchEvent(new Event("kept"));
			byId("conversations").querySelector("[aria-current]").focus();
		};
		field.onblur = () => end(true);
		setTimeout(() => field.select());
		return field;
	}

	remove(conversation) {
		if (!confirm(`Delete “${conversation.title}”?`)) return;
		store.remove(conversation.id);
		this.open();
	}

	async read(chooser) {
		try {
			toast(`${plural(store.take(await chooser.files[0].text()), "conversation")} imported`);
		} catch (error) {
			alert(error.message);
		}
		chooser.value = ""; // so that the same file can be chosen again
		document.dispatchEvent(new Event("kept"));
	}
}

function download(conversations) {
	const url = URL.createObjectURL(new Blob([store.exported(conversations)], { type: "application/json" }));
	element("a", { href: url, download: "conversations.json" }).click();
	setTimeout(() => URL.revokeObjectURL(url), 1000);
}
