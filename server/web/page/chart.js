// A chart over time by uPlot: title, the latest values or those under the pointer, and a line or an area for each series.

import { element, plural } from "./dom.js";

const { uPlot } = globalThis;

const COLUMNS = 60; // each wide enough to be seen, however short what it shows was
const ROUND = [1, 1.5, 2, 3, 5, 7.5, 10];
const COLOURS = ["--main", "--second"];

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);

export class Chart {
	// Each of `series`: { name, value: (tick) => number or null, of: (values of a column) => number, fill }.
	// `least` is the least that the top of the scale stands for.
	constructor({ title, unit, least, format, series, empty, optional = false }) {
		Object.assign(this, { title, unit, least, format, series, optional });
		this.values = element("p.values");
		this.empty = element("p.empty", {}, empty);
		this.area = element("div.plot", { role: "img" });
		this.card = element("figure.chart", {}, element("figcaption", {}, title), this.values, this.area, this.empty);
	}

	// `ticks` end at their `at`; the chart shows those of the `span` seconds before `now`. An optional one shows itself
	// once it has something to show.
	draw(ticks, now, span) {
		this.span = span;
		this.data = columns(ticks, now, span, this.series);
		const all = this.data.slice(1).flat().filter((each) => each !== null);
		this.card.hidden = this.optional && !all.length && !this.plot;
		this.empty.hidden = all.length > 0;
		if (this.card.hidden || !this.card.clientWidth) return;
		this.highest = ceiling(Math.max(this.least, ...all));
		this.plot ??= this.made();
		this.plot.setData(this.data);
		this.area.setAttribute("aria-label", this.inWords(all));
		this.tell();
	}

	made() {
		const plot = new uPlot(this.options(), this.data, this.area);
		new ResizeObserver(() => this.area.clientWidth && plot.setSize({ width: this.area.clientWidth, height: this.area.clientHeight })).observe(this.area);
		matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plot.redraw());
		return plot;
	}

	options() {
		const axis = { stroke: () => colour("--soft"), grid: { stroke: () => colour("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui" };
		return {
			width: this.area.clientWidth,
			height: this.area.clientHeight,
			padding: [8, 12, 0, 0],
			legend: { show: false },
			cursor: { y: false, drag: { x: false, y: false }, sync: { key: "live" }, points: { show: false } },
			scales: { x: { time: false, range: () => [-this.span, 0] }, y: { range: () => [0, this.highest] } },
			axes: [
				{ ...axis, size: 24, splits: () => [-this.span, -this.span / 2, 0], values: (_, all) => all.map(ago) },
				{ ...axis, size: 52, splits: () => [0, this.highest / 2, this.highest], values: (_, [low, , high]) => [this.format(low), "", this.format(high)] },
			],
			series: [{}, ...this.series.map(drawn)],
			hooks: { setCursor: [() => this.tell()] },
		};
	}

	// The values under the pointer, or the latest.
	tell() {
		const at = this.plot.cursor.idx ?? null;
		const shown = this.series.map(({ name }, place) => {
			const values = this.data[place + 1];
			const found = at === null ? values.findLast((each) => each !== null) : values[at];
			const number = element("b", {}, found == null ? "–" : this.format(found));
			return element("span", { class: `value s${place}` }, number, ` ${name}`);
		});
		const when = at === null ? "" : ago(this.data[0][at]);
		this.values.replaceChildren(...shown, element("span.soft", {}, [this.unit, when].filter(Boolean).join(", ")));
	}

	inWords(all) {
		const over = `${this.title} over ${plural(this.span / 60, "minute")}`;
		if (!all.length) return `${over}: nothing yet`;
		const now = this.series.map(({ name }, place) => {
			const latest = this.data[place + 1].findLast((each) => each !== null) ?? 0;
			return `${name} ${this.format(latest)}`.trim();
		});
		return `${over}: now ${now.join(", ")}; highest ${this.format(Math.max(...all))} ${this.unit}`.trim();
	}
}

function drawn({ name, fill }, place) {
	const stroke = () => colour(COLOURS[place]);
	return {
		label: name,
		stroke,
		width: 1.75,
		paths: uPlot.paths.stepped({ align: -1 }),
		points: { show: false },
		...(fill ? { fill: () => `${colour(COLOURS[place])}2e` } : {}),
	};
}

// Times before `now`, and for each series the values of the ticks of each column; null where there are none.
function columns(ticks, now, span, series) {
	const width = span / COLUMNS;
	const last = Math.ceil(now / width);
	const groups = Map.groupBy(ticks.filter(({ at }) => at > now - span), ({ at }) => Math.ceil(at / width));
	const places = Array.from({ length: COLUMNS + 1 }, (_, back) => last - COLUMNS + back);
	const all = series.map(({ value, of }) =>
		places.map((place) => {
			const values = (groups.get(place) ?? []).map(value).filter((each) => each !== null);
			return values.length ? of(values) : null;
		}),
	);
	return [places.map((place) => (place - last) * width), ...all];
}

function ago(seconds) {
	if (seconds > -0.5) return "now";
	return seconds <= -120 ? `${Math.round(-seconds / 6) / 10} min ago` : `${Math.round(-seconds)} s ago`;
}

// The next round number.
function ceiling(value) {
	const power = 10 ** Math.floor(Math.log10(value));
	return power * ROUND.find((each) => each * power >= value * 0.999);
}
