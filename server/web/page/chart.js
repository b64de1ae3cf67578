// A small chart over time: title, latest values with their unit, an area, a line or bars for each series.

import { element, svg } from "./dom.js";

const WIDTH = 600;
const HEIGHT = 120;
const ROUND = [1, 1.5, 2, 3, 5, 7.5, 10];

export class Chart {
	// Each of `series`: { name, value: (tick) => number or null, shape: "area" | "line" | "bars" }, drawn in this order.
	constructor(title, unit, least, format, ...series) {
		Object.assign(this, { title, unit, least, format, series });
		this.values = element("p.values");
		this.plot = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
		this.top = element("span.top");
		this.from = element("span");
		this.card = element("figure.chart", {},
			element("figcaption", {}, title),
			this.values,
			element("div.plot", {}, this.top, this.plot),
			element("p.ends", { "aria-hidden": "true" }, this.from, element("span", {}, "now")),
		);
		this.plot.addEventListener("pointermove", (event) => this.point(event));
		this.plot.addEventListener("pointerleave", () => this.point(null));
	}

	// `ticks` end at their `at`; the chart shows those of the `span` seconds before `now`.
	draw(ticks, now, span) {
		this.ticks = ticks.filter((tick) => tick.at > now - span);
		this.x = (at) => WIDTH * (1 - (now - at) / span);
		const all = this.series.flatMap(({ value }) => this.ticks.map(value)).filter((each) => each !== null);
		this.highest = ceiling(Math.max(this.least, ...all));
		this.plot.replaceChildren(...this.series.flatMap((each, place) => this.shape(each, place)));
		this.top.textContent = this.format(this.highest);
		this.from.textContent = `${span / 60} min ago`;
		this.plot.setAttribute("aria-label", this.inWords(all));
		this.tell();
	}

	y(value) {
		return HEIGHT - (value / this.highest) * (HEIGHT - 4);
	}

	shape({ value, shape }, place) {
		const points = this.ticks.map((tick) => [this.x(tick.at), value(tick)]);
		if (shape === "bars") return points.filter(([, each]) => each).map(([x, each]) => this.bar(x, each, place));
		const found = [];
		for (const piece of pieces(points)) {
			const line = piece.map(([x, each]) => `${x.toFixed(1)},${this.y(each).toFixed(1)}`).join(" ");
			const corners = `${piece[0][0].toFixed(1)},${HEIGHT} ${line} ${piece.at(-1)[0].toFixed(1)},${HEIGHT}`;
			if (shape === "area") found.push(svg("polygon", { class: `fill s${place}`, points: corners }));
			found.push(svg("polyline", { class: `line s${place}`, points: line }));
		}
		return found;
	}

	bar(x, value, place) {
		const width = Math.max(2, this.x(1) - this.x(0.6));
		return svg("rect", { x: x - width, y: this.y(value), width, height: HEIGHT - this.y(value) });
	}

	point(event) {
		this.pointed = event && (event.offsetX / this.plot.clientWidth) * WIDTH;
		this.tell();
	}

	// The values at the pointer, or the latest.
	tell() {
		const tick = this.pointed == null ? null : this.ticks.find(({ at }) => this.x(at) >= this.pointed);
		const shown = this.series.map(({ name, value }, place) => {
			const found = tick ? value(tick) : this.latest(value);
			const number = element("b", {}, found == null ? "–" : this.format(found));
			return element("span", { class: `value s${place}` }, number, ` ${name}`);
		});
		this.values.replaceChildren(...shown, element("span.soft", {}, this.when(tick)));
	}

	latest(value) {
		const tick = this.ticks.findLast((each) => value(each) !== null);
		return tick && value(tick);
	}

	when(tick) {
		return tick ? `${this.unit} ${Math.round(this.ticks.at(-1).at - tick.at)} s ago` : this.unit;
	}

	inWords(all) {
		if (!all.length) return `${this.title}: nothing yet`;
		const now = this.series.map(({ name, value }) => `${name} ${this.format(this.latest(value) ?? 0)}`).join(", ");
		return `${this.title} in ${this.unit}: now ${now}; highest ${this.format(Math.max(...all))}`;
	}
}

function pieces(points) {
	const found = [[]];
	for (const point of points) {
		if (point[1] === null) found.push([]);
		else found.at(-1).push(point);
	}
	return found.filter((piece) => piece.length);
}

// The next round number.
export function ceiling(value) {
	const power = 10 ** Math.floor(Math.log10(value));
	return power * ROUND.find((each) => each * power >= value * 0.999);
}
