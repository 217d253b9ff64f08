// SPDX-License-Identifier: Apache-2.0
// The page of `dsjax view`: elements, texts of numbers, and the arithmetic of curves.
//
// In: values. Out: elements, texts, lists; what fails is told in the page. What runs say becomes
// text nodes, never HTML. Not done here: what is drawn (curves.js), the page's parts (page.js); the
// three are one script, in this order.
"use strict";

const EMA = 0.9;
const MOST_POINTS = 2000; // of a curve, in one drawing

const find = (id) => document.getElementById(id);

window.addEventListener("error", (event) => {
  find("failure").hidden = false;
  find("failure").textContent = `The page is not complete: ${event.message}`;
});

function element(name, properties, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

function shape(name, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function circle(cx, cy, r, style) {
  return shape("circle", { cx, cy, r, class: style });
}

/** Any value of a run as text; numbers with four digits or more. */
function shown(value) {
  if (value === null || value === undefined) return "none";
  if (typeof value !== "number") return typeof value === "string" ? value : JSON.stringify(value);
  const size = Math.abs(value);
  if (size >= 1e15 || (size < 1e-3 && value !== 0)) return value.toExponential(3);
  if (Number.isInteger(value) || size >= 1000) return Math.round(value).toLocaleString("en");
  return value.toPrecision(4);
}

/** A number on an axis, short. */
function tickText(value) {
  const size = Math.abs(value);
  if (size < 1e-4 && value !== 0) return value.toExponential().replace("e-", "e−");
  if (size < 1e4) return String(value);
  return value.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 6 });
}

function clock(seconds) {
  const whole = Math.round(seconds);
  const two = (number) => String(number % 60).padStart(2, "0");
  return `${Math.floor(whole / 3600)}:${two(Math.floor(whole / 60))}:${two(whole)}`;
}

/** The exponential moving average, without the pull towards 0 that it would begin with. */
function smoothed(values) {
  let [mean, weight] = [0, 0];
  return values.map((value) => {
    if (value === null) return null;
    mean = EMA * mean + (1 - EMA) * value;
    weight = EMA * weight + (1 - EMA);
    return mean / weight;
  });
}

/** The points between two steps, one neighbour on each side; what cannot be drawn is a gap. */
function pointsBetween({ from, to }, steps, values, isDrawable) {
  const points = [];
  steps.forEach((step, i) => {
    if (step < from && steps[i + 1] < from) return;
    if (step > to && steps[i - 1] > to) return;
    points.push([step, values[i] !== null && isDrawable(values[i]) ? values[i] : null]);
  });
  return points;
}

/** The lowest and the highest of every few points, and one gap if they have any. */
function thinned(points, size) {
  if (size <= 1) return points;
  const kept = [];
  for (let start = 0; start < points.length; start += size) {
    const part = points.slice(start, start + size);
    const numbers = part.filter(([, value]) => value !== null);
    const least = (sign) => numbers.reduce((a, b) => (sign * b[1] < sign * a[1] ? b : a));
    const ends = numbers.length ? [least(1), least(-1)] : [];
    const gap = part.find(([, value]) => value === null);
    kept.push(...new Set([...ends, ...(gap ? [gap] : [])].sort((a, b) => a[0] - b[0])));
  }
  return kept;
}

/** Round numbers between two, about as many as asked for. */
function ticks(low, high, count, least = 0) {
  const rough = (high - low) / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const round = [1, 2, 2.5, 5, 10].map((n) => n * power).find((n) => n >= rough * 0.75);
  const size = Math.max(round, least);
  const found = [];
  for (let n = Math.ceil(low / size - 1e-9); n * size <= high + size * 1e-9; n++) {
    found.push(Number((n * size).toPrecision(12)));
  }
  return found;
}

function logTicks(low, high) {
  const [first, end] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const parts = high > low * 1000 ? [1] : high > low * 10 ? [1, 2, 5] : [1, 2, 3, 4, 5, 6, 7, 8, 9];
  const found = [];
  for (let power = first; power <= end; power++) {
    found.push(...parts.map((part) => Number(`${part}e${power}`)));
  }
  const inside = found.filter((value) => value >= low && value <= high);
  return inside.length > 1 ? inside : ticks(low, high, 3);
}

/** Where values lie between 0 (low) and 1 (high), with some room; and the axis' numbers. */
function valueScale(values, log, count) {
  const [to, back] = log ? [Math.log10, (x) => 10 ** x] : [(x) => x, (x) => x];
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) [low, high] = [Math.min(low, to(value)), Math.max(high, to(value))];
  const room = (high - low) * 0.06 || (log ? 0.1 : Math.abs(high) * 0.1 || 1);
  const [bottom, top] = [!log && low >= 0 ? Math.max(low - room, 0) : low - room, high + room];
  const marks = log ? logTicks(back(bottom), back(top)) : ticks(bottom, top, count);
  return { place: (value) => (to(value) - bottom) / (top - bottom), marks };
}

function pathOf(points, x, y) {
  let [text, pen] = ["", "M"];
  for (const [step, value] of points) {
    if (value !== null) text += `${pen}${x(step).toFixed(1)} ${y(value).toFixed(1)}`;
    if (value !== null && pen === "M") text += "h0"; // a point alone is seen as well
    pen = value === null ? "M" : "L";
  }
  return text;
}

/** The place in a curve's lists of what was known at a step; -1 before the first. */
function placeAt(steps, step) {
  let [low, high] = [0, steps.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}
