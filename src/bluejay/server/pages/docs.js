"use strict";

// A page from /openapi.json. Everything of it is put in as text, never as HTML.

function element(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function typeOf(schema) {
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  const some = schema.anyOf || schema.oneOf;
  if (some) return some.map(typeOf).join(" | ");
  if (schema.type === "array") return "list of " + typeOf(schema.items || {});
  return Array.isArray(schema.type) ? schema.type.join(" | ") : schema.type || "anything";
}

const BOUNDS = {
  minimum: "at least", maximum: "at most", exclusiveMinimum: "above", exclusiveMaximum: "below",
  minLength: "characters at least", maxLength: "characters at most", minItems: "items at least",
  maxItems: "items at most", default: "default",
};

function notes(schema) {
  return Object.entries(BOUNDS)
    .filter(([key]) => schema[key] !== undefined && schema[key] !== null)
    .map(([key, words]) => words + " " + JSON.stringify(schema[key]));
}

function fieldsOf(schema) {
  const list = element("dl");
  for (const [name, field] of Object.entries(schema.properties || {})) {
    const required = (schema.required || []).includes(name);
    list.append(element("dt", "", element("b", "", name), ": " + [typeOf(field), ...notes(field)].join(", "), required ? " (required)" : ""));
    const about = element("dd", "", field.description || "");
    const inner = [field, field.items, ...(field.anyOf || [])].find((one) => one && one.properties);
    if (inner) about.append(fieldsOf(inner));
    if (about.childNodes.length) list.append(about);
  }
  return list;
}

function exampleOf(schema, name = "") {
  if (schema.example !== undefined) return schema.example;
  if (schema.examples && schema.examples.length) return schema.examples[0];
  if (schema.default !== undefined && schema.default !== null) return schema.default;
  if (schema.enum) return schema.enum[0];
  if (schema.const !== undefined) return schema.const;
  const some = schema.anyOf || schema.oneOf;
  if (some) return exampleOf(some[0], name);
  if (schema.type === "object" || schema.properties) {
    const required = schema.required || [];
    return Object.fromEntries(required.map((key) => [key, exampleOf((schema.properties || {})[key] || {}, key)]));
  }
  if (schema.type === "array") return [exampleOf(schema.items || {}, name)];
  if (schema.type === "integer" || schema.type === "number") return schema.minimum ?? 1;
  if (schema.type === "boolean") return true;
  return name === "model" ? "bluejay" : "Once upon a time";
}

function quoted(text) {
  return "'" + text.replaceAll("'", "'\\''") + "'";
}

function curlOf(path, method, operation) {
  const url = location.origin + path.replace("{model}", "bluejay").replaceAll(/\{(\w+)\}/g, (_, name) => name.toUpperCase());
  const options = [];
  const body = operation.requestBody && operation.requestBody.content["application/json"];
  if (method !== "get" && !(method === "post" && body)) options.push("-X " + method.toUpperCase());
  if (operation.security) options.push('-H "Authorization: Bearer $BLUEJAY_KEY"');
  if (body) {
    options.push("-H 'Content-Type: application/json'");
    options.push("-d " + quoted(JSON.stringify(body.example ?? exampleOf(body.schema || {}))));
  }
  return ["curl " + (/^[\w.:/-]+$/.test(url) ? url : quoted(url)), ...options].join(" \\\n  ");
}

function curlBox(text) {
  const button = element("button", "", "Copy");
  button.type = "button";
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  });
  return element("div", "curl", element("pre", "", text), button);
}

function show(path, method, operation) {
  const box = element("details");
  box.append(element("summary", "",
    element("span", "method", method), element("span", "path", path), element("span", "summary", operation.summary || ""),
    element("span", "access", operation["x-access"] || "")));
  box.dataset.words = [method, path, operation.summary, operation.description].join(" ").toLowerCase();
  box.addEventListener("toggle", () => { if (box.open && box.childNodes.length === 1) fill(box, path, method, operation); });
  return box;
}

function fill(box, path, method, operation) {
  if (operation.description) box.append(element("p", "", operation.description));
  box.append(curlBox(curlOf(path, method, operation)));
  const queried = (operation.parameters || []).filter((parameter) => parameter.in !== "path");
  if (queried.length) {
    const properties = Object.fromEntries(queried.map((one) => [one.name, { description: one.description, ...one.schema }]));
    box.append(element("h3", "", "Parameters"), fieldsOf({ properties }));
  }
  for (const [type, content] of Object.entries((operation.requestBody || {}).content || {})) {
    box.append(element("h3", "", "Body, " + type), fieldsOf(content.schema || {}));
  }
  for (const [status, answer] of Object.entries(operation.responses || {})) {
    const content = Object.values(answer.content || {})[0];
    box.append(element("h3", "", (status === "default" ? "Else" : status) + ": " + answer.description));
    if (content && content.schema && content.schema.properties) box.append(fieldsOf(content.schema));
  }
}

function showAll(schema) {
  document.getElementById("about").textContent = schema.info.description + " Version " + schema.info.version + ".";
  const main = document.getElementById("operations");
  const tags = document.getElementById("tags");
  main.replaceChildren();
  const sections = new Map();
  for (const [path, operations] of Object.entries(schema.paths)) {
    for (const [method, operation] of Object.entries(operations)) {
      const tag = (operation.tags || ["Other"])[0];
      if (!sections.has(tag)) {
        const heading = element("h2", "", tag);
        heading.id = tag.toLowerCase().replaceAll(/\W+/g, "-");
        const link = element("a", "", tag);
        link.href = "#" + heading.id;
        tags.append(link);
        sections.set(tag, element("section", "", heading));
        main.append(sections.get(tag));
      }
      sections.get(tag).append(show(path, method, operation));
    }
  }
}

function search(event) {
  const words = event.target.value.toLowerCase().split(/\s+/);
  for (const section of document.querySelectorAll("section")) {
    const boxes = [...section.querySelectorAll("details")];
    for (const box of boxes) box.hidden = !words.every((word) => box.dataset.words.includes(word));
    section.hidden = boxes.every((box) => box.hidden);
  }
}

fetch("openapi.json")
  .then((answer) => answer.json())
  .then(showAll)
  .catch((error) => { document.getElementById("operations").textContent = "openapi.json could not be read: " + error; });
document.getElementById("search").addEventListener("input", search);
