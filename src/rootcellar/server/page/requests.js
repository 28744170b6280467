// Running requests: how many are in each stage, and each with what it has.

import { $, element } from "./dom.js";
import { nameOf, stageOf } from "./names.js";

export function drawRequests({ stats, requests }) {
  const most = Math.max(1, ...Object.values(stats.stages));
  $("stages").replaceChildren(
    ...Object.entries(stats.stages).map(([stage, number]) => {
      const filled = element("i");
      filled.style.width = `${(100 * number) / most}%`;
      return element(
        "div",
        { class: "stage" },
        element("span", { class: "name", title: stage }, stageOf(stage)),
        element("span", { class: "bar" }, filled),
        element("span", { class: "number" }, String(number)),
      );
    }),
  );
  const rows = requests.map(row);
  const hidden = stats.running + stats.waiting - requests.length;
  if (hidden > 0) rows.push(element("tr", {}, element("td", { colspan: 4, class: "quiet" }, `and ${hidden} more`)));
  if (!rows.length) rows.push(element("tr", {}, element("td", { colspan: 4, class: "quiet" }, "Nothing runs.")));
  $("requests").replaceChildren(...rows);
}

function row(request) {
  const { prompt_tokens, cached_tokens, completion_tokens, max_new_tokens } = request;
  const all = prompt_tokens + max_new_tokens;
  const bar = element("span", { class: "bar" });
  const parts = { cached: cached_tokens, computed: prompt_tokens - cached_tokens, made: completion_tokens };
  for (const [name, tokens] of Object.entries(parts)) {
    const part = element("i", { class: name });
    part.style.width = `${(100 * tokens) / all}%`;
    bar.append(part);
  }
  const words = `${prompt_tokens} prompt tokens, ${cached_tokens} of them cached; ${completion_tokens} generated`;
  bar.setAttribute("title", words);
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", words);
  return element(
    "tr",
    {},
    element("td", { class: "mono", title: request.rid }, nameOf(request.rid)),
    element("td", { title: request.stage }, stageOf(request.stage)),
    element("td", {}, bar),
    element("td", { class: "number" }, request.seconds.toFixed(1)),
  );
}
