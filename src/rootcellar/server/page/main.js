// The page: follows the server's feed and hands what comes to those who draw it.

import { events, Refused, setKey } from "./api.js";
import { offerImages, saveTrace, startChat } from "./chat.js";
import { $, count, percent, seconds } from "./dom.js";
import { draw, rates, recall, remember } from "./history.js";
import { drawMemory } from "./memory.js";
import { followReport } from "./report.js";
import { drawRequests } from "./requests.js";
import { drawTree, startTree } from "./tree.js";

let cache = null; // the last look at the tree and the memory
let watching = null; // AbortController of the feed

function showStatus(state, words) {
  $("status").dataset.state = state;
  $("status").textContent = words;
}

function showNumbers(numbers) {
  remember(numbers);
  const { stats } = numbers;
  const { speed, firstToken, hitRate, used, transfer } = rates();
  $("model").textContent = `${numbers.model} · rootcellar ${numbers.version}`;
  $("running").textContent = stats.running;
  $("queued").textContent = stats.waiting;
  $("speed").textContent = speed < 10 ? speed.toFixed(1) : count(speed);
  $("first-token").textContent = seconds(firstToken);
  $("hit-rate").textContent = percent(hitRate);
  $("used").textContent = percent(used);
  $("transfer-tile").hidden = transfer === undefined;
  $("transfer").textContent = transfer > 0 ? `${(transfer / 1e9).toFixed(2)} GB/s` : "–";
  draw();
  drawRequests(numbers);
}

function showCache(look) {
  cache = look;
  drawTree(look.tree);
  drawMemory(look.memory);
}

function askForKey(reason) {
  $("key-reason").textContent = reason;
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

async function follow() {
  watching?.abort();
  const mine = (watching = new AbortController());
  followReport(mine.signal);
  offerImages().catch(() => {}); // without a key, or while the server starts: then there are none
  while (!mine.signal.aborted) {
    try {
      for await (const { event, data } of events("/feed", { signal: mine.signal })) {
        const value = JSON.parse(data);
        if (event === "trouble") {
          showStatus("trouble", value.message);
          continue;
        }
        showStatus("live", "live");
        if (event === "history") recall(value);
        if (event === "numbers") showNumbers(value);
        if (event === "cache") showCache(value);
      }
    } catch (error) {
      if (mine.signal.aborted) return;
      if (error instanceof Refused && error.status === 401) {
        showStatus("key", "needs a key");
        askForKey(error.message);
        return;
      }
      showStatus("trouble", error instanceof Refused ? error.message : "no connection; trying again");
    }
    await new Promise((done) => setTimeout(done, 2000));
  }
}

function start() {
  startTree();
  startChat(askForKey);
  $("status").addEventListener("click", () => askForKey("Another key takes the place of the one in use."));
  $("key-cancel").addEventListener("click", () => $("key-dialog").close());
  $("key-form").addEventListener("submit", () => {
    setKey($("key").value);
    $("key").value = "";
    follow();
  });
  $("save-trace").addEventListener("click", (event) => {
    event.preventDefault();
    saveTrace().catch((error) => showStatus("trouble", error.message));
  });
  const redraw = () => cache && showCache(cache);
  new ResizeObserver(redraw).observe($("tree-scroll"));
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  follow();
}

start();
