// Small helpers for making and filling parts of the page. Text goes in as text, never as HTML.

export const $ = (id) => document.getElementById(id);

/** An element: make("td", "text"), make("td", node), make("td", {className: "wide"}, "text"). */
export function make(tag, ...rest) {
  const node = document.createElement(tag);
  if (rest[0] !== null && typeof rest[0] === "object" && !(rest[0] instanceof Node)) Object.assign(node, rest.shift());
  node.append(...rest.filter((part) => part !== null && part !== undefined));
  return node;
}

/** Fill a table: headings, then rows of cells (text or nodes). */
export function fill(table, headings, rows, empty) {
  if (!rows.length) {
    table.replaceChildren(make("tbody", make("tr", make("td", empty))));
    return;
  }
  table.replaceChildren(
    make("thead", make("tr", ...headings.map((text) => make("th", { scope: "col" }, text)))),
    make("tbody", ...rows.map((row) => make("tr", ...row.map((cell) => make("td", cell))))),
  );
}

/** A bar for a share between 0 and 1. */
export function bar(share) {
  return make("span", make("meter", { min: 0, max: 1, high: 0.95, optimum: 0, low: 0.8, value: share }), ` ${percent(share)}`);
}

/** `act(work)`: does it and refreshes the view, or says under `place` why not. */
export function acting(place, refresh) {
  return async (work) => {
    try {
      await work();
      place.textContent = "";
      await refresh();
    } catch (error) {
      place.textContent = error.message;
    }
  };
}

/** Do a form's work once: its button waits until it is done. */
export async function busy(form, work) {
  const button = form.querySelector("button[type=submit]");
  if (button.disabled) return;
  button.disabled = true;
  try {
    await work();
  } finally {
    button.disabled = false;
  }
}

/** Let a file be dropped on an input's label, and say its name. */
export function takesFile(input, name) {
  const label = input.labels[0];
  for (const kind of ["dragover", "dragleave", "drop"]) {
    label.addEventListener(kind, (event) => {
      event.preventDefault();
      label.classList.toggle("over", kind === "dragover");
      if (kind === "drop" && event.dataTransfer.files.length) {
        input.files = event.dataTransfer.files;
        input.dispatchEvent(new Event("change"));
      }
    });
  }
  input.addEventListener("change", () => (name.textContent = input.files[0]?.name ?? ""));
}

export const number = (value, digits = 0) =>
  value === null || value === undefined ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits });
export const percent = (share) => (share === null || share === undefined ? "–" : `${Math.round(share * 100)} %`);
export const gib = (bytes) => (bytes === null || bytes === undefined ? "–" : `${(bytes / 2 ** 30).toFixed(1)} GiB`);
export const usd = (value) => (value === null || value === undefined ? "–" : `$${value < 10 ? value.toFixed(3) : value.toFixed(0)}`);
export const seconds = (value) =>
  value === null || value === undefined ? "–" : value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(1)} s`;

const COLOURS = ["#1d8f74", "#d0762a", "#4a6fd0"];

/** A line chart of uPlot. `x`: "time" (Unix seconds), "day" (the same, a point each) or "step". Returns a function that takes new data. */
export function chart(place, names, x = "time", height = 180) {
  const ink = getComputedStyle(document.documentElement).getPropertyValue("--soft");
  const axis = { stroke: ink, grid: { stroke: "rgba(128,128,128,.2)" }, ticks: { stroke: "rgba(128,128,128,.2)" } };
  const plot = new uPlot({
    width: place.clientWidth || 300, height,
    scales: { x: { time: x !== "step" }, y: { range: (_, low, high) => [Math.min(0, low), high > 0 ? high * 1.1 : 1] } },
    series: [{}, ...names.map((label, index) => ({ label, stroke: COLOURS[index], width: 2, spanGaps: true, points: { show: x === "day" || (x === "step" && index > 0) } }))],
    axes: [axis, axis],
  }, [[], ...names.map(() => [])], place);
  new ResizeObserver(() => place.clientWidth && plot.setSize({ width: place.clientWidth, height })).observe(place);
  return (data) => plot.setData(data);
}

/** Call `work` now and every `ms` while a view is shown and the tab is in front. Returns a function that stops it. */
export function whileShown(work, ms) {
  let timer = null, stopped = false;
  const turn = async () => {
    if (!document.hidden) await work();
    if (!stopped) timer = setTimeout(turn, ms);
  };
  turn();
  return () => {
    stopped = true;
    clearTimeout(timer);
  };
}
