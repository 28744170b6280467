// The API as its OpenAPI schema says it is, from this server alone: no other host is asked for anything.

import { call, Refused, setKey } from "./api.js";

const $ = (id) => document.getElementById(id);
let schema = { paths: {}, components: {} };

function make(tag, attributes = {}, ...children) {
  const element = Object.assign(document.createElement(tag), attributes);
  element.append(...children);
  return element;
}

// What a $ref stands for.
function resolved(part) {
  if (!part?.$ref) return part ?? {};
  return part.$ref.slice(2).split("/").reduce((found, name) => found?.[name], schema) ?? {};
}

// A type in a few words.
function typeOf(part, depth = 0) {
  const name = part?.$ref?.split("/").pop();
  const at = resolved(part);
  if (at.enum) return at.enum.map((value) => JSON.stringify(value)).join(" | ");
  if ("const" in at) return JSON.stringify(at.const);
  const arms = at.anyOf ?? at.oneOf;
  if (arms) return [...new Set(arms.map((arm) => typeOf(arm, depth)))].join(" | ");
  if (at.type === "array") return depth > 3 ? "list" : `list of ${typeOf(at.items, depth + 1)}`;
  return name ?? at.type ?? "anything";
}

// The objects with fields that a part of the schema leads to, its own first.
function objectsIn(part, found = new Map()) {
  const name = part?.$ref?.split("/").pop();
  if (name !== undefined && found.has(name)) return found;
  const at = resolved(part);
  if (at.properties) found.set(name ?? at.title ?? "body", at);
  for (const inner of [...(at.anyOf ?? []), ...(at.oneOf ?? []), ...Object.values(at.properties ?? {})]) objectsIn(inner, found);
  if (at.items) objectsIn(at.items, found);
  return found;
}

function fields(caption, object) {
  const rows = Object.entries(object.properties).map(([name, part]) => {
    const about = resolved(part).description ?? "";
    const needed = (object.required ?? []).includes(name) ? "needed" : "default" in part ? JSON.stringify(part.default) : "";
    return make("tr", {}, make("td", {}, make("code", {}, name)), make("td", {}, typeOf(part)), make("td", {}, needed), make("td", {}, about));
  });
  const head = make("tr", {}, ...["field", "type", "default", ""].map((text) => make("th", { scope: "col" }, text)));
  return make("table", { className: "fields" }, make("caption", { className: "quiet" }, caption), make("thead", {}, head), make("tbody", {}, ...rows));
}

function example(body) {
  const at = resolved(body);
  const needed = (at.required ?? []).map((name) => [name, name === "messages" ? [{ role: "user", content: "What is a KV cache?" }] : name === "prompt" ? "What is a KV cache?" : null]);
  return JSON.stringify(Object.fromEntries(needed), null, 2);
}

function trial(verb, path, body) {
  const input = make("textarea", { value: body ? example(body) : "", spellcheck: false, ariaLabel: `Body of ${path}`, hidden: !body });
  const target = make("input", { value: path, ariaLabel: "Path", size: 50 });
  const button = make("button", { type: "button" }, "Try it");
  const answer = make("pre", { role: "status" });
  button.addEventListener("click", async () => {
    answer.textContent = "…";
    try {
      const response = await call(target.value, { body: verb === "post" ? JSON.parse(input.value || "{}") : undefined });
      const text = await response.text();
      answer.textContent = response.headers.get("content-type")?.includes("json") ? JSON.stringify(JSON.parse(text), null, 2) : text;
    } catch (error) {
      answer.textContent = error instanceof Refused ? `${error.status}: ${error.message}` : String(error);
    }
  });
  return [target, input, button, answer];
}

function route(verb, path, operation) {
  const summary = make("summary", {}, make("span", { className: "verb" }, verb.toUpperCase()), make("code", {}, path));
  const body = operation.requestBody?.content?.["application/json"]?.schema;
  const query = (operation.parameters ?? []).map((each) => [each.name, { description: each.description, ...each.schema }]);
  const element = make("details", { className: "route" }, summary, make("p", {}, operation.description ?? ""));
  // Filled when it is opened: some hundred tables would keep the browser busy.
  element.addEventListener("toggle", () => {
    if (query.length) element.append(fields("in the query or the path", { properties: Object.fromEntries(query) }));
    if (body) for (const [name, object] of objectsIn(body)) element.append(fields(name, object));
    element.append(...trial(verb, path, body));
  }, { once: true });
  return element;
}

async function show() {
  try {
    schema = await (await call("/openapi.json")).json();
  } catch (error) {
    $("about").textContent = error.message;
    $("key").hidden = !(error instanceof Refused && error.status === 401);
    return;
  }
  $("key").hidden = true;
  $("about").textContent = `version ${schema.info.version}; docs/serving.md has a line to try for each route`;
  const sections = new Map();
  for (const [path, verbs] of Object.entries(schema.paths)) {
    for (const [verb, operation] of Object.entries(verbs)) {
      const tag = operation.tags?.[0] ?? "more";
      if (!sections.has(tag)) sections.set(tag, make("section", {}, make("h2", {}, tag)));
      sections.get(tag).append(route(verb, path, operation));
    }
  }
  $("routes").replaceChildren(...sections.values());
}

$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(new FormData(event.target).get("key"));
  show();
});
show();
