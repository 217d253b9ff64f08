// SPDX-License-Identifier: Apache-2.0
// The page of `dsjax view`: cards, tables and configurations around the curves.
//
// In: the snapshots of runs. Out: the page's parts, drawn when this is read.

function definitions(className, pairs) {
  const rows = pairs.map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value)),
  );
  return element("dl", { className }, ...rows);
}

function showRun(run, index) {
  const sign = several ? [swatch(`colour-${index % COLOURS}`, false)] : [];
  const state = element("span", { className: "state" }, run.state);
  const numbers = [
    ["loss", last(run, "loss")],
    ["eval loss", run.final.eval_loss ?? last(run, "eval_loss")],
    ["tokens/s", last(run, "tokens_per_second")],
    ["peak GiB", last(run, "device_memory_gib")],
  ].filter(([, value]) => value !== undefined);
  const tiles = [["step", run.progress], ...numbers.map(([name, value]) => [name, shown(value)])];
  if (typeof run.summary.train_runtime === "number") {
    tiles.push(["runtime", clock(run.summary.train_runtime)]);
  }
  const title = element("h3", {}, ...sign, element("span", {}, run.name), state);
  const facts = definitions("facts", Object.entries(run.facts));
  const parts = [title, definitions("tiles", tiles), facts];
  find("runs").append(element("article", { className: "card" }, ...parts));
}

/** A table; numbers stand right and under their heads, a missing value is empty. */
function table(head, rows) {
  const kind = (value) => (typeof value === "number" || value === null ? "number" : "text");
  const kinds = head.map((name, i) => kind(rows.find((row) => row[i] !== undefined)?.[i]));
  const top = head.map((name, i) => element("th", { scope: "col", className: kinds[i] }, name));
  const cell = (value) =>
    element("td", { className: kind(value) }, value === undefined ? "" : shown(value));
  const lines = rows.map(([name, ...values]) =>
    element("tr", {}, element("th", { scope: "row" }, name), ...values.map(cell)),
  );
  const parts = [element("thead", {}, element("tr", {}, ...top)), element("tbody", {}, ...lines)];
  return element("div", { className: "scroll", tabIndex: 0 }, element("table", {}, ...parts));
}

function showLastValues() {
  const keysOf = (run) => [...Object.keys(run.series), ...Object.keys(run.summary)];
  const keys = new Set(runs.flatMap(keysOf).filter((key) => key !== "step"));
  const value = (run, key) => (key in run.series ? last(run, key) : run.summary[key]);
  const rows = [...keys].map((key) => [key, ...runs.map((run) => value(run, key))]);
  find("last").append(table(["", ...runs.map((run) => run.name)], rows));
}

/** A run's evaluations; the final one, where it is, stands for the line of its step. */
function evaluationsOf(run) {
  const { run: digest, data, ...final } = run.final; // what it is of, which is told under the table
  if (!("eval_loss" in final)) return run.evaluations;
  const others = run.evaluations.filter((row) => row.step !== final.step);
  return [...others, { ...final, step: `${shown(final.step)} (final)` }];
}

function showEvaluations() {
  const section = find("evaluations");
  for (const run of runs) {
    const rows = evaluationsOf(run);
    if (!rows.length) continue;
    const found = rows.flatMap((row) => Object.keys(row)).filter((key) => key !== "step");
    const keys = [...new Set(found)];
    const cells = rows.map((row) => [shown(row.step), ...keys.map((key) => row[key])]);
    if (several) section.append(element("h3", {}, run.name));
    const names = keys.map((key) => key.replace(/^eval_/, ""));
    section.append(table(["step", ...names], cells));
    const { data } = run.final;
    if (data) section.append(element("p", { className: "quiet" }, `final: of ${shown(data)}`));
  }
  section.hidden = section.children.length === 1;
}

/** A key's value without the key, as its YAML has it. */
function valueOf(yaml, name) {
  return yaml === null ? undefined : yaml.slice(name.split(".").at(-1).length + 1).trim();
}

function showConfigs() {
  const section = find("differences");
  section.hidden = !several;
  const values = (name, yamls) => yamls.map((yaml) => valueOf(yaml, name));
  const rows = page.differences.map(([name, yamls]) => [name, ...values(name, yamls)]);
  if (rows.length) section.append(table(["", ...runs.map((run) => run.name)], rows));
  else section.append(element("p", { className: "quiet" }, "None, but for output_dir."));

  const marked = new Set(page.differences.map(([name]) => name));
  for (const run of runs) {
    const text = element("pre", {}, ...blocksOf(run.config, marked));
    const title = element("summary", {}, several ? `${run.name}: config.yaml` : "config.yaml");
    find("config").append(element("details", { open: !several }, title, text));
  }
}

/** A configuration as its file has it, a block for each section; some keys are marked. */
function blocksOf(config, marked) {
  const blocks = new Map();
  for (const [section, key, yaml] of config) {
    if (!blocks.has(section)) {
      blocks.set(section, element("div", { className: "block" }, section ? `${section}:\n` : ""));
    }
    const [name, text] = section ? [`${section}.${key}`, yaml.replace(/^/gm, "  ")] : [key, yaml];
    blocks.get(section).append(marked.has(name) ? element("mark", {}, text) : text, "\n");
  }
  return blocks.values();
}

const title = several ? `${runs.length} runs` : runs[0].name;
document.title = `${title} - dsjax view`;
find("made").textContent = `as of ${page.made}, by dsjax ${page.version}`;
runs.forEach(showRun);
charts.forEach(showChart);
showLastValues();
showEvaluations();
showConfigs();
listenToControls();
zoom(firstStep, lastStep);
// Drawing changes no size, so that this ends.
new ResizeObserver(() => charts.forEach(draw)).observe(find("curves"));
