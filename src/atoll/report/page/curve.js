// Curves with values under the pointer, zoom, a logarithmic scale and smoothing. uPlot draws them.

import { element, number, count, bytes, duration, visible } from "./text.js";

export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
}

// A running mean with half the weight on the last `span` points. Smoothing is off at 0.
function smoothed(values, span) {
  if (!span) return values;
  const keep = Math.pow(0.5, 1 / span);
  let mean = null;
  return values.map((v) => {
    if (v === null || v === undefined) return v;
    mean = mean === null ? v : keep * mean + (1 - keep) * v;
    return mean;
  });
}

// Lines with their own x as uPlot's aligned columns.
function aligned(lines) {
  const all = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  const at = new Map(all.map((x, i) => [x, i]));
  return [all, ...lines.map((line) => {
    const y = new Array(all.length).fill(undefined);
    line.x.forEach((x, i) => { y[at.get(x)] = line.y[i]; });
    return y;
  })];
}

const X_FORMS = { round: count, bytes, seconds: duration, clock: duration };

// lines: [{name, x, y, colour, dashed}], rules: [{name, value, colour}]
export class Curve {
  constructor(title, options) {
    this.title = title;
    this.form = options.form || number;
    this.x = options.x || "round";
    this.log = options.log || false;
    this.span = 0;
    this.lines = [];
    this.rules = [];
    this.plot = null;
    this.key = "";
    this.box = element("div", { class: "plot" });
    this.values = element("p", { class: "values", "aria-live": "off" });
    this.node = element("figure", { class: "curve" },
      element("figcaption", {}, element("b", {}, title), options.controls === false ? null : this.controls()),
      this.box, this.values);
    this.box.tabIndex = 0;
    this.box.setAttribute("role", "img");
    this.box.addEventListener("keydown", (event) => this.move(event));
    this.watcher = new ResizeObserver(() => this.resize());
    this.watcher.observe(this.box);
  }

  controls() {
    const smooth = element("input", { type: "range", min: 0, max: 50, value: 0, "aria-label": "smoothing of " + this.title,
      on: { input: () => { this.span = Number(smooth.value); this.rebuild(); } } });
    this.logBox = element("input", { type: "checkbox", on: { change: () => { this.log = this.logBox.checked; this.rebuild(); } } });
    this.logBox.checked = this.log;
    return element("span", { class: "controls" },
      element("label", {}, this.logBox, " log"),
      element("label", {}, "smooth ", smooth),
      element("button", { type: "button", on: { click: () => this.plot && this.plot.setData(this.plot.data, true) } }, "reset zoom"));
  }

  set(lines, rules) {
    this.lines = lines;
    this.rules = rules || [];
    const key = JSON.stringify([lines.map((l) => [l.name, l.colour]), this.rules]);
    if (this.plot && key === this.key) {
      const zoomed = this.plot.scales.x.min > this.plot.data[0][0] || this.plot.scales.x.max < this.plot.data[0][this.plot.data[0].length - 1];
      this.plot.setData(this.data(), !zoomed);
      this.show(null);
    } else {
      this.key = key;
      this.rebuild();
    }
    const ends = lines.map((line) => line.name + " " + this.form(last(line.y)));
    this.box.setAttribute("aria-label", visible(this.title + ": " + ends.join(", ") + ". Arrow keys show the values, + and - zoom, Shift with an arrow key moves."));
  }

  data() {
    const [x, ...columns] = aligned(this.lines);
    const positive = (v) => (this.log && v !== null && v <= 0 ? null : v);
    const rules = this.rules.map((rule) => x.map(() => positive(rule.value)));
    return [x, ...columns.map((y) => smoothed(y.map(positive), this.span)), ...rules];
  }

  rebuild() {
    if (this.plot) this.plot.destroy();
    this.box.replaceChildren();
    this.plot = null;
    const width = this.box.clientWidth;
    if (!width || !this.lines.some((line) => line.x.length)) return;
    const few = (line) => line.x.length <= 40;
    const series = this.lines.map((line) => ({
      label: line.name, stroke: () => colour(line.colour), width: 1.6, dash: line.dashed ? [5, 3] : undefined,
      points: { show: few(line), size: 5 }, spanGaps: true,
    }));
    const rules = this.rules.map((rule) => ({
      label: rule.name, stroke: () => colour(rule.colour), width: 1.2, dash: [5, 3], points: { show: false },
    }));
    const axis = { stroke: () => colour("soft"), grid: { stroke: () => colour("line"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    const form = X_FORMS[this.x] || number;
    this.plot = new uPlot({
      width, height: 210, legend: { show: false }, padding: [8, 10, 0, 0],
      cursor: { drag: { x: true, y: false }, points: { size: 7 }, bind: { mousedown: (_, target, usual) => (event) => {
        if (event.button === 0 && event.target === target) (event.shiftKey ? this.pan(event) : usual(event));
      } } },
      scales: { x: { time: false }, y: { distr: this.log ? 3 : 1 } },
      axes: [
        { ...axis, grid: { show: false }, size: 26, values: (_, ticks) => ticks.map((v) => (this.x === "round" && v % 1 ? "" : form(v))) },
        { ...axis, grid: { ...axis.grid, filter: (_, ticks) => (this.log && ticks.length > 40 ? ticks.map(decade) : ticks) }, size: 58, values: (_, ticks) => ticks.map((v) => (v === null ? "" : short(v, this.form))) },
      ],
      series: [{}, ...series, ...rules],
      hooks: { setCursor: [(plot) => this.show(plot.cursor.idx)] },
    }, this.data(), this.box);
    this.show(null);
  }

  // The values at the pointer, or the last ones.
  show(at) {
    if (!this.plot) return;
    const [x, ...columns] = this.plot.data;
    const index = at === null || at === undefined ? x.length - 1 : at;
    const form = X_FORMS[this.x] || number;
    const named = [...this.lines, ...this.rules];
    const parts = columns.map((y, i) => {
      let place = index;
      while (place > 0 && (y[place] === undefined || y[place] === null)) place -= 1;
      return element("span", {}, element("i", { class: "key k-" + named[i].colour + (i >= this.lines.length ? " dashed" : "") }),
        named[i].name + " ", element("b", {}, this.form(y[place] === undefined ? null : y[place])));
    });
    this.values.replaceChildren(element("span", { class: "quiet" }, this.x + " " + form(x[index])), ...parts);
  }

  // Show the rounds from `low` on, `wide` of them, inside of the data.
  range(low, wide) {
    const x = this.plot.data[0], first = x[0], end = x[x.length - 1];
    const min = Math.max(first, Math.min(low, end - wide));
    this.plot.setScale("x", { min, max: Math.min(end, min + wide) });
  }

  // Shift and a drag move the zoomed range.
  pan(event) {
    const { min, max } = this.plot.scales.x, from = event.clientX, pixels = this.plot.over.clientWidth;
    const go = (now) => this.range(min - (now.clientX - from) / pixels * (max - min), max - min);
    const done = () => { removeEventListener("mousemove", go); removeEventListener("mouseup", done); };
    addEventListener("mousemove", go);
    addEventListener("mouseup", done);
    event.preventDefault();
  }

  move(event) {
    const keys = ["ArrowLeft", "ArrowRight", "Home", "End", "+", "-"];
    if (!this.plot || event.ctrlKey || event.altKey || event.metaKey || !keys.includes(event.key)) return;
    event.preventDefault();
    const x = this.plot.data[0], { min, max } = this.plot.scales.x;
    if (event.key === "+" || event.key === "-") {
      const wide = (max - min) * (event.key === "+" ? 0.5 : 2), middle = this.at === undefined ? (min + max) / 2 : x[this.at];
      this.range(middle - wide / 2, wide);
      return;
    }
    if (event.shiftKey && event.key.startsWith("Arrow")) {
      this.range(min + (event.key === "ArrowLeft" ? -0.1 : 0.1) * (max - min), max - min);
      return;
    }
    const now = this.at === undefined ? x.length - 1 : this.at;
    const step = Math.max(1, Math.round(x.length / 100));
    this.at = { ArrowLeft: now - step, ArrowRight: now + step, Home: 0, End: x.length - 1 }[event.key];
    this.at = Math.min(x.length - 1, Math.max(0, this.at));
    this.plot.setCursor({ left: this.plot.valToPos(x[this.at], "x"), top: 20 });
    this.show(this.at);
  }

  resize() {
    const width = this.box.clientWidth;
    if (this.plot && width) this.plot.setSize({ width, height: 210 });
    else if (!this.plot) this.rebuild();
  }

  recolour() { if (this.plot) this.plot.redraw(false); }
}

// A tick that is a power of ten; null for another one.
function decade(tick) {
  return Number.isInteger(Number(Math.log10(tick).toFixed(9))) ? tick : null;
}

function short(value, form) {
  if (form === count && value % 1) return "";
  if (form === bytes || form === duration || form === count) return form(value);
  return value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5) ? value.toExponential(0) : String(Number(value.toPrecision(4)));
}

export function last(values) {
  for (let i = values.length - 1; i >= 0; i -= 1) if (values[i] !== null && values[i] !== undefined) return values[i];
  return null;
}

// A small line without axes. Its range is that of all small lines, if one is given.
export function spark(x, y, width, height, range) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 " + width + " " + height);
  svg.setAttribute("class", "spark");
  svg.setAttribute("aria-hidden", "true");
  const good = y.filter((v) => v !== null && v !== undefined);
  if (good.length > 1) {
    const [low, high] = range || [Math.min(...good), Math.max(...good)];
    const path = document.createElementNS(space, "path");
    const wide = x[x.length - 1] - x[0] || 1;
    let d = "", pen = false;
    y.forEach((v, i) => {
      if (v === null || v === undefined) return;
      const px = 2 + (width - 4) * (x[i] - x[0]) / wide, py = height - 2 - (height - 4) * (v - low) / (high - low || 1);
      d += (pen ? "L" : "M") + px.toFixed(1) + " " + py.toFixed(1);
      pen = true;
    });
    path.setAttribute("d", d);
    svg.append(path);
  }
  return svg;
}
