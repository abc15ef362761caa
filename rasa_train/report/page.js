"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const NS = "http://www.w3.org/2000/svg";
const DASHES = ["", "7 4", "2 3", "9 3 2 3"];
const COLOURS = 8;

/* -- small helpers -------------------------------------------------------------------------------------- */

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  return fill(made, attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(NS, name), attributes, children);
}

function fill(made, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function format(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return trim(value / 1e9) + "G";
  if (size >= 1e6) return trim(value / 1e6) + "M";
  if (size >= 1e4) return trim(value / 1e3) + "k";
  if (size !== 0 && size < 1e-3) return value.toExponential(1);
  return trim(value);
}

function trim(value) {
  return String(Number(value.toPrecision(4)));
}

/** Round numbers that divide [low, high] into about `count` parts. */
function ticks(low, high, count) {
  const raw = (high - low) / Math.max(count, 1) || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

/** Ticks of a logarithmic axis: powers of ten, with 2 and 5 between them when there are few. */
function logTicks(low, high) {
  const found = [];
  for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++) {
    for (const m of high / low > 300 ? [1] : [1, 2, 5]) found.push(m * 10 ** p);
  }
  return found.filter((t) => t >= low * 0.999 && t <= high * 1.001);
}

/* -- tables --------------------------------------------------------------------------------------------- */

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  const order = (cell) => (cell.dataset.v === undefined ? null : isNaN(cell.dataset.v) ? cell.dataset.v : Number(cell.dataset.v));
  heads.forEach((head, column) => {
    head.firstElementChild.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows].sort((one, two) => {
        const [a, b] = [order(one.cells[column]), order(two.cells[column])];
        if (a === null || b === null) return (a === null) - (b === null);
        const compared = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
        return down ? -compared : compared;
      });
      table.tBodies[0].append(...rows);
    });
  });
}

/** Say above a table how many of its columns are out of sight to the right, and shade that edge. */
function sideways(area) {
  const said = element("p", { class: "note sideways", hidden: "" });
  area.before(said);
  const look = () => {
    const edge = area.getBoundingClientRect().right;
    const heads = [...area.querySelectorAll("thead th")];
    const hidden = heads.filter((head) => head.getBoundingClientRect().right > edge + 1).length;
    area.classList.toggle("more", hidden > 0);
    said.hidden = area.scrollWidth <= area.clientWidth + 1;
    said.textContent = hidden ? `Scroll the table sideways: ${hidden} of ${heads.length} columns are further right \u2192` : "\u2190 The other columns are further left.";
  };
  area.addEventListener("scroll", look, { passive: true });
  new ResizeObserver(look).observe(area);
}

/* -- charts --------------------------------------------------------------------------------------------- */

/** The same run has the same colour in every chart. */
const styles = new Map();
function style(name) {
  if (!styles.has(name)) {
    const i = styles.size;
    styles.set(name, { colour: `var(--c${i % COLOURS})`, dash: DASHES[Math.floor(i / COLOURS) % DASHES.length] });
  }
  return styles.get(name);
}

class Plot {
  constructor(chart) {
    this.chart = chart;
    this.hidden = new Set();
    this.views = Object.keys(chart.views);
    this.view = this.views[this.views.length - 1];
    this.axis = this.axes()[0];
    this.log = false;
    this.at = null;
    this.area = element("div", { class: "plot" });
    this.tip = element("div", { class: "tip", hidden: "" });
    this.said = element("output", { class: "skip", "aria-live": "polite" });
    this.legend = element("ul", { class: "legend" });
    this.card = element("figure", { class: "card" }, element("h3", {}, chart.title));
    if (chart.note) this.card.append(element("p", { class: "note" }, chart.note));
    this.card.append(this.controls(), this.area, this.legend, this.said);
    new ResizeObserver(() => this.draw()).observe(this.area);
    this.area.addEventListener("pointermove", (event) => this.point(event));
    this.area.addEventListener("pointerleave", () => this.show(null));
    this.area.addEventListener("keydown", (event) => this.key(event));
  }

  axes() {
    return [...new Set(this.chart.views[this.view].flatMap((series) => Object.keys(series.x)))];
  }

  controls() {
    const row = element("div", { class: "controls" });
    const choice = (label, options, chosen, set) => {
      if (options.length < 2) return;
      const select = element("select", {}, ...options.map((o) => element("option", {}, o)));
      select.value = chosen;
      select.addEventListener("change", () => {
        set(select.value);
        this.at = null;
        this.draw();
      });
      row.append(element("label", {}, label, select));
    };
    choice("by", this.axes(), this.axis, (value) => (this.axis = value));
    choice("lines", this.views, this.view, (value) => (this.view = value));
    const values = this.views.flatMap((view) => this.chart.views[view].flatMap((series) => series.y));
    if (values.every((v) => v > 0)) choice("scale", ["linear", "log"], "linear", (value) => (this.log = value === "log"));
    return row;
  }

  all() {
    return this.chart.views[this.view].filter((series) => series.x[this.axis]);
  }

  shown() {
    return this.all().filter((series) => !this.hidden.has(series.name));
  }

  draw() {
    const width = this.area.clientWidth;
    if (!width || width < 40) return;
    const series = this.shown();
    const room = Math.max(0, ...series.map((s) => s.name.length)) * 7.6 + 14;
    const labelled = room < width * 0.35 && series.length <= 6;
    const height = Math.max(220, Math.min(320, width * 0.55));
    const right = labelled ? room : 16;
    this.box = { left: 52, right: width - right, top: 22, bottom: height - 40 };
    const xs = series.flatMap((s) => s.x[this.axis]);
    const ys = series.flatMap((s) => (s.spread && !this.log ? s.y.flatMap((y, i) => [y - s.spread[i], y + s.spread[i]]) : s.y)).filter((y) => y !== null);
    this.scales(xs, ys);
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", tabindex: 0, "aria-label": this.describe(series) });
    this.frame(root, width, height);
    for (const one of series) this.line(root, one);
    if (labelled) this.labels(root, series);
    this.cross = svg("line", { class: "cross", y1: this.box.top, y2: this.box.bottom, visibility: "hidden" });
    root.append(this.cross);
    this.area.replaceChildren(root, this.tip);
    this.drawLegend();
    this.show(null);
  }

  scales(xs, ys) {
    const { left, right, top, bottom } = this.box;
    let [x0, x1] = xs.length ? [Math.min(...xs), Math.max(...xs)] : [0, 1];
    if (this.chart.categories[this.axis]) [x0, x1] = [-0.4, this.chart.categories[this.axis].length - 0.6];
    if (x0 === x1) [x0, x1] = [x0 - 1, x1 + 1];
    let [y0, y1] = ys.length ? [Math.min(...ys), Math.max(...ys)] : [0, 1];
    if (this.log) {
      [y0, y1] = [y0 / 1.1, y1 * 1.1];
    } else {
      const room = (y1 - y0 || Math.abs(y1) || 1) * 0.06;
      [y0, y1] = [y0 >= 0 ? Math.max(0, y0 - room) : y0 - room, y1 + room];
    }
    this.range = { x0, x1, y0, y1 };
    const part = this.log ? (y) => Math.log(y / y0) / Math.log(y1 / y0) : (y) => (y - y0) / (y1 - y0);
    this.x = (x) => left + ((x - x0) / (x1 - x0)) * (right - left);
    this.y = (y) => bottom - part(y) * (bottom - top);
  }

  frame(root, width, height) {
    const { left, right, top, bottom } = this.box;
    const { x0, x1, y0, y1 } = this.range;
    for (const t of this.log ? logTicks(y0, y1) : ticks(y0, y1, 5)) {
      root.append(svg("line", { class: "grid", x1: left, x2: right, y1: this.y(t), y2: this.y(t) }));
      root.append(svg("text", { x: left - 7, y: this.y(t) + 4, "text-anchor": "end" }, format(t)));
    }
    const names = this.chart.categories[this.axis];
    const marks = names ? names.map((_, i) => i) : ticks(x0, x1, Math.max(2, Math.min(8, (right - left) / 75)));
    for (const t of marks) {
      const text = names ? names[t] : format(t);
      root.append(svg("line", { class: "grid", x1: this.x(t), x2: this.x(t), y1: bottom, y2: bottom + 4 }));
      root.append(svg("text", { x: this.x(t), y: bottom + 18, "text-anchor": "middle" }, text));
    }
    root.append(svg("text", { x: left - 44, y: 12 }, this.chart.y));
    root.append(svg("text", { x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, this.axis));
  }

  line(root, series) {
    const { colour, dash } = style(series.name);
    const xs = series.x[this.axis];
    const points = xs.map((x, i) => [this.x(x), series.y[i] === null ? null : this.y(series.y[i])]).filter((p) => p[1] !== null);
    if (series.spread && !this.log) {
      const edge = (sign) => xs.map((x, i) => `${this.x(x).toFixed(1)},${this.y(series.y[i] + sign * series.spread[i]).toFixed(1)}`);
      root.append(svg("polygon", { points: [...edge(1), ...edge(-1).reverse()].join(" "), style: `fill:${colour};opacity:.16` }));
    }
    const path = points.map((p) => p.map((v) => v.toFixed(1)).join(",")).join(" ");
    root.append(svg("polyline", { points: path, style: `fill:none;stroke:${colour};stroke-width:1.8;stroke-linejoin:round`, "stroke-dasharray": dash || null }));
    if (series.best && this.axis in series.best) {
      const mark = svg("circle", { class: "best", cx: this.x(series.best[this.axis]), cy: this.y(series.best.y), r: 6, style: `fill:none;stroke:${colour};stroke-width:2` });
      mark.append(svg("title", {}, `${series.name}: the best step`));
      root.append(mark);
    }
    if (points.length <= 40) for (const [x, y] of points) root.append(svg("circle", { cx: x, cy: y, r: 3, style: `fill:${colour}` }));
  }

  /** Names at the ends of the lines, pushed apart where they would overlap. */
  labels(root, all) {
    const places = all.map((s) => ({ name: s.name, y: this.y(s.y[s.y.length - 1]), x: this.x(s.x[this.axis][s.y.length - 1]) })).sort((a, b) => a.y - b.y);
    for (let i = 1; i < places.length; i++) places[i].y = Math.max(places[i].y, places[i - 1].y + 15);
    let limit = this.box.bottom + 4;
    for (let i = places.length - 1; i >= 0; i--, limit -= 15) places[i].y = Math.min(places[i].y, limit);
    for (const p of places) {
      root.append(svg("text", { class: "end", x: p.x + 8, y: p.y + 4, style: `fill:${style(p.name).colour}` }, p.name));
    }
  }

  drawLegend() {
    if (this.all().length < 2) return this.legend.replaceChildren();
    this.legend.replaceChildren(
      ...this.all().map((series) => {
        const { colour, dash } = style(series.name);
        const line = svg("line", { x1: 1, x2: 21, y1: 5, y2: 5, style: `stroke:${colour};stroke-width:3`, "stroke-dasharray": dash || null });
        const button = element("button", { type: "button", "aria-pressed": !this.hidden.has(series.name) }, svg("svg", { "aria-hidden": "true", viewBox: "0 0 22 10" }, line), series.name);
        button.addEventListener("click", () => {
          if (!this.hidden.delete(series.name)) this.hidden.add(series.name);
          this.draw();
          [...this.legend.querySelectorAll("button")].find((b) => b.textContent === series.name).focus();
        });
        return element("li", {}, button);
      }),
    );
  }

  describe(series) {
    const ends = series.map((s) => `${s.name} ends at ${format(s.y[s.y.length - 1])}`);
    return `${this.chart.title} by ${this.axis}. ${ends.join(", ")}. Use the arrow keys to read single points.`;
  }

  /** All x values that occur in any line. */
  positions() {
    return [...new Set(this.shown().flatMap((s) => s.x[this.axis]))].sort((a, b) => a - b);
  }

  point(event) {
    const places = this.positions();
    const x = event.clientX - this.area.getBoundingClientRect().left;
    if (places.length) this.show(places.reduce((best, p) => (Math.abs(this.x(p) - x) < Math.abs(this.x(best) - x) ? p : best)));
  }

  key(event) {
    const places = this.positions();
    const now = places.indexOf(this.at);
    const jump = Math.max(1, Math.round(places.length / 40));
    const target = { ArrowRight: now + jump, ArrowLeft: now < 0 ? places.length - 1 : now - jump, Home: 0, End: places.length - 1 }[event.key];
    if (event.key === "Escape") return this.show(null);
    if (target === undefined || !places.length) return;
    event.preventDefault();
    this.show(places[Math.max(0, Math.min(places.length - 1, target))]);
    this.said.textContent = this.tip.textContent;
  }

  show(at) {
    this.at = at;
    this.tip.hidden = at === null;
    this.cross.setAttribute("visibility", at === null ? "hidden" : "visible");
    if (at === null) return;
    const x = this.x(at);
    this.cross.setAttribute("x1", x);
    this.cross.setAttribute("x2", x);
    const names = this.chart.categories[this.axis];
    const rows = this.shown().flatMap((series) => {
      const xs = series.x[this.axis];
      const i = xs.reduce((best, v, j) => (Math.abs(v - at) < Math.abs(xs[best] - at) ? j : best), 0);
      if (!xs.length || series.y[i] === null || at > xs[xs.length - 1] || at < xs[0]) return [];
      const spread = series.spread ? ` ± ${format(series.spread[i])}` : "";
      return [element("span", { style: `color:${style(series.name).colour}` }, `${series.name}: ${format(series.y[i])}${spread} `)];
    });
    this.tip.replaceChildren(element("b", {}, names ? names[at] : `${this.axis} ${format(at)} `), ...rows);
    const room = this.area.clientWidth;
    this.tip.style.left = `${Math.max(0, Math.min(x > room / 2 ? x - this.tip.offsetWidth - 12 : x + 12, room - this.tip.offsetWidth))}px`;
  }
}

/* -- heat maps ------------------------------------------------------------------------------------------ */

function channels(name) {
  const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}

function heatMap({ kind, layers, ranks, largest, values }) {
  const bytes = Uint8Array.from(atob(values), (c) => c.charCodeAt(0));
  const canvas = element("canvas", { width: ranks, height: layers, role: "img", "aria-label": `${kind}: ${layers} layers by ${ranks} shared ranks, largest weight ${format(largest)}` });
  canvas.style.height = `${Math.max(72, Math.min(260, layers * 10))}px`;
  const context = canvas.getContext("2d");
  const image = context.createImageData(ranks, layers);
  const [low, high] = [channels("--heat-low"), channels("--heat-high")];
  bytes.forEach((value, i) => {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = low[c] + ((high[c] - low[c]) * value) / 255;
    image.data[4 * i + 3] = 255;
  });
  context.putImageData(image, 0, 0);
  canvas.addEventListener("pointermove", (event) => {
    const place = canvas.getBoundingClientRect();
    const column = Math.min(ranks - 1, Math.floor(((event.clientX - place.left) / place.width) * ranks));
    const row = Math.min(layers - 1, Math.floor(((event.clientY - place.top) / place.height) * layers));
    canvas.title = `layer ${row}, rank ${column}: ${format((bytes[row * ranks + column] / 255) * largest)}`;
  });
  const scale = element("span", {}, "0", element("span", { class: "scale" }), format(largest));
  return element("figure", {}, element("figcaption", {}, kind), canvas, element("small", {}, `${layers} layers × ${ranks} ranks`, scale));
}

function heatMaps(place) {
  const maps = element("div", { class: "maps" });
  const select = element("select", {}, ...data.mixing.map((run, i) => element("option", { value: i }, run.run)));
  const draw = () => maps.replaceChildren(...data.mixing[select.selectedIndex].kinds.map(heatMap));
  select.addEventListener("change", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  place.append(element("p", { class: "heat-tools" }, element("label", {}, "Run ", select)), maps);
  draw();
}

/* -- the page ------------------------------------------------------------------------------------------- */

document.querySelectorAll("table.sortable").forEach(sortable);
document.querySelectorAll(".scroll").forEach(sideways);
const charts = document.getElementById("charts");
if (charts) {
  for (const chart of data.charts) charts.append(new Plot(chart).card);
  if (charts.children.length) charts.children[0].classList.add("wide");
}
const heat = document.getElementById("heatmaps");
if (heat && data.mixing.length) heatMaps(heat);
if (data.reloadSeconds) setTimeout(() => location.reload(), data.reloadSeconds * 1000);
