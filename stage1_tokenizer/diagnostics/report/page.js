// Readouts under the pointer: the numbers of a chart and the code at a position. Without this script the page still has
// all curves, numbers and codes.
"use strict";
document.documentElement.classList.add("js");

const grouped = (number) => number.toLocaleString("en-US");
const few = (value) => {
  if (Number.isInteger(value)) return grouped(value);
  const size = Math.abs(value);
  return size >= 1e-3 && size < 1e9 ? Number(value.toPrecision(4)).toLocaleString("en-US", { maximumFractionDigits: 8 })
    : value.toExponential(2);
};
const share = (part) => {
  const text = (100 * part).toFixed(part >= 0.01 ? 1 : 2).replace(/\.?0+$/, "");
  return part > 0 && part < 0.0001 ? "< 0.01 %" : part >= 0.9995 && part < 1 ? "> 99.9 %" : `${text} %`;
};
const times = (number) => (number === 1 ? "once" : number === 2 ? "twice" : `${grouped(number)} times`);
const element = (name, className) => Object.assign(document.createElement(name), { className });

// Boxes that are too narrow for their content become tab stops, so that arrow keys scroll them.
const labels = new Map();
const boxes = [...document.querySelectorAll(".scroll")].map((box) => {
  const label = box.dataset.label, before = labels.get(label) ?? 0;
  labels.set(label, before + 1);
  return [box, before ? `${label} (${before + 1})` : label];
});
const check = () => boxes.forEach(([box, label]) => {
  const scrolls = box.scrollWidth > box.clientWidth + 1;
  Object.entries({ tabindex: 0, role: "region", "aria-label": label })
    .forEach(([name, value]) => (scrolls ? box.setAttribute(name, value) : box.removeAttribute(name)));
});
check();
addEventListener("resize", check);
document.querySelectorAll("details").forEach((fold) => fold.addEventListener("toggle", check));

// Charts: a readout at the step nearest to the pointer; arrow keys move it left and right.
let drawings = 0;
for (const area of document.querySelectorAll(".area[data-chart]")) {
  const chart = JSON.parse(area.dataset.chart);
  const figure = area.closest("figure");
  const readout = figure.querySelector(".readout");
  const steps = [...new Set(chart.series.flatMap((series) => series.x))].sort((a, b) => a - b);
  const axis = figure.querySelector(".x-name").textContent;
  const cursor = element("div", "cursor");
  cursor.hidden = true;
  area.append(cursor);
  readout.hidden = false;
  let now = steps.length - 1;
  // Screen readers skip the content of a slider, so the drawing's label becomes its description.
  const drawing = area.querySelector("svg");
  drawing.id = `drawing-${++drawings}`;

  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) { const middle = (low + high) >> 1; if (xs[middle] <= x) low = middle; else high = middle; }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  };
  const words = (place) => {
    const step = steps[place], reach = (chart.x[1] - chart.x[0]) / 25;
    const values = chart.series.map((series) => [series.name, nearest(series.x, step), series])
      .filter(([, at, series]) => Math.abs(series.x[at] - step) <= reach)
      .map(([name, at, series]) => `${name} ${few(series.y[at])}`);
    return `${axis} ${grouped(step)}: ${values.join(", ")}`;
  };
  const show = (place) => {
    now = Math.max(0, Math.min(steps.length - 1, place));
    readout.textContent = words(now);
    cursor.hidden = false;
    cursor.style.left = `${(100 * (steps[now] - chart.x[0])) / (chart.x[1] - chart.x[0])}%`;
    area.setAttribute("aria-valuenow", steps[now]);
    area.setAttribute("aria-valuetext", readout.textContent);
  };
  const hide = () => { if (document.activeElement !== area) { cursor.hidden = true; readout.textContent = ""; } };

  Object.entries({
    tabindex: 0, role: "slider", "aria-label": `${figure.querySelector("h3").textContent}, by ${axis}`,
    "aria-valuemin": steps[0], "aria-valuemax": steps[steps.length - 1], "aria-valuenow": steps[now],
    "aria-valuetext": words(now), "aria-describedby": drawing.id,
  }).forEach(([name, value]) => area.setAttribute(name, value));
  area.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    const x = chart.x[0] + ((event.clientX - box.left) / box.width) * (chart.x[1] - chart.x[0]);
    show(nearest(steps, x));
  });
  area.addEventListener("pointerleave", hide);
  area.addEventListener("focus", () => show(now));
  area.addEventListener("blur", hide);
  area.addEventListener("keydown", (event) => {
    const far = Math.max(1, Math.round(steps.length / 10));
    const moves = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -far, PageUp: far,
      Home: -steps.length, End: steps.length };
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(now + moves[event.key]);
  });
}

// Tokens: one position at a time is current, chosen by pointer, tap or arrow keys.
const block = document.getElementById("tokens-data");
if (block) {
  const data = JSON.parse(block.textContent);
  const root = document.querySelector(".tokens");
  const find = (selector) => root.querySelector(selector);
  const overlays = [...root.querySelectorAll(".overlay")];
  const buttons = [...document.querySelectorAll(".picker button")];
  const [h, w] = data.grid, [rows, columns] = data.shown;
  const cells = overlays.map((overlay) => [...overlay.querySelectorAll("td")]);
  let shownImage = 0;
  const current = overlays.map(() => 0);

  // All positions of each code: [image, row, column].
  const where = new Map();
  data.codes.forEach((codes, number) => codes.forEach((code, place) => {
    if (!where.has(code)) where.set(code, []);
    where.get(code).push([number, Math.floor(place / w), place % w]);
  }));

  const codeAt = (number, cell) => data.codes[number][Math.floor(cell / columns) * w + (cell % columns)];
  const patch = (kind, code) => {
    const shown = find(`.patches .${kind}`);
    if (!shown) return;
    const place = data[kind][code];
    shown.closest("figure").hidden = place === undefined;
    if (place !== undefined) shown.style.backgroundPosition = place;
  };

  // An element that shows a position of another image and its surroundings.
  const WINDOW = 5;
  const context = ([number, row, column]) => {
    const high = Math.min(WINDOW, h), wide = Math.min(WINDOW, w);
    const top = Math.max(0, Math.min(h - high, row - (high >> 1))), left = Math.max(0, Math.min(w - wide, column - (wide >> 1)));
    const across = data.columns, down = Math.ceil(data.codes.length / across);
    const span = element("span", "");
    const at = (offset, part, whole) => (whole === part ? 0 : (100 * offset) / (whole - part));
    const x = (number % across) * w + left, y = Math.floor(number / across) * h + top;
    span.style.backgroundSize = `${(100 * across * w) / wide}% ${(100 * down * h) / high}%`;
    span.style.backgroundPosition = `${at(x, wide, across * w)}% ${at(y, high, down * h)}%`;
    Object.entries({ "--x": (100 * (column - left)) / wide, "--y": (100 * (row - top)) / high, "--w": 100 / wide, "--h": 100 / high })
      .forEach(([name, value]) => span.style.setProperty(name, `${value}%`));
    const label = data.labels[number];
    span.setAttribute("role", "img");
    span.setAttribute("aria-label", `the same code in another image${label ? ` (${label})` : ""}, row ${row + 1}, column ${column + 1}`);
    return span;
  };

  const look = (cell, focus) => {
    current[shownImage] = cell;
    const own = cells[shownImage], code = codeAt(shownImage, cell);
    own.forEach((td, place) => {
      td.classList.toggle("now", place === cell);
      td.classList.toggle("same", place !== cell && codeAt(shownImage, place) === code);
      td.tabIndex = place === cell ? 0 : -1;
    });
    const places = where.get(code), here = places.filter(([number]) => number === shownImage).length;
    const [count, rank] = data.used[code];
    find(".number").textContent = code;
    patch("mean", code);
    patch("alone", code);
    find(".said").textContent = `Row ${Math.floor(cell / columns) + 1}, column ${(cell % columns) + 1}: code ${code}. `
      + `It occurs ${times(here)} in this image, and ${times(count)} in all ${grouped(data.images)} images, `
      + `${share(count / data.total)} of the positions: rank ${grouped(rank)} of ${grouped(data.distinct)} by use.`;
    const perImage = new Map(places.filter(([number]) => number !== shownImage).map((place) => [place[0], place]));
    const others = [...perImage.values()];
    find(".elsewhere").replaceChildren(...others.slice(0, 8).map(context));
    find(".elsewhere-title").textContent = others.length
      ? `Also in ${grouped(others.length)} of ${grouped(data.codes.length - 1)} other images on this page${others.length > 8 ? ", among them" : ""}:`
      : `In none of the ${grouped(data.codes.length - 1)} other images on this page.`;
    if (focus) own[cell].focus();
  };

  const choose = (number) => {
    shownImage = number;
    overlays.forEach((overlay, each) => { overlay.hidden = each !== number; });
    buttons.forEach((button, each) => button.setAttribute("aria-pressed", String(each === number)));
    look(current[number], false);
  };

  overlays.forEach((overlay, number) => {
    const table = overlay.querySelector("table");
    table.setAttribute("role", "grid");
    table.querySelectorAll("tr").forEach((row) => row.setAttribute("role", "row"));
    cells[number].forEach((td, cell) => {
      td.setAttribute("role", "gridcell");
      td.tabIndex = -1;
      td.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse") look(cell, false); });
      td.addEventListener("click", () => look(cell, true));
      td.addEventListener("focus", () => { if (current[number] !== cell) look(cell, false); });
    });
    table.addEventListener("keydown", (event) => {
      const at = current[number], row = Math.floor(at / columns), column = at % columns;
      const end = rows * columns - 1;
      const moves = {
        ArrowLeft: column > 0 ? at - 1 : at, ArrowRight: column < columns - 1 ? at + 1 : at,
        ArrowUp: row > 0 ? at - columns : at, ArrowDown: row < rows - 1 ? at + columns : at,
        Home: event.ctrlKey ? 0 : row * columns, End: event.ctrlKey ? end : row * columns + columns - 1,
        PageUp: column, PageDown: (rows - 1) * columns + column,
      };
      if (!(event.key in moves)) return;
      event.preventDefault();
      look(moves[event.key], true);
    });
  });
  buttons.forEach((button, number) => button.addEventListener("click", () => choose(number)));
  find(".show-reconstruction").addEventListener("change", (event) => root.classList.toggle("reconstructed", event.target.checked));
  find(".show-numbers").addEventListener("change", (event) => root.classList.toggle("numbered", event.target.checked));

  data.start.forEach((cell, number) => { current[number] = cell; });
  choose(0);
}

// The table of contents marks the section on the screen.
const links = new Map([...document.querySelectorAll(".contents a")].map((link) => [link.hash.slice(1), link]));
if ("IntersectionObserver" in window) {
  const seen = new Set();
  const watch = new IntersectionObserver((entries) => {
    entries.forEach((entry) => (entry.isIntersecting ? seen.add(entry.target.id) : seen.delete(entry.target.id)));
    const first = [...links.keys()].find((name) => seen.has(name));
    links.forEach((link, name) => link.classList.toggle("here", name === first));
  }, { rootMargin: "-10% 0px -60% 0px" });
  document.querySelectorAll("main > section").forEach((each) => watch.observe(each));
}
