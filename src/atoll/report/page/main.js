// The page: all runs, one run with its stream, runs laid over each other. A frozen report has its data inside.

import { element, number, count, bytes, duration, visible } from "./text.js";
import { Curve, spark } from "./curve.js";
import { sortedTable } from "./table.js";
import { RunView, time } from "./run.js";

const root = document.getElementById("page");
const frozen = document.getElementById("data");
let view = null, stream = null, timer = null, visit = 0, tried = 0;
export const page = { rows: [], view: () => view };
globalThis.atoll = page;

async function get(path) {
  const answer = await fetch(path, { headers: { Accept: "application/json" } });
  if (!answer.ok) throw new Error(answer.status === 404 ? "This run is no longer there." : "The server answered " + answer.status + ".");
  return answer.json();
}

function message(text) {
  let line = document.getElementById("message");
  if (!line) { line = element("p", { id: "message", role: "status" }); root.before(line); }
  line.textContent = text;
  line.hidden = !text;
}

// Leave what is shown. An answer that arrives later belongs to an earlier visit and is dropped.
function leave() {
  if (stream) stream.close();
  if (view) view.close();
  clearTimeout(timer);
  stream = view = null;
  visit += 1;
  document.body.classList.remove("list");
  return visit;
}

// One run, kept up to date by the stream of its rows.
async function openRun(name) {
  const mine = leave(), path = "/api/runs/" + encodeURIComponent(name);
  const data = await get(path);
  if (visit !== mine) return;
  view = new RunView(data, true);
  page.rows = [];
  root.replaceChildren(element("nav", {}, element("a", { href: "#" }, "all runs")), view.node);
  document.title = visible(data.title || data.run) + " – atoll";
  const known = data.rounds ? data.rounds - 1 : -1;
  follow(path, known);
  later(path, 5000);
}

function follow(path, after) {
  const mine = visit, shown = view;
  let queued = false;
  const show = () => { queued = false; if (visit === mine) shown.refresh(); };
  const soon = () => { if (!queued) { queued = true; setTimeout(() => requestAnimationFrame(show), 200); } };
  stream = new EventSource(path + "/live?after=" + after);
  stream.addEventListener("open", () => message(""));
  stream.addEventListener("round", (event) => {
    const row = JSON.parse(event.data);
    if (page.rows.length && page.rows[page.rows.length - 1].round >= row.round) return;
    page.rows.push(row);
    shown.add(row);
    soon();
  });
  stream.addEventListener("reset", (event) => {
    const first = Number(event.data);
    page.rows = page.rows.filter((row) => row.round < first);
    shown.cut(first);
    soon();
    later(path, 1000);
  });
  stream.addEventListener("end", () => {
    stream.close();
    stream = null;
    later(path, 0);
  });
  stream.addEventListener("error", () => {
    if (visit !== mine || !stream) return;
    message("The connection to the server is lost. The values below stay; the page tries again.");
    if (stream.readyState === EventSource.CLOSED) { stream = null; later(path, 2000); }
  });
}

// Look again at everything that is no row: status, clients, answer, notes. A long answer is asked for less often.
function later(path, wait) {
  const mine = visit;
  clearTimeout(timer);
  timer = setTimeout(async () => {
    const began = performance.now();
    let data = null;
    try { data = await get(path); } catch (error) { if (visit === mine) message(String(error.message)); }
    if (visit !== mine) return;
    if (data) {
      view.facts(data, page.rows);
      // A run that ended may be resumed, and may have ended again.
      const more = data.rounds > view.next && tried !== data.rounds;
      tried = more ? data.rounds : tried;
      if (!stream && (data.status === "running" || more)) follow(path, view.next - 1);
    }
    const calm = data && data.status === "done" ? 30000 : 5000;
    later(path, Math.max(calm, 20 * (performance.now() - began)));
  }, wait);
}

const overlay = { chosen: new Set(), x: "round", metric: "", turn: 0 };
const COLOURS = 8;

async function openList() {
  const mine = leave();
  document.title = "runs – atoll";
  document.body.classList.add("list");
  let runs = await get("/api/runs");
  if (visit !== mine) return;
  const filter = element("input", { type: "search", id: "filter", placeholder: "filter by name, tag, plan, status" });
  const place = element("div", {}), charts = element("div", {}), state = {};
  const fill = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = runs.filter((r) => { const text = JSON.stringify([r.run, r.title, r.tags, r.status, r.plan, r.data, r.model]).toLowerCase(); return words.every((w) => text.includes(w)); });
    place.replaceChildren(fits.length ? listing(fits, state, () => lay(runs, charts)) : element("p", {}, runs.length ? "No run fits the filter." : "No runs yet. Write: atoll run"));
  };
  filter.addEventListener("input", fill);
  fill();
  root.replaceChildren(element("h1", {}, "Runs"), element("p", {}, element("label", { for: "filter" }, "Filter "), filter), charts, element("section", {}, place));
  lay(runs, charts);
  relist(mine, (found) => {
    if (JSON.stringify(found) === JSON.stringify(runs)) return;
    runs = found;
    const label = (e) => e.getAttribute("aria-label") || e.textContent, focus = document.activeElement;
    const kept = place.contains(focus) ? label(focus) : null;
    fill();
    if (kept !== null) { const same = [...place.querySelectorAll("a, button, input")].find((e) => label(e) === kept); if (same) same.focus(); }
    if (overlay.chosen.size) lay(runs, charts);
  });
}

// Ask for the list again, so that new runs and the last values of running ones appear.
function relist(mine, update) {
  timer = setTimeout(async () => {
    let found = null;
    try { found = await get("/api/runs"); if (visit === mine) message(""); } catch (error) { if (visit === mine) message(String(error.message)); }
    if (visit !== mine) return;
    if (found) update(found);
    relist(mine, update);
  }, 3000);
}

function listing(runs, state, changed) {
  const column = (label, unit, value) => ({ label, unit, values: runs.map(value) });
  const columns = [
    column("status", "text", (r) => r.status),
    column("plan", "text", (r) => r.plan || ""),
    column("best", "text", (r) => (r.best ? r.chief + " " + number(r.best[0]) : "–")),
    column("at the end, with interval", "text", (r) => r.interval || "–"),
    column("rounds", "count", (r) => r.rounds || 0),
    column("bytes", "bytes", (r) => r.bytes || 0),
    column("time", "seconds", (r) => r.seconds || 0),
    column("ε", "number", (r) => (r.epsilon === undefined ? null : r.epsilon)),
    column("began", "text", (r) => (r.began || "").replace("T", " ")),
  ];
  const pick = (i) => {
    const r = runs[i];
    const box = element("input", { type: "checkbox", "aria-label": "lay " + r.run + " over others", on: { change: () => {
      if (box.checked) overlay.chosen.add(r.run); else overlay.chosen.delete(r.run);
      changed();
    } } });
    box.checked = overlay.chosen.has(r.run);
    return element("th", { scope: "row", role: "rowheader", class: "pick" }, box, " ", element("a", { href: "#" + encodeURIComponent(r.run) }, r.title || r.run), " ",
      spark(r.spark[0], r.spark[1], 70, 20), (r.tags || []).map((t) => element("span", { class: "tag" }, t)));
  };
  return sortedTable("runs, newest first", "run", runs.map((r) => r.title || r.run), columns, state, pick);
}

// The chosen runs over each other, by round, bytes, seconds or the simulated clock.
async function lay(runs, place) {
  overlay.turn += 1;
  const turn = overlay.turn;
  if (!overlay.chosen.size) { place.replaceChildren(); return; }
  const chosen = runs.filter((r) => overlay.chosen.has(r.run)).slice(0, COLOURS);
  const pages = (await Promise.all(chosen.map((r) => get("/api/runs/" + encodeURIComponent(r.run)).catch(() => null)))).filter((p) => p && p.curves);
  if (turn !== overlay.turn) return;
  const metrics = [...new Set(pages.flatMap((p) => p.columns || []))];
  if (!metrics.includes(overlay.metric)) overlay.metric = pages.length ? pages[0].chief : "";
  const select = (label, values, now, set) => {
    const made = element("select", { "aria-label": label, on: { change: () => { set(made.value); lay(runs, place); } } }, values.map((v) => element("option", { value: v }, v.replaceAll("_", " "))));
    made.value = now;
    return made;
  };
  const curve = new Curve(overlay.metric.replaceAll("_", " "), { x: overlay.x });
  place.replaceChildren(element("section", {}, element("h2", {}, "Selected runs"),
    element("p", { class: "controls" }, select("metric", metrics, overlay.metric, (v) => { overlay.metric = v; }), " by ",
      select("axis", ["round", "bytes", "seconds", "clock"], overlay.x, (v) => { overlay.x = v; })), curve.node));
  curve.set(pages.filter((p) => p.curves[overlay.metric]).map((p, i) => ({ name: p.title || p.run, ...along(p, overlay.metric, overlay.x), colour: "s" + i })));
}

// A curve over another axis: the cost at the end of each of its rounds. The data lists the costs of at most 2,000
// rounds; between two of them the cost is interpolated.
function along(data, metric, axis) {
  const [x, y] = data.curves[metric];
  const rounds = (data.costs || {}).round || [], costs = (data.costs || {})[axis] || [];
  if (axis === "round") return { x, y };
  let at = 0;
  const there = x.map((round, i) => {
    while (at + 1 < rounds.length && rounds[at + 1] <= round) at += 1;
    const next = Math.min(at + 1, rounds.length - 1), wide = rounds[next] - rounds[at];
    const part = wide > 0 ? (round - rounds[at]) / wide : 0;
    return [costs[at] === null || costs[at] === undefined ? null : costs[at] + part * (costs[next] - costs[at]), y[i]];
  }).filter(([cost]) => cost !== null);
  return { x: there.map((p) => p[0]), y: there.map((p) => p[1]) };
}

async function route() {
  message("");
  try {
    const name = decodeURIComponent(location.hash.slice(1));
    await (name ? openRun(name) : openList());
  } catch (error) { message(String(error.message)); }
}

if (frozen) {
  view = new RunView(JSON.parse(frozen.textContent), false);
  const figures = document.querySelector(".kept");
  root.replaceChildren(view.node);
  if (figures) view.rest.before(figures);
} else {
  // The token leaves the address bar; the cookie stands for it.
  if (location.search) history.replaceState(null, "", location.pathname + location.hash);
  addEventListener("hashchange", route);
  route();
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (view) for (const curve of view.curves.values()) curve.recolour(); });
