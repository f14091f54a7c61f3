// Numbers as text, in the forms of runs/format.py, and elements whose values are text nodes, never HTML.

export function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key === "on") for (const [event, run] of Object.entries(value)) made.addEventListener(event, run);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) made.append(child instanceof Node ? child : visible(String(child)));
  }
  return made;
}

// Characters without a shape, which could also turn the direction of a line, as dots. Line breaks and tabs stay.
export function visible(text) {
  return text.replace(/(?![\n\t])[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]/gu, "·");
}

// Work that can wait until the page has been drawn once.
export function whenIdle(work) {
  if (globalThis.requestIdleCallback) requestIdleCallback(work, { timeout: 1000 }); else setTimeout(work, 100);
}

export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const amount = Math.abs(value);
  if (amount && (amount < 1e-3 || amount >= 99999.5)) return value.toExponential(3);
  return value.toFixed(amount < 9.99995 ? 4 : amount < 99.9995 ? 3 : amount < 999.995 ? 2 : 1);
}

export function count(value) {
  return value === null || value === undefined ? "–" : Math.round(value).toLocaleString("en-US");
}

export function bytes(value) {
  if (value === null || value === undefined) return "–";
  let unit = 0;
  while (value >= 999.5 && unit < 4) { value /= 1000; unit += 1; }
  const places = unit === 0 || value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
  return value.toFixed(places) + " " + ["B", "kB", "MB", "GB", "TB"][unit];
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 0.0995) return seconds ? (1000 * seconds).toPrecision(seconds > 0.00995 ? 2 : 1) + " ms" : "0 s";
  if (seconds < 60) return seconds.toFixed(seconds < 10 ? 2 : 1) + " s";
  const minutes = Math.floor(seconds / 60), two = (n) => String(Math.floor(n)).padStart(2, "0");
  return minutes < 60 ? minutes + ":" + two(seconds % 60) + " min" : Math.floor(minutes / 60) + ":" + two(minutes % 60) + " h";
}

export const FORMS = { number, count, bytes, seconds: duration };
