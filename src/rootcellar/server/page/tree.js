// The radix tree, from left to right: width is tokens, colour the nearest tier, paleness the time since the last use.

import { $, count, element, oneLine, seconds, svg } from "./dom.js";
import { nameOf, stageOf } from "./names.js";

const ROW = 22;
const TIERS = ["DEVICE", "HOST", "STORAGE", "PEER"];
let tree = { nodes: [], requests: [], total: 0 };
let chosen = null; // id of a node
let followed = null; // rid of a request whose way is shown

export function drawTree(data) {
  tree = data;
  render();
}

// The nearest tier on which any kind holds something of the node.
const tierOf = (node) =>
  TIERS.find((tier) => Object.values(node.held).some((tiers) => tier in tiers))?.toLowerCase() ?? "none";

// How strong the colour is: 0.6 for what was used just now, 0.25 after five minutes, towards 0.1 after hours.
const strength = (idle) => 0.07 + 0.55 * Math.max(0.05, 1 - Math.log10(1 + idle) / 4.5) ** 1.6;

function layout() {
  const below = new Map([[0, []]]);
  for (const node of tree.nodes) below.set(node.id, []);
  for (const node of tree.nodes) below.get(node.parent)?.push(node);
  const places = new Map();
  let row = 0;
  const place = (node) => {
    const first = row;
    const children = below.get(node.id).sort((a, b) => a.id - b.id);
    children.forEach(place);
    if (!children.length) row += 1;
    places.set(node.id, { row: first, rows: row - first });
  };
  const groups = [];
  const spaces = Map.groupBy
    ? Map.groupBy(below.get(0), (node) => node.namespace)
    : below.get(0).reduce((all, n) => all.set(n.namespace, [...(all.get(n.namespace) ?? []), n]), new Map());
  for (const [namespace, roots] of spaces) {
    if (spaces.size > 1) {
      groups.push({ namespace, row });
      row += 1;
    }
    roots.sort((a, b) => a.id - b.id).forEach(place);
  }
  return { places, groups, rows: row };
}

function render() {
  const picture = $("tree");
  const width = Math.max(280, $("tree-scroll").clientWidth - 4);
  const { places, groups, rows } = layout();
  const tokens = Math.max(1, ...tree.nodes.map((node) => node.start + node.length));
  const scale = (width - 4) / tokens;
  const height = Math.max(1, rows) * ROW + 4;
  const focused = document.activeElement?.dataset?.node;
  const shares = sharers();
  const onTrail = new Set(tree.requests.filter((r) => r.rid === followed).flatMap((r) => r.nodes));
  const parts = groups.map(({ namespace, row }) =>
    svg("text", { class: "namespace", x: 4, y: row * ROW + 16 }, `namespace ${namespace.split("/").pop() || "(none)"}`),
  );
  const tabbable = tree.nodes.some((node) => node.id === chosen) ? chosen : tree.nodes[0]?.id;
  for (const node of tree.nodes) {
    const { row, rows: tall } = places.get(node.id);
    const box = { x: 2 + node.start * scale, y: 2 + row * ROW, w: Math.max(3, node.length * scale), h: tall * ROW };
    parts.push(block(node, box, shares.get(node.id) ?? [], onTrail.has(node.id), node.id === tabbable));
  }
  picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
  picture.setAttribute("width", width);
  picture.setAttribute("height", height);
  picture.replaceChildren(svg("defs", {}, stripes()), ...parts);
  if (focused) picture.querySelector(`[data-node="${focused}"]`)?.focus({ preventScroll: true });
  legend();
  describe(shares);
}

// What an image's tokens are marked with.
function stripes() {
  const made = svg("pattern", { id: "image-span", width: 6, height: 6, patternUnits: "userSpaceOnUse" });
  made.append(svg("path", { d: "M0 6L6 0", stroke: "currentColor", "stroke-width": 2 }));
  return made;
}

function block(node, box, sharing, trail, tabbable) {
  const tier = tierOf(node);
  const live = sharing.filter((request) => request.stage !== "FINISHED").length;
  const name =
    `${node.length} tokens from ${node.start} on, ${tier}, hit ${node.hits} times, ` +
    `used ${seconds(node.idle)} ago, shared by ${sharing.length} requests`;
  const classes = `${tier}${trail ? " trail" : ""}${node.id === chosen ? " chosen" : ""}`;
  const group = svg("g", {
    class: classes, role: "button", tabindex: tabbable ? 0 : -1, "aria-label": name,
    "aria-pressed": String(node.id === chosen), "data-node": node.id, "data-sharers": sharing.length,
  });
  const { x, y, w, h } = box;
  group.append(
    svg("title", {}, `${name}\n${node.text ?? ""}`),
    svg("rect", { x, y, width: w, height: h, "fill-opacity": strength(node.idle) }),
  );
  for (const [start, length] of node.images ?? []) {
    const [from, wide] = [(start / node.length) * w, (length / node.length) * w];
    group.append(svg("rect", { class: "image", x: x + from, y: y + h - 6, width: Math.max(2, wide), height: 4 }));
  }
  const letters = Math.floor((w - 10) / 6.7);
  if (letters > 2 && node.text) {
    const text = oneLine(node.text);
    const shown = text.length > letters ? `${text.slice(0, letters - 1)}…` : text;
    group.append(svg("text", { x: x + 5, y: y + ROW / 2 + 4 }, shown));
  }
  if (live) group.append(svg("circle", { class: "live", cx: x + w - 5, cy: y + 6, r: 3.5 }));
  return group;
}

// Requests by node.
function sharers() {
  const all = new Map();
  for (const request of tree.requests) {
    for (const id of request.nodes) all.set(id, [...(all.get(id) ?? []), request]);
  }
  return all;
}

function legend() {
  const tiers = [...new Set(tree.nodes.map(tierOf))];
  const entries = tiers.map((tier) => element("span", {}, element("i", { class: `swatch ${tier}` }), tier));
  const shown = tree.nodes.length;
  const words = shown < tree.total ? `the ${shown} most important of ${count(tree.total)} nodes` : `${shown} nodes`;
  $("tree-legend").replaceChildren(
    ...entries, element("span", {}, "pale: long unused"), element("span", {}, "● in use now"),
    ...(tree.nodes.some((node) => node.images?.length) ? [element("span", {}, "striped: an image")] : []),
    element("span", {}, words),
  );
}

function describe(shares) {
  const node = tree.nodes.find((each) => each.id === chosen);
  const panel = $("node");
  if (!node) {
    chosen = null;
    panel.replaceChildren();
    return;
  }
  const held = Object.entries(node.held).flatMap(([kind, tiers]) =>
    Object.entries(tiers).map(([tier, tokens]) => `${kind} ${tier.toLowerCase()} ${tokens}`),
  );
  const sharing = shares.get(node.id) ?? [];
  const list = sharing.map((request) => {
    const button = element(
      "button",
      { type: "button", "aria-pressed": String(request.rid === followed), title: request.rid },
      `${nameOf(request.rid)} · ${stageOf(request.stage)}`,
    );
    button.addEventListener("click", () => follow(request.rid));
    return element("li", {}, button);
  });
  const facts =
    `Tokens ${node.start} to ${node.start + node.length} · held: ${held.join(", ") || "nothing"} · hit ${node.hits} ` +
    `times · used ${seconds(node.idle)} ago, made ${seconds(node.age)} ago · ${node.children} below`;
  const who = sharing.length
    ? `Shared by ${sharing.length} of the requests that run or ended lately; choose one to see its way:`
    : "None of the requests that run or ended lately goes through it.";
  const content = [element("strong", {}, facts)];
  if (node.text) content.push(element("pre", { class: "mono" }, node.text + (node.length > node.head.length ? " …" : "")));
  content.push(element("span", { class: "quiet" }, who), element("ul", { class: "sharers" }, ...list));
  // A list that did not change keeps its focus.
  const made = element("div", { class: "node" }, ...content);
  if (panel.innerHTML !== made.innerHTML) panel.replaceChildren(...made.childNodes);
}

function choose(id) {
  chosen = chosen === id ? null : id;
  render();
}

function follow(rid) {
  followed = followed === rid ? null : rid;
  render();
  document.querySelector(`#node button[title="${CSS.escape(rid)}"]`)?.focus();
}

// Keyboard: arrows walk the tree as it is drawn, Enter chooses.
function walk(id, key) {
  const node = tree.nodes.find((each) => each.id === id);
  const siblings = tree.nodes.filter((each) => each.parent === node.parent).sort((a, b) => a.id - b.id);
  const at = siblings.indexOf(node);
  const target = {
    ArrowLeft: tree.nodes.find((each) => each.id === node.parent),
    ArrowRight: tree.nodes.filter((each) => each.parent === id).sort((a, b) => a.id - b.id)[0],
    ArrowUp: siblings[at - 1],
    ArrowDown: siblings[at + 1],
  }[key];
  if (target) $("tree").querySelector(`[data-node="${target.id}"]`).focus();
}

export function startTree() {
  const idOf = (event) => Number(event.target.closest?.("[data-node]")?.dataset.node);
  $("tree").addEventListener("click", (event) => idOf(event) && choose(idOf(event)));
  $("tree").addEventListener("keydown", (event) => {
    const id = idOf(event);
    if (!id) return;
    if (event.key === "Enter" || event.key === " ") choose(id);
    else if (event.key.startsWith("Arrow")) walk(id, event.key);
    else return;
    event.preventDefault();
  });
}
