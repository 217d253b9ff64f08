// SPDX-License-Identifier: Apache-2.0
// The page of `dsjax view`: its curves, and what a user does with them.
//
// In: the snapshots of runs (snapshot.py), as JSON in the page. Out: one chart for each key, with a
// cursor and a range of steps that all share.

const COLOURS = 6;
const FIRST = [
  ...["loss", "accuracy", "learning_rate", "grad_norm"],
  ...["tokens_per_second", "mfu", "step_time", "device_memory_gib"],
];
const COUNTERS = ["epoch", "tokens", "eval_tokens"]; // their last value says it all
const FEW = 60; // evaluations, which are then shown one by one
const MANY = 200; // lines, which are smoothed unless a user wants otherwise: of few it lags too far

const page = JSON.parse(find("data").textContent);
const runs = page.runs;
const several = runs.length > 1;

const last = (run, key) => run.series[key]?.[1].at(-1);

/** One key of one run as numbers; null if it has none. */
function makeCurve(run, index, key) {
  const [steps, given] = run.series[key] ?? [[], []];
  const values = given.map((value) => (typeof value === "number" ? value : null));
  if (values.every((value) => value === null)) return null;
  const evaluated = key.startsWith("eval_");
  const kind = evaluated ? "evaluation" : "training";
  return {
    evaluated,
    steps,
    values,
    label: several ? `${run.name}${evaluated ? ", evaluation" : ""}` : kind,
    colour: `colour-${(several ? index : Number(evaluated)) % COLOURS}`,
    dashed: several && (evaluated || Math.floor(index / COLOURS) % 2 === 1),
  };
}

/** The charts of all keys: those that everyone looks for first, then what else a run wrote. */
function makeCharts() {
  const keys = [...new Set([...FIRST, ...runs.flatMap((run) => Object.keys(run.series))])];
  const beside = (key) => key.startsWith("eval_") && keys.includes(key.slice("eval_".length));
  return keys
    .filter((key) => !COUNTERS.includes(key) && !beside(key))
    .map((key) => {
      const both = (run, index) => [key, `eval_${key}`].map((name) => makeCurve(run, index, name));
      return { key, large: key === "loss", curves: runs.flatMap(both).filter(Boolean) };
    })
    .filter((chart) => chart.curves.length > 0);
}

const charts = makeCharts();
const curves = charts.flatMap((chart) => chart.curves);
const everyStep = [...new Set(curves.flatMap((curve) => curve.steps))].sort((a, b) => a - b);
const [firstStep, lastStep] = [everyStep[0] ?? 0, everyStep.at(-1) ?? 0];
const view = { from: firstStep, to: lastStep, cursor: null, smooth: false, log: false };

for (const curve of charts.filter((chart) => chart.large).flatMap((chart) => chart.curves)) {
  if (!curve.evaluated) curve.smooth = smoothed(curve.values);
  view.smooth ||= !curve.evaluated && curve.steps.length > MANY;
}

// ---- Drawing

/** The lines of a chart: a curve, and where it is smoothed a faint one behind. */
function linesOf(chart) {
  const isDrawable = chart.large && view.log ? (value) => value > 0 : () => true;
  return chart.curves.flatMap((curve) => {
    const dashes = `${curve.colour}${curve.dashed ? " dashed" : ""}`;
    const line = (values, style) => {
      const points = pointsBetween(view, curve.steps, values, isDrawable);
      const size = points.length > MOST_POINTS ? Math.ceil(points.length / (MOST_POINTS / 2)) : 1;
      return { curve, points: thinned(points, size), size, style };
    };
    if (!curve.smooth || !view.smooth) return [line(curve.values, `line ${dashes}`)];
    return [line(curve.values, `line faint ${dashes}`), line(curve.smooth, `line ${dashes}`)];
  });
}

function draw(chart) {
  const { width, height } = chart.plot.getBoundingClientRect();
  chart.plot.replaceChildren();
  chart.scale = null;
  const lines = linesOf(chart);
  const inView = ([step, value]) => value !== null && step >= view.from && step <= view.to;
  const values = lines.flatMap((line) => line.points.filter(inView).map(([, value]) => value));
  tellOf(chart, lines, values);
  if (!width || !values.length) return;

  const scale = valueScale(values, chart.large && view.log, height / 50);
  const left = 14 + 6.6 * Math.max(...scale.marks.map((mark) => tickText(mark).length));
  const [top, w, h] = [8, width - left - 14, height - 32];
  const [from, to] = view.from < view.to ? [view.from, view.to] : [view.from - 1, view.to + 1];
  const x = (step) => ((step - from) / (to - from)) * w;
  const y = (value) => (1 - scale.place(value)) * h;

  for (const mark of scale.marks) {
    const at = { x1: left, x2: left + w, y1: top + y(mark), y2: top + y(mark), class: "grid" };
    const text = { x: left - 7, y: top + y(mark) + 4, "text-anchor": "end" };
    chart.plot.append(shape("line", at), shape("text", text, tickText(mark)));
  }
  for (const mark of ticks(from, to, w / 90, 1)) {
    const text = { x: left + x(mark), y: height - 6, "text-anchor": "middle" };
    chart.plot.append(shape("text", text, tickText(mark)));
  }
  // What lies beyond the steps in view is cut off, but for half a point at the edges.
  const box = { x: left - 5, y: top - 5, width: w + 10, height: h + 10 };
  const area = shape("svg", { ...box, viewBox: `-5 -5 ${w + 10} ${h + 10}` });
  for (const { curve, points, style } of lines) {
    area.append(shape("path", { d: pathOf(points, x, y), class: style }));
    if (!curve.evaluated || points.length > FEW) continue;
    for (const [step, value] of points.filter(inView)) {
      area.append(circle(x(step), y(value), 3, `point ${curve.colour}`));
    }
  }
  chart.layer = shape("g", {});
  area.append(chart.layer);
  chart.plot.append(area);
  chart.scale = { x, y, left, w, h, from, to };
  drawCursor(chart);
}

/** Say under a chart what its drawing leaves out. */
function tellOf(chart, lines, values) {
  const size = Math.max(...lines.map((line) => line.size));
  const notes = [];
  if (!values.length) notes.push("no value between these steps that can be drawn");
  if (size > 1) notes.push(`drawn: the lowest and the highest of every ${size} lines`);
  const hidden = (curve) => curve.values.some((value) => value !== null && value <= 0);
  const logarithmic = chart.large && view.log;
  if (logarithmic && chart.curves.some(hidden)) {
    notes.push("values of 0 and below have no place on a logarithmic axis");
  }
  chart.note.textContent = notes.join("; ");
  chart.note.hidden = !notes.length;
}

// ---- The cursor, which all charts share

function valueText(curve) {
  const place = placeAt(curve.steps, view.cursor ?? Infinity);
  if (place < 0) return "none yet";
  const value = shown(curve.values[place]);
  return curve.smooth && view.smooth ? `${value} (EMA ${shown(curve.smooth[place])})` : value;
}

function drawCursor(chart) {
  chart.curves.forEach((curve, i) => (chart.values[i].textContent = valueText(curve)));
  if (!chart.scale) return;
  const { x, y, w, h } = chart.scale;
  chart.layer.replaceChildren();
  if (view.cursor === null) return;
  const at = x(view.cursor);
  const [text, end] = at < w / 2 ? [at + 5, "start"] : [at - 5, "end"];
  chart.layer.append(
    shape("line", { x1: at, x2: at, y1: 0, y2: h, class: "cursor" }),
    shape("text", { x: text, y: 8, "text-anchor": end }, `step ${shown(view.cursor)}`),
  );
  for (const curve of chart.curves) {
    const place = placeAt(curve.steps, view.cursor);
    const value = (view.smooth && curve.smooth ? curve.smooth : curve.values)[place];
    const drawable = typeof value === "number" && !(chart.large && view.log && value <= 0);
    const step = curve.steps[place];
    if (!drawable || step < view.from) continue;
    chart.layer.append(circle(x(step), y(value), 3.5, `dot ${curve.colour}`));
  }
}

function moveCursor(step) {
  if (step === view.cursor) return;
  view.cursor = step;
  charts.forEach(drawCursor);
}

function nearestStep(step) {
  const place = placeAt(everyStep, step);
  const [below, above] = [everyStep[place] ?? firstStep, everyStep[place + 1] ?? lastStep];
  return step - below < above - step ? below : above;
}

// ---- What a user does

function zoom(from, to) {
  if (from < to) [view.from, view.to] = [Math.max(from, firstStep), Math.min(to, lastStep)];
  find("from").value = view.from;
  find("to").value = view.to;
  find("all").disabled = view.from === firstStep && view.to === lastStep;
  charts.forEach(draw);
}

function listen(chart) {
  const { plot } = chart;
  let start = null;
  const stepAt = (event) => {
    const { left, w, from, to } = chart.scale;
    const part = (event.clientX - plot.getBoundingClientRect().left - left) / w;
    return from + Math.min(Math.max(part, 0), 1) * (to - from);
  };
  plot.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || !chart.scale) return;
    start = { x: event.clientX, step: stepAt(event) };
    plot.setPointerCapture(event.pointerId);
  });
  plot.addEventListener("pointermove", (event) => {
    if (!chart.scale) return;
    moveCursor(nearestStep(stepAt(event)));
    if (start === null) return;
    const { x, h } = chart.scale;
    const edges = [x(start.step), x(stepAt(event))].sort((a, b) => a - b);
    chart.selection?.remove();
    const box = { x: edges[0], y: 0, width: edges[1] - edges[0], height: h, class: "selection" };
    chart.layer.append((chart.selection = shape("rect", box)));
  });
  plot.addEventListener("pointerup", (event) => {
    const dragged = start !== null && Math.abs(event.clientX - start.x) > 6 && chart.scale;
    const edges = dragged ? [start.step, stepAt(event)].sort((a, b) => a - b) : null;
    start = null;
    chart.selection?.remove();
    if (edges) zoom(Math.floor(edges[0]), Math.ceil(edges[1]));
  });
  plot.addEventListener("pointercancel", () => {
    start = null;
    chart.selection?.remove();
  });
  plot.addEventListener("pointerleave", () => moveCursor(null));
  plot.addEventListener("dblclick", () => zoom(firstStep, lastStep));
  plot.addEventListener("keydown", (event) => press(chart, event));
}

/** Move the cursor by keys, and say where it is. */
function press(chart, event) {
  const inView = everyStep.filter((step) => step >= view.from && step <= view.to);
  const now = view.cursor === null ? -1 : inView.indexOf(view.cursor);
  const keys = {
    ArrowRight: () => inView[Math.min(now + 1, inView.length - 1)],
    ArrowLeft: () => inView[Math.max(now - 1, 0)],
    Home: () => inView[0],
    End: () => inView.at(-1),
    Escape: () => null,
  };
  if (!Object.hasOwn(keys, event.key)) return;
  event.preventDefault();
  moveCursor(keys[event.key]() ?? null);
  if (event.key === "Escape") zoom(firstStep, lastStep);
  const values = chart.curves.map((curve) => `${curve.label} ${valueText(curve)}`);
  find("cursor").textContent =
    view.cursor === null ? "all steps" : `${chart.key}, step ${view.cursor}: ${values.join(", ")}`;
}

function listenToControls() {
  for (const name of ["smooth", "log"]) {
    find(name).checked = view[name];
    find(name).addEventListener("change", (event) => {
      view[name] = event.target.checked;
      charts.forEach(draw);
    });
  }
  const typed = (name) => find(name).valueAsNumber;
  for (const name of ["from", "to"]) {
    Object.assign(find(name), { min: firstStep, max: lastStep });
    find(name).addEventListener("change", () => zoom(typed("from"), typed("to")));
  }
  find("all").addEventListener("click", () => zoom(firstStep, lastStep));
  find("controls").addEventListener("submit", (event) => event.preventDefault());
}

function swatch(colour, dashed) {
  const line = { x1: 0, x2: 18, y1: 5, y2: 5, class: `line ${dashed ? "dashed" : ""}` };
  return shape("svg", { class: `swatch ${colour}`, "aria-hidden": "true" }, shape("line", line));
}

function showChart(chart) {
  const named = chart.large || (!several && chart.curves.length > 1);
  chart.values = chart.curves.map(() => element("span", { className: "value" }));
  chart.note = element("p", { className: "quiet" });
  const label = `${chart.key} by step`;
  chart.plot = shape("svg", { class: "plot", role: "img", tabindex: 0, "aria-label": label });
  const items = chart.curves.map((curve, i) => {
    const name = named ? [element("span", { className: "quiet" }, curve.label)] : [];
    const sign = named || several ? [swatch(curve.colour, curve.dashed)] : [];
    return element("li", { title: curve.label }, ...sign, ...name, chart.values[i]);
  });
  const legend = element("ul", { className: "legend" }, ...items);
  const caption = element("figcaption", {}, element("b", {}, chart.key), legend);
  const figure = element("figure", { className: chart.large ? "large" : "" }, caption);
  figure.append(chart.plot, chart.note);
  find("curves").append(figure);
  listen(chart);
}
