// Tables of texts, and a table that a click or a key sorts.

import { element, whenIdle, FORMS } from "./text.js";

const MOST = 500, FIRST = 50; // rows of a table, and those of them that are made at once

// cells: rows of texts; the first row has the heads, the first column the names.
export function textTable(table, kind) {
  const [heads, ...rows] = table.cells;
  const place = (i) => (kind === "failures" && i > 2 ? null : "n");
  return element("div", { class: "scroll " + (kind || ""), tabindex: 0, role: "region", "aria-label": table.caption },
    element("table", {},
      element("caption", {}, table.caption),
      element("thead", {}, element("tr", {}, heads.map((h, i) => (h ? element("th", { scope: "col", class: i ? place(i) : null }, h) : element("td", {}))))),
      element("tbody", {}, rows.map((row) => element("tr", {}, row.map((cell, i) =>
        (i ? element("td", { class: place(i) }, cell) : element("th", { scope: "row" }, cell))))))));
}

// columns: [{label, unit, values, absent}]; names: the row heads. The order is kept in `state`.
export function sortedTable(caption, first, names, columns, state, pick) {
  const body = element("tbody", { role: "rowgroup" }); // roles: a narrow list has no layout of a table
  const order = names.map((_, i) => i);
  let filled = 0;
  const value = (i) => (state.by < 0 ? names[i] : (columns[state.by].values || [])[i]);
  const compare = (a, b) => {
    const x = value(a), y = value(b);
    if (x === y) return a - b;
    if (x === null || x === undefined) return 1;
    if (y === null || y === undefined) return -1;
    return (x < y ? -1 : 1) * (state.down ? -1 : 1);
  };
  const cell = (column, i) => {
    const given = column.values[i];
    return element("td", { role: "cell", "data-label": pick ? column.label : null, class: typeof given === "string" ? null : "n" }, typeof given === "string" ? given : (FORMS[column.unit] || FORMS.number)(given));
  };
  const fill = () => {
    const sorted = state.by === undefined ? order : [...order].sort(compare);
    const made = (from, to) => sorted.slice(from, to).map((i) => element("tr", { role: "row" }, pick ? pick(i) : element("th", { scope: "row", role: "rowheader" }, names[i]),
      columns.map((column) => (column.absent ? element("td", { role: "cell", class: "absent" }, column.absent) : cell(column, i)))));
    const turn = filled += 1;
    body.replaceChildren(...made(0, FIRST));
    if (sorted.length > FIRST) whenIdle(() => { if (turn === filled) body.append(...made(FIRST, MOST)); });
  };
  const heads = [{ label: first }, ...columns].map((column, n) => {
    const button = element("button", { type: "button", on: { click: () => {
      state.down = state.by === n - 1 ? !state.down : n > 0;
      state.by = n - 1;
      heads.forEach((h, m) => h.setAttribute("aria-sort", m === n ? (state.down ? "descending" : "ascending") : "none"));
      fill();
    } } }, column.label);
    return element("th", { scope: "col", role: "columnheader", "aria-sort": state.by === n - 1 ? (state.down ? "descending" : "ascending") : "none", class: n && column.unit !== "text" ? "n" : null }, button);
  });
  fill();
  const omitted = names.length > MOST ? " The first " + MOST + " rows in this order are shown." : "";
  const tall = !pick && names.length > 20 ? " tall" : "";
  return element("div", { class: "scroll" + tall, tabindex: 0, role: "region", "aria-label": caption },
    element("table", { role: "table" }, element("caption", {}, caption + omitted),
      element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, heads)), body));
}
