// One run: state, answer, curves, clients, waiting times, failures, formula, notes, files, and the next lines.

import { element, number, count, bytes, duration, whenIdle, FORMS } from "./text.js";
import { Curve, last, spark } from "./curve.js";
import { textTable, sortedTable } from "./table.js";

const ABOVE = 4; // curves that are drawn at once
const COUNTS = { bytes_up: bytes, bytes_down: bytes, seconds: duration, clock: duration, cohort: count, arrived: count, failed: count, late: count, flying: count, versions: count };
const RULES = { pooled: ["pooled", "s2"], local: ["local only", "s3"], constant: ["constant", "s7"], constant_clients: ["constant by client", "s4"] };

export function tile(name, value, detail) {
  return element("div", {}, element("dt", {}, name), element("dd", {}, value), detail ? element("dd", { class: "quiet" }, detail) : null);
}

export function time(text) {
  return element("time", { datetime: text }, text.replace("T", " "));
}

// The smallest and the largest value; of no value Infinity and -Infinity.
function ends(values) {
  return values.reduce(([low, high], v) => (v === null || v === undefined ? [low, high] : [Math.min(low, v), Math.max(high, v)]), [Infinity, -Infinity]);
}

export class RunView {
  constructor(data, files) {
    this.files = files;
    this.curves = new Map();
    this.sort = {};
    this.rows = [];
    this.node = element("div", { class: "run" });
    this.load(data);
  }

  // Replace everything by the data of the run.
  load(data) {
    this.data = data;
    this.started = null;
    this.next = this.counted = data.rounds || 0; // the round after the last one that is shown, and that the sums contain
    this.drawn = {};
    const metrics = data.columns || [];
    this.series = {};
    for (const name of metrics) {
      const [x, y] = data.curves[name] || [[], []];
      this.series[name] = { x: [...x], y: [...y] };
    }
    this.head = element("header", {});
    this.state = element("dl", { class: "tiles", "aria-label": "state" });
    this.answer = element("section", {});
    this.gallery = element("div", { class: "gallery" });
    this.clients = element("section", {});
    this.rest = element("div", {});
    this.node.replaceChildren(this.head, this.state, this.answer,
      element("section", {}, element("h2", {}, "Curves"), this.gallery), this.clients, this.rest);
    this.curves.clear();
    this.draw();
  }

  draw() {
    const d = this.data;
    this.drawHead();
    this.drawState();
    this.drawCurves();
    // A part whose data are equal stays, with its selection, its open details and its place of scrolling.
    this.changed("answer", [d.answers, d.findings, d.confusion], () => this.drawAnswer());
    this.changed("clients", d.clients, () => this.drawClients());
    this.changed("rest", [d.waiting, d.failures, d.formula, d.notes, d.files, d.config, d.settings, d.lines], () => this.drawRest());
  }

  changed(part, data, draw) {
    const key = JSON.stringify(data) || "";
    if (this.drawn[part] === key) return;
    this.drawn[part] = key;
    const places = [...this.node.querySelectorAll(".scroll")].map((each) => [each.getAttribute("aria-label"), each.scrollLeft, each.scrollTop]);
    draw();
    for (const each of this.node.querySelectorAll(".scroll")) {
      const place = places.find(([label]) => label === each.getAttribute("aria-label"));
      if (place) { each.scrollLeft = place[1]; each.scrollTop = place[2]; }
    }
  }

  // Add a row of metrics.jsonl; a round that is there is replaced.
  add(row) {
    for (const [name, value] of Object.entries(row)) {
      if (name === "round" || name === "fingerprint" || (typeof value !== "number" && value !== null)) continue;
      const line = this.series[name] || (this.series[name] = { x: [], y: [] });
      if (line.x.length && line.x[line.x.length - 1] >= row.round) continue;
      line.x.push(row.round);
      line.y.push(value);
      if (!this.data.columns) this.data.columns = [];
      if (!this.data.columns.includes(name)) this.data.columns.push(name);
    }
    this.next = row.round + 1;
    this.data.rounds = this.next;
    this.sum(row);
    this.note(row.round);
  }

  // Add a row to the sums, unless they contain it.
  sum(row) {
    if (row.round < this.counted) return;
    this.counted = row.round + 1;
    const sums = this.data.sums || (this.data.sums = {});
    for (const name of ["bytes_up", "bytes_down", "seconds", "late"]) sums[name] = (sums[name] || 0) + (row[name] || 0);
    if (row.failed) sums.lost = (sums.lost || 0) + row.failed;
    sums.active = row.arrived; sums.selected = row.cohort;
    if (row.clock !== undefined) sums.clock = row.clock;
    if (typeof row.epsilon === "number") this.data.privacy = { ...this.data.privacy, epsilon: row.epsilon };
  }

  // Take everything that is no row from newer data of the run. `rows` are the streamed rows: the sums of the data may
  // lack the last of them.
  facts(data, rows) {
    this.data = { ...data, columns: [...new Set([...(data.columns || []), ...Object.keys(this.series)])] };
    this.counted = data.rounds || 0;
    for (const row of rows) this.sum(row);
    this.data.rounds = this.next;
    this.draw();
  }

  // Times of the last rounds, for the time that is left.
  note(round) {
    const now = performance.now();
    if (!this.started || round - this.started[1] > 50) this.started = [now, round];
    this.pace = round > this.started[1] ? (now - this.started[0]) / 1000 / (round - this.started[1]) : null;
  }

  refresh() { this.drawState(); this.drawCurves(); }

  drawHead() {
    const d = this.data;
    const what = [d.data, d.model, d.plan].filter(Boolean).join(" · ");
    this.head.replaceChildren(...[
      element("h1", {}, d.title || d.run, " ", element("span", { class: "pill " + d.status }, d.status)),
      d.banner ? element("p", { class: "banner", role: "alert" }, d.banner) : null,
      d.title ? element("p", { class: "quiet" }, d.run) : null,
      element("p", { class: "what" }, what),
      d.tags && d.tags.length ? element("p", { class: "tags" }, d.tags.map((t) => element("span", { class: "tag" }, t))) : null,
      d.began ? element("p", { class: "quiet" }, "began ", time(d.began), d.ended ? [", ended ", time(d.ended)] : null) : null,
      d.reason ? element("p", { class: "quiet reason" }, d.reason) : null,
      d.server && d.server.why && d.status === "running" ? element("p", { class: "reason" }, d.server.why) : null,
    ].filter(Boolean));
  }

  drawState() {
    const d = this.data, sums = d.sums || {};
    const rounds = d.rounds || 0;
    const tiles = [tile("rounds", count(rounds) + (d.total ? " of " + count(d.total) : ""), "")];
    if (d.status === "running" && d.total && this.pace) tiles.push(tile("time left", "about " + duration(this.pace * Math.max(0, d.total - rounds)), ""));
    tiles.push(tile("active clients", count(sums.active), sums.selected ? "of " + count(sums.selected) + " selected" : ""));
    const chief = d.best && d.best[d.chief];
    if (this.series[d.chief]) tiles.unshift(tile(this.label(d.chief), number(last(this.series[d.chief].y)), chief ? "best " + number(chief[0]) + " in round " + chief[1] : ""));
    tiles.push(tile("bytes up", bytes(sums.bytes_up), rounds ? bytes(sums.bytes_up / rounds) + " per round" : ""));
    tiles.push(tile("bytes down", bytes(sums.bytes_down), rounds ? bytes(sums.bytes_down / rounds) + " per round" : ""));
    tiles.push(tile("time in rounds", duration(sums.seconds), rounds ? duration(sums.seconds / rounds) + " per round" : ""));
    if (sums.clock !== null && sums.clock !== undefined) tiles.push(tile("simulated clock", duration(sums.clock), ""));
    if (d.privacy && d.privacy.epsilon !== undefined) tiles.push(tile("ε", number(d.privacy.epsilon), d.privacy.budget ? "of a budget of " + d.privacy.budget : ""));
    if (sums.lost) tiles.push(tile("lost contributions", count(sums.lost), ""));
    if (sums.late) tiles.push(tile("late contributions", count(sums.late), ""));
    if (d.server) tiles.push(tile("present clients", count(d.server.clients.filter((c) => c.stage !== "away").length), "of " + count(d.server.clients.length)));
    this.state.replaceChildren(...tiles);
  }

  label(name) { return (this.data.labels && this.data.labels[name]) || name.replaceAll("_", " "); }

  drawAnswer() {
    const d = this.data, tables = (d.answers || []).map((table) => textTable(table));
    this.answer.hidden = !tables.length && !(d.findings || []).length;
    this.answer.replaceChildren(element("h2", {}, "Answer"), ...tables, ...(d.findings || []).map((text) => element("p", {}, text)),
      ...(d.confusion ? [textTable(d.confusion)] : []));
  }

  // The charts: losses together, each metric, then costs that vary.
  charts() {
    const losses = ["held_out_loss", "loss"].filter((n) => this.series[n]);
    const d = this.data, found = losses.length ? [["loss", losses, number]] : [];
    const over = (n) => /_(clients|median|worst10|min|sd)$/.test(n);
    const names = (d.columns || []).filter((n) => !losses.includes(n) && !COUNTS[n] && this.varies(n));
    const chief = names.filter((n) => n === d.chief);
    for (const n of [...chief, ...names.filter((n) => n !== d.chief && !over(n))]) {
      found.push([this.label(n), [n, ...names.filter((m) => over(m) && m === n + "_clients")], number]);
    }
    for (const n of ["arrived", "failed", "late", "flying", "staleness", "seconds", "bytes_up"]) {
      if (this.series[n] && this.varies(n)) found.push([this.label(n), [n], COUNTS[n] || number]);
    }
    return found.slice(0, 24);
  }

  varies(name) {
    const y = this.series[name] ? this.series[name].y : [];
    return name === this.data.chief ? y.length > 0 : y.some((v) => v !== y[0]);
  }

  drawCurves() {
    const kept = [];
    for (const [title, names, form] of this.charts()) {
      let curve = this.curves.get(title);
      if (!curve) {
        const [low, high] = ends(names.flatMap((n) => this.series[n].y));
        const log = form === number && low > 0 && high > (title === "loss" ? 10 : 1000) * low;
        curve = new Curve(title, { form, log });
        this.curves.set(title, curve);
      }
      const rules = names.length === 1 && this.data.rules ? Object.entries(this.data.rules[names[0]] || {}) : [];
      kept.push([curve, () => curve.set(
        names.map((n, i) => ({ name: rules.length ? "federated" : this.label(n), x: this.series[n].x, y: this.series[n].y, colour: "s" + i })),
        rules.map(([kind, value]) => ({ name: RULES[kind][0], value, colour: RULES[kind][1] })))]);
    }
    const nodes = kept.map(([curve]) => curve.node);
    if (nodes.length !== this.gallery.children.length || nodes.some((n, i) => this.gallery.children[i] !== n)) this.gallery.replaceChildren(...nodes);
    kept.forEach(([curve, set], i) => { if (i < ABOVE || curve.plot) set(); else whenIdle(set); });
  }

  drawClients() {
    const table = this.data.clients || {}, names = table.names || [];
    this.clients.hidden = !names.length;
    if (!names.length) return;
    const omitted = table.omitted ? " " + count(table.omitted) + " more clients are not listed." : "";
    this.clients.replaceChildren(element("h2", {}, "Clients"), this.multiples(table),
      sortedTable("clients, with their last values." + omitted, "client", names, table.columns || [], this.sort));
  }

  // One small line for each client, all on one scale.
  multiples(table) {
    const node = element("div", {});
    for (const [name, curves] of Object.entries(table.curves || {}).slice(0, 1)) {
      const [low, high] = ends(curves.y.flat());
      if (low > high) continue;
      const column = (table.columns || []).find((c) => c.name === name);
      const log = low > 0 && high > 1000 * low, at = (v) => (log && v !== null && v !== undefined ? Math.log10(v) : v);
      const title = (column ? column.label : name) + ", by client, all from " + number(low) + " to " + number(high);
      node.append(element("h3", {}, title + (log ? ", on a logarithmic scale" : "")),
        element("ul", { class: "multiples" }, curves.names.map((client, i) => element("li", {},
          spark(curves.x, curves.y[i].map(at), 120, 36, [at(low), at(high)]), element("span", {}, client + " "), element("b", {}, number(last(curves.y[i])))))));
    }
    return node;
  }

  drawRest() {
    const d = this.data, section = (title, ...inside) => (inside.some(Boolean) ? element("section", {}, element("h2", {}, title), ...inside.filter(Boolean)) : null);
    const link = (name) => (this.files ? element("a", { href: "/files/" + encodeURIComponent(d.run) + "/" + name.split("/").map(encodeURIComponent).join("/") }, name) : name);
    this.rest.replaceChildren(...[
      section("Waiting times", d.waiting && textTable(d.waiting)),
      section("Failures", d.failures && textTable(d.failures, "failures")),
      section("Formula", d.formula && element("pre", { tabindex: 0 }, d.formula)),
      section("Notes", (d.notes || []).length ? element("ul", {}, d.notes.map((n) => element("li", {}, n))) : null),
      section("Files", (d.files || []).length ? element("ul", { class: "files" }, d.files.map((f) => element("li", {}, link(f)))) : null,
        d.config && element("details", {}, element("summary", {}, "config.toml"), element("pre", { tabindex: 0 }, d.config)),
        Object.keys(d.settings || {}).length ? element("details", {}, element("summary", {}, "environment"),
          element("dl", { class: "pairs" }, Object.entries(d.settings).map(([k, v]) => element("div", {}, element("dt", {}, k), element("dd", {}, v))))) : null),
      section("Load, predict, resume", (d.lines || []).length ? element("pre", { tabindex: 0 }, d.lines.join("\n")) : null),
    ].filter(Boolean));
  }

  // Drop the rows from a round on, after a resumed run has truncated its log.
  cut(round) {
    for (const line of Object.values(this.series)) {
      const keep = line.x.findIndex((x) => x >= round);
      if (keep >= 0) { line.x.length = keep; line.y.length = keep; }
    }
    this.data.rounds = this.next = Math.min(this.next, round);
  }

  close() { for (const curve of this.curves.values()) curve.watcher.disconnect(); }
}
