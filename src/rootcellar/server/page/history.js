// Tier occupancy and hit rate over time, and the rates that need two readings.

import { $, element, percent, svg } from "./dom.js";

const KEPT = 600; // readings, one a second
const GAP = 2; // seconds without a reading in which nothing happened: the server notes none while it is idle
const WINDOW = 30; // seconds over which the hit rate is taken
const SHOWN = 300; // seconds on the chart
const TIERS = ["DEVICE", "HOST", "STORAGE", "PEER"];
const readings = [];

// The readings that the server kept, in place of those that are here.
export function recall(samples) {
  readings.length = 0;
  samples.forEach(remember);
}

export function remember(numbers) {
  const { stats, latency, at } = numbers;
  if (readings.length && at < readings.at(-1).at) readings.length = 0; // the server was started anew
  if (readings.length && at - readings.at(-1).at > GAP) {
    const last = readings.at(-1);
    for (let t = Math.max(last.at + 1, at - SHOWN); t < at - 0.5; t += 1) readings.push({ ...last, at: t });
  }
  readings.push({
    at,
    tiers: TIERS.map((tier) => stats.occupancy[tier]), // { used, busy }: parts of its room
    asked: stats.input_tokens,
    hit: stats.hit_tokens,
    generated: stats.generated_tokens,
    peer: stats.copies?.["device-peer"] ?? stats.copies?.["peer-host"], // of a node of prefill or decode
    latency,
  });
  readings.splice(0, readings.length - KEPT);
}

// The reading about so many seconds before reading i, the first if there is none that old.
function before(i, seconds) {
  let j = i;
  while (j > 0 && readings[i].at - readings[j].at < seconds) j -= 1;
  return readings[j];
}

function hitRate(i, seconds) {
  const [now, then] = [readings[i], before(i, seconds)];
  return now.asked > then.asked ? (now.hit - then.hit) / (now.asked - then.asked) : undefined;
}

// Bytes a second between nodes while they moved, since then or, where nothing has moved since, ever; undefined: no such node.
function transfer(now, then) {
  if (now === undefined) return undefined;
  const [bytes, busy] = [now.bytes - (then?.bytes ?? 0), now.seconds - (then?.seconds ?? 0)];
  return busy > 0 ? bytes / busy : now.bytes / now.seconds;
}

export function rates() {
  const last = readings.length - 1;
  const [now, recent, minute] = [readings[last], before(last, 3), before(last, 60)];
  const first = now.latency.first_token;
  const firstThen = minute.latency.first_token;
  // A single reading has nothing to be compared with: what was since the start will do.
  const whole = now === minute;
  return {
    speed: now.at > recent.at ? (now.generated - recent.generated) / (now.at - recent.at) : 0,
    firstToken: whole ? first.sum / first.count : (first.sum - firstThen.sum) / (first.count - firstThen.count),
    hitRate: hitRate(last, 60) ?? (now.asked ? now.hit / now.asked : undefined),
    used: now.tiers[0]?.used,
    transfer: transfer(now.peer, minute.peer),
  };
}

export function draw() {
  const chart = $("history");
  const width = chart.clientWidth || 300;
  const height = chart.clientHeight || 190;
  const [left, right, top, bottom] = [34, 6, 8, 20];
  const end = readings.at(-1).at;
  const span = Math.min(SHOWN, Math.max(30, end - readings[0].at));
  const x = (at) => left + ((at - (end - span)) / span) * (width - left - right);
  const y = (part) => top + (1 - part) * (height - top - bottom);
  chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const parts = [0, 0.5, 1].flatMap((part) => [
    svg("line", { class: "grid", x1: left, x2: width - right, y1: y(part), y2: y(part) }),
    svg("text", { x: left - 5, y: y(part) + 4, "text-anchor": "end" }, `${100 * part}%`),
  ]);
  for (const [part, anchor] of [[1, "start"], [0.5, "middle"], [0, "end"]]) {
    const label = part ? `${Math.round(span * part)} s ago` : "now";
    parts.push(svg("text", { x: x(end - span * part), y: height - 5, "text-anchor": anchor }, label));
  }
  const shown = readings.map((reading, i) => ({ ...reading, i })).filter((reading) => reading.at >= end - span);
  const path = (points) => points.map(([at, v], i) => `${i ? "L" : "M"}${x(at).toFixed(1)},${y(v).toFixed(1)}`).join("");
  const present = TIERS.filter((_, t) => readings.at(-1).tiers[t] !== undefined);
  for (const tier of present) {
    const t = TIERS.indexOf(tier);
    const known = shown.filter((r) => r.tiers[t] !== undefined);
    const line = (part) => path(known.map((r) => [r.at, r.tiers[t][part]]));
    const area = (part) => `${line(part)}L${x(known.at(-1).at)},${y(0)}L${x(known[0].at)},${y(0)}Z`;
    const name = tier.toLowerCase();
    parts.push(
      svg("path", { class: `area ${name}`, d: area("used") }),
      svg("path", { class: `area busy ${name}`, d: area("busy") }),
      svg("path", { class: `line ${name}`, d: line("used") }),
    );
  }
  const rated = shown.map((r) => [r.at, hitRate(r.i, WINDOW)]).filter(([, v]) => v !== undefined);
  if (rated.length) parts.push(svg("path", { class: "line hit", d: path(rated) }));
  chart.replaceChildren(...parts);
  describe(present);
}

function describe(present) {
  const now = readings.at(-1);
  const legend = present.flatMap((tier) => {
    const name = tier.toLowerCase();
    return [
      element("span", {}, element("i", { class: `swatch ${name}` }), `${name}: in use`),
      element("span", {}, element("i", { class: `swatch used ${name}` }), "and evictable"),
    ];
  });
  legend.push(element("span", {}, element("i", { class: "swatch hit" }), "hit rate"));
  $("history-legend").replaceChildren(...legend);
  const words = present.map((tier) => {
    const { used, busy } = now.tiers[TIERS.indexOf(tier)];
    return `${tier.toLowerCase()} ${percent(used)} used, ${percent(busy)} by what runs`;
  });
  $("history-text").textContent =
    `${words.join("; ")}; ${percent(now.asked ? now.hit / now.asked : NaN)} of all prompt tokens looked up were hits.`;
}
