// Lanes of time, one a question: waiting, its prompt being read, its answer being written, and where batches begin.

import { element } from "./dom.js";

const STEPS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300];

export function drawLanes(target, rows, begun, end) {
	const whole = Math.max(end - begun, 0.05) * 1.02;
	const at = (moment) => `${Math.min(100, Math.max(0, ((moment - begun) / whole) * 100))}%`;
	target.replaceChildren(
		heads(rows, at),
		...rows.map((row) => lane(row, end, at)),
		axis(whole, (moment) => at(begun + moment)),
	);
	unite([...target.querySelectorAll(".mark")]);
}

function lane(row, end, at) {
	const track = element("div.track");
	const bar = (kind, from, to) => {
		if (from === null || from > to) return;
		const made = element("i", { class: kind });
		made.style.left = at(from);
		made.style.right = `calc(100% - ${at(to)})`;
		track.append(made);
	};
	const over = row.ended ?? end;
	bar("wait", row.queued, row.started ?? row.first ?? over);
	bar("read", row.started, row.first ?? over);
	bar("write", row.first, over);
	return element("div.lane", {}, who(`${row.place + 1}.`, row.question), track);
}

function who(number, question) {
	return element("span.who", {}, number, element("span", {}, ` ${question}`));
}

// A mark where each batch begins and where rows join it, with how many of these rows do.
function heads(rows, at) {
	const track = element("div.track");
	const groups = Map.groupBy(rows.filter((row) => row.batch).sort((a, b) => a.at - b.at), (row) => row.at);
	let batch;
	for (const group of groups.values()) {
		const [first] = group;
		const joins = first.batch === batch;
		const mark = element("span.mark", {}, joins ? `+${group.length}` : `batch ${first.batch}: ${group.length}`);
		mark.joined = joins ? group.length : 0;
		mark.style.left = at(first.started);
		track.append(mark);
		batch = first.batch;
	}
	return element("div", { class: "lane heads" }, element("span.who"), track);
}

// Rows that join where the label before still stands are counted there; a line stays where they join.
function unite([label, ...marks]) {
	for (const mark of marks) {
		if (!mark.joined || mark.offsetLeft > label.offsetLeft + label.offsetWidth) label = mark;
		else {
			label.textContent = `${label.textContent.replace(/ ?\+\d+$/, "")} +${(label.joined += mark.joined)}`.trim();
			mark.textContent = "";
		}
	}
}

function axis(whole, at) {
	const track = element("div.track");
	const step = STEPS.find((each) => whole / each <= 6) ?? 600;
	for (let moment = 0; moment < whole * 0.95; moment += step) {
		const mark = element("span.tick", {}, step < 1 ? `${moment.toFixed(step < 0.1 ? 2 : 1)} s` : `${moment} s`);
		mark.style.left = at(moment);
		track.append(mark);
	}
	return element("div", { class: "lane axis" }, element("span.who"), track);
}
