// What prompts computed again in the last hour: the costliest causes, each with an example and what would help.

import { call } from "./api.js";
import { $, count, element, oneLine, seconds } from "./dom.js";

const INTERVAL = 10000;

// Follows the report until the signal is aborted; the feed tells of whatever keeps the server from answering.
export async function followReport(signal) {
  while (!signal.aborted) {
    try {
      drawReport(await (await call("/cache/report", { signal })).json());
    } catch {
      if (signal.aborted) return;
    }
    await new Promise((done) => setTimeout(done, INTERVAL));
  }
}

function drawReport({ requests, price_tokens, causes }) {
  $("report-text").textContent = causes.length
    ? `${count(price_tokens)} tokens of ${count(requests)} requests would have come from the cache.`
    : `Nothing, in ${count(requests)} requests.`;
  $("report").replaceChildren(...causes.map(row));
}

function row({ cause, requests, price_tokens, price_seconds, remedy, example }) {
  const place = `…${oneLine(example.before.slice(-40))}`;
  return element(
    "tr",
    {},
    element("td", { title: remedy }, cause.replaceAll("_", " ")),
    element("td", { class: "number" }, count(requests)),
    element("td", { class: "number" }, count(price_tokens)),
    element("td", { class: "number" }, seconds(price_seconds ?? NaN)),
    element(
      "td",
      { title: `${example.rid}: ${example.text} ${remedy}` },
      element("span", { class: "quiet" }, place),
      element("mark", {}, oneLine(example.got.slice(0, 40))),
    ),
  );
}
