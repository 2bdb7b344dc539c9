// A line or bar chart over rounds, in plain SVG: axes, labels, and the values under the pointer.

import { h, s } from "./dom.js";

const HEIGHT = 194;
const MARGIN = { top: 12, right: 12, bottom: 34, left: 44 };

/** Round numbers that cover low..high in about `count` steps. */
export function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((candidate) => candidate >= raw * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-6; i += 1) {
    found.push(Number((i * step).toPrecision(12)));
  }
  return found;
}

/** Where the values lie, with some room; bars start at zero. */
function range(values, fromZero) {
  if (!values.length) return [0, 1];
  const [low, high] = [fromZero ? 0 : Math.min(...values), Math.max(...values)];
  const room = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
  return [fromZero ? 0 : low - room, high + room];
}

export class Chart {
  /** `format` writes a value; `bars` draws bars instead of lines. */
  constructor(title, unit, format, bars = false) {
    Object.assign(this, { title, unit, format, bars, series: [], rounds: [], chosen: null, width: 0 });
    this.svg = s("svg", { class: "plot", height: HEIGHT, role: "img", tabindex: "0" });
    this.tip = h("div", { class: "tip", hidden: true, role: "status" });
    this.legend = h("ul", { class: "legend" });
    this.element = h("figure", { class: "chart" }, h("figcaption", {}, h("span", {}, title), this.legend), this.svg, this.tip);
    this.svg.addEventListener("pointermove", (event) => this.choose(this.nearest(event)));
    this.svg.addEventListener("pointerleave", () => this.choose(null));
    this.svg.addEventListener("blur", () => this.choose(null));
    this.svg.addEventListener("keydown", (event) => this.step(event));
    new ResizeObserver(([entry]) => this.resize(entry.contentRect.width)).observe(this.element);
  }

  resize(width) {
    if (width === this.width || width < 80) return;
    this.width = width;
    this.draw();
  }

  /** series: [{name, points: [[round, value], ...]}], the most important first. */
  show(series) {
    this.series = series.filter((one) => one.points.length);
    this.rounds = [...new Set(this.series.flatMap((one) => one.points.map(([round]) => round)))].sort((a, b) => a - b);
    this.draw();
  }

  scales() {
    const half = this.bars ? 0.5 : 0;
    const [first, last] = this.rounds.length ? [this.rounds[0], this.rounds.at(-1)] : [0, 1];
    const span = last - first + 2 * half || 1;
    const [low, high] = range(this.series.flatMap((one) => one.points.map(([, value]) => value)), this.bars);
    const [wide, tall] = [this.width - MARGIN.left - MARGIN.right, HEIGHT - MARGIN.top - MARGIN.bottom];
    return {
      first, last, low, high, wide,
      x: (round) => MARGIN.left + ((round - first + half) / span) * wide,
      y: (value) => MARGIN.top + (1 - (value - low) / (high - low)) * tall,
      round: (x) => first - half + ((x - MARGIN.left) / wide) * span,
    };
  }

  draw() {
    if (!this.width) return;
    this.svg.setAttribute("width", this.width);
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    this.svg.setAttribute("aria-label", this.summary());
    if (!this.series.length) {
      this.svg.replaceChildren(s("text", { class: "tick", x: 8, y: HEIGHT / 2 }, "nothing yet"));
      return;
    }
    const scale = this.scales();
    const marks = this.series.map((one, i) => (this.bars ? this.drawBars(one, scale) : this.drawLine(one, i, scale)));
    this.cursor = s("g", { class: "cursor" });
    this.svg.replaceChildren(...this.axes(scale), ...marks.reverse(), this.cursor);
    const names = this.series.map((one, i) => h("li", { class: `s${i}` }, one.name));
    this.legend.replaceChildren(...(names.length > 1 ? names : []));
    if (this.chosen !== null) this.choose(this.chosen);
  }

  axes(scale) {
    const bottom = HEIGHT - MARGIN.bottom;
    const right = this.width - MARGIN.right;
    const across = ticks(scale.low, scale.high, 4).flatMap((value) => [
      s("line", { class: "grid", x1: MARGIN.left, x2: right, y1: scale.y(value), y2: scale.y(value) }),
      s("text", { class: "tick", x: MARGIN.left - 6, y: scale.y(value) + 4, "text-anchor": "end" }, String(value)),
    ]);
    const wanted = Math.max(1, Math.min(scale.last - scale.first, Math.floor(scale.wide / 36)));
    const along = ticks(scale.first, scale.last, wanted).filter(Number.isInteger).map((round) =>
      s("text", { class: "tick", x: scale.x(round), y: bottom + 16, "text-anchor": "middle" }, round));
    const label = s("text", { class: "tick", x: right, y: HEIGHT - 3, "text-anchor": "end" }, "round");
    const unit = s("text", { class: "tick", x: 2, y: HEIGHT - 3 }, this.unit);
    return [...across, ...along, label, unit, s("line", { class: "axis", x1: MARGIN.left, x2: right, y1: bottom, y2: bottom })];
  }

  drawLine(one, i, { x, y }) {
    const path = one.points.map(([round, value], n) => `${n ? "L" : "M"}${x(round).toFixed(1)} ${y(value).toFixed(1)}`);
    const dots = one.points.length > 60 ? [] : one.points.map(([round, value]) =>
      s("circle", { cx: x(round), cy: y(value), r: i ? 1.8 : 2.8 }));
    return s("g", { class: `line s${i}` }, s("path", { d: path.join("") }), ...dots);
  }

  drawBars(one, { x, y, wide }) {
    const width = Math.max(1, Math.min(26, (wide / Math.max(1, this.rounds.length)) * 0.66));
    return s("g", { class: "bars s0" }, ...one.points.map(([round, value]) =>
      s("rect", { x: x(round) - width / 2, y: y(value), width, height: Math.max(0, y(0) - y(value)), rx: 2 })));
  }

  nearest(event) {
    if (!this.rounds.length) return null;
    const at = this.scales().round(event.clientX - this.svg.getBoundingClientRect().left);
    return this.rounds.reduce((best, round) => (Math.abs(round - at) < Math.abs(best - at) ? round : best));
  }

  step(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || !this.rounds.length) return;
    event.preventDefault();
    const from = this.chosen === null ? (by > 0 ? -1 : this.rounds.length) : this.rounds.indexOf(this.chosen);
    this.choose(this.rounds[Math.max(0, Math.min(this.rounds.length - 1, from + by))]);
  }

  /** Shows the values of one round, or none. */
  choose(round) {
    this.chosen = round;
    this.tip.hidden = round === null;
    this.cursor?.replaceChildren();
    if (round === null || !this.cursor) return;
    const { x, y } = this.scales();
    const at = this.series.flatMap((one, i) => one.points.filter(([r]) => r === round).map(([, value]) => [one.name, value, i]));
    this.cursor.append(s("line", { x1: x(round), x2: x(round), y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }),
      ...(this.bars ? [] : at.map(([, value, i]) => s("circle", { class: `s${i}`, cx: x(round), cy: y(value), r: 4 }))));
    const rows = at.map(([name, value, i]) => h("div", { class: `s${i}` }, h("span", {}, name), h("b", {}, this.format(value))));
    this.tip.replaceChildren(h("strong", {}, round ? `round ${round}` : "round 0 (zero-shot)"), ...rows);
    const left = x(round) > this.width / 2;
    this.tip.style.left = left ? "auto" : `${x(round) + 12}px`;
    this.tip.style.right = left ? `${this.width - x(round) + 12}px` : "auto";
  }

  summary() {
    const [main] = this.series;
    if (!main) return `${this.title}: nothing yet`;
    const [first, last] = [main.points[0], main.points.at(-1)];
    return `${this.title} per round: ${this.format(first[1])} in round ${first[0]}, ${this.format(last[1])} in round ${last[0]}. Arrow keys read the values.`;
  }
}
