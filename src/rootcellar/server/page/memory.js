// The device's pages, a cell for each page or for several.

import { $, count, element } from "./dom.js";

const NAMES = ["free", "cached", "shared", "own"];

export function drawMemory(pools) {
  const box = $("memory");
  while (box.children.length > pools.length) box.lastChild.remove();
  pools.forEach((pool, i) => {
    if (!box.children[i]) {
      box.append(element("figure", {}, element("figcaption", { class: "quiet" }), element("canvas", { role: "img" })));
    }
    drawPool(box.children[i], pool);
  });
}

function drawPool(figure, { pool, pages, pages_per_cell, cells }) {
  const [caption, canvas] = figure.children;
  const counts = [0, 0, 0, 0];
  for (const cell of cells) counts[cell] += 1;
  const each = pages_per_cell > 1 ? `, ${pages_per_cell} to a cell` : "";
  caption.textContent = `${pool}: ${count(pages)} pages${each}`;
  const shares = NAMES.map((name, state) => `${Math.round((100 * counts[state]) / cells.length)} % ${name}`);
  canvas.setAttribute("aria-label", `Pages of ${pool}: ${shares.join(", ")}`);
  const width = canvas.clientWidth || 300;
  const gap = 1;
  const size = Math.max(5, Math.min(16, Math.floor(Math.sqrt((width * 150) / Math.max(1, cells.length)))));
  const columns = Math.max(1, Math.floor((width + gap) / (size + gap)));
  const height = Math.max(1, Math.ceil(cells.length / columns)) * (size + gap);
  const ratio = window.devicePixelRatio || 1;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  canvas.style.height = `${height}px`;
  const style = getComputedStyle(document.documentElement);
  const colours = NAMES.map((name) => style.getPropertyValue(`--${name}`).trim());
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  for (let i = 0; i < cells.length; i += 1) {
    context.fillStyle = colours[cells[i]];
    context.fillRect((i % columns) * (size + gap), Math.floor(i / columns) * (size + gap), size, size);
  }
}
