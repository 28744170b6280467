// A chat with the model behind the server; each answer says how much of its prompt the cache had.

import { call, events, Refused } from "./api.js";
import { $, element, percent, seconds } from "./dom.js";
import { nameTurn } from "./names.js";

let turns = []; // messages of this conversation, the system message left out
let chats = 1;
let running = null; // AbortController of the answer under way
let images = []; // data URLs that go with the next question

// Whether the model sees images is known once somebody may ask for it.
export async function offerImages() {
  const info = await (await call("/model_info")).json();
  $("add-image").hidden = !info.has_image_understanding;
}

const readFile = (file) =>
  new Promise((done, failed) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => done(reader.result));
    reader.addEventListener("error", () => failed(reader.error));
    reader.readAsDataURL(file);
  });

async function addImages(files) {
  for (const file of files) if (file.type.startsWith("image/")) images.push(await readFile(file));
  showImages();
}

// What goes with the next question; a click takes it out.
function showImages() {
  const shown = images.map((url, i) => {
    const button = element(
      "button", { type: "button", "aria-label": `Take image ${i + 1} out` }, element("img", { src: url, alt: `image ${i + 1}` }),
    );
    button.addEventListener("click", () => {
      images.splice(i, 1);
      showImages();
    });
    return button;
  });
  $("shown").replaceChildren(...shown);
  $("shown").hidden = !images.length;
}

function startImages() {
  $("add-image").addEventListener("click", () => $("image").click());
  $("image").addEventListener("change", async () => {
    await addImages($("image").files);
    $("image").value = "";
  });
  $("question").addEventListener("paste", (event) => {
    if (!$("add-image").hidden) addImages(event.clipboardData?.files ?? []);
  });
}

export function startChat(askForKey) {
  startImages();
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) running.abort();
    else answer(askForKey);
  });
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!running) $("ask").requestSubmit();
    }
  });
  $("new-chat").addEventListener("click", () => {
    running?.abort();
    if (turns.length) chats += 1;
    turns = [];
    images = [];
    showImages();
    $("messages").replaceChildren();
    $("question").focus();
  });
}

function say(kind, text) {
  const bubble = element("div", { class: `message ${kind}` }, text);
  const box = $("messages");
  box.append(bubble);
  box.scrollTop = box.scrollHeight;
  return bubble;
}

async function answer(askForKey) {
  const question = $("question").value.trim();
  if (!question) return;
  const conversation = turns;
  const parts = images.map((url) => ({ type: "image_url", image_url: { url } }));
  const content = parts.length ? [...parts, { type: "text", text: question }] : question;
  conversation.push({ role: "user", content });
  say("user", question).prepend(...images.map((url, i) => element("img", { src: url, alt: `image ${i + 1}` })));
  images = [];
  showImages();
  $("question").value = "";
  const bubble = say("assistant", "…");
  running = new AbortController();
  $("send").textContent = "Stop";
  try {
    await stream(conversation, bubble);
  } catch (error) {
    if (error.name !== "AbortError") {
      bubble.className = "message error";
      bubble.textContent = error.message;
      conversation.pop(); // it has no answer: the next question does not build on it
      if (error instanceof Refused && error.status === 401) askForKey(error.message);
    } else if (bubble.textContent === "…") {
      bubble.textContent = "(stopped)";
    }
  } finally {
    running = null;
    $("send").textContent = "Send";
  }
}

async function stream(conversation, bubble) {
  const system = $("system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...conversation];
  const began = performance.now();
  const body = { model: "default", messages, stream: true, max_tokens: 200, stream_options: { include_usage: true } };
  let [text, usage, first] = ["", null, null];
  const reply = { role: "assistant", content: "" };
  for await (const { data } of events("/v1/chat/completions", { body, signal: running.signal })) {
    if (data === "[DONE]") break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    const number = conversation.filter((turn) => turn.role === "user").length;
    if (chunk.id) nameTurn(chunk.id, `chat ${chats}, turn ${number}`);
    const piece = chunk.choices?.[0]?.delta?.content;
    if (piece) {
      first ??= performance.now() - began;
      text += piece;
      bubble.textContent = text;
      $("messages").scrollTop = $("messages").scrollHeight;
    }
    usage = chunk.usage ?? usage;
  }
  if (!text) bubble.textContent = "(no text)";
  reply.content = text;
  conversation.push(reply);
  if (usage) account(bubble, usage, first, performance.now() - began);
}

// Below an answer: how much of its prompt was cached, and how long it took.
function account(bubble, usage, first, whole) {
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  const filled = element("i", { class: "cached" });
  filled.style.width = `${(100 * cached) / usage.prompt_tokens}%`;
  const words =
    `${cached} of ${usage.prompt_tokens} prompt tokens cached (${percent(cached / usage.prompt_tokens)}) · ` +
    `first token ${seconds(first / 1000)} · ${usage.completion_tokens} tokens in ${seconds(whole / 1000)}`;
  bubble.after(
    element("div", { class: "turn" }, element("span", { class: "bar", "aria-hidden": "true" }, filled), element("span", { class: "quiet" }, words)),
  );
  $("messages").scrollTop = $("messages").scrollHeight;
}

export async function saveTrace() {
  const response = await call("/trace");
  const link = element("a", { href: URL.createObjectURL(await response.blob()), download: "rootcellar-trace.json" });
  link.click();
  URL.revokeObjectURL(link.href);
}
