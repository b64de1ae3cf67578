// Draws the page from openapi.json. Text only ever becomes text nodes: nothing in the document is read as HTML.
"use strict";

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.filter((child) => child !== null));
  return made;
}

// `code` between backquotes, as in the document's descriptions.
function prose(text) {
  return text.split("`").map((part, place) => (place % 2 ? element("code", {}, part) : part));
}

class Schemas {
  constructor(components) {
    this.components = components;
  }

  resolve(schema) {
    return schema.$ref ? this.components[schema.$ref.split("/").pop()] : schema;
  }

  // The forms a value may have, null left out.
  forms(schema) {
    const found = this.resolve(schema);
    return found.anyOf ? found.anyOf.flatMap((form) => this.forms(form)) : found.type === "null" ? [] : [found];
  }

  takesNull(schema) {
    const found = this.resolve(schema);
    return found.type === "null" || (found.anyOf ?? []).some((form) => this.takesNull(form));
  }

  type(schema) {
    const names = this.forms(schema).map((form) => this.typeOfForm(form));
    return [...new Set(names)].join(" or ") || "null";
  }

  typeOfForm(form) {
    const allowed = form.enum ?? ("const" in form ? [form.const] : null);
    if (allowed) return allowed.map((value) => JSON.stringify(value)).join(", ");
    if (form.type !== "array") return form.type ?? "any value";
    const items = this.type(form.items ?? {});
    return items.includes(" or ") ? `array of (${items})` : `array of ${items}`;
  }

  limits(schema) {
    return [...new Set(this.forms(schema).flatMap((form) => this.limitsOfForm(form)))].join("; ");
  }

  limitsOfForm(form) {
    const units = { Length: "characters", Items: "items", Properties: "entries" };
    const found = Object.entries(units).flatMap(([suffix, unit]) =>
      range(form[`min${suffix}`], form[`max${suffix}`], unit),
    );
    found.push(...range(form.minimum, form.maximum, ""));
    if ("exclusiveMinimum" in form) found.push(`above ${number(form.exclusiveMinimum)}`);
    if ("exclusiveMaximum" in form) found.push(`below ${number(form.exclusiveMaximum)}`);
    if (form.pattern) found.push(`matches ${form.pattern}`);
    if (form.propertyNames?.pattern) found.push(`keys match ${form.propertyNames.pattern}`);
    const inner = [form.items, form.additionalProperties].filter((each) => each && typeof each === "object");
    return found.concat(inner.map((each) => this.limits(each)).filter(Boolean).map((text) => `each ${text}`));
  }

  // The objects with fields of their own that a value is made of.
  objects(schema) {
    return this.forms(schema).flatMap((form) =>
      form.properties ? [form] : form.type === "array" ? this.objects(form.items ?? {}) : [],
    );
  }
}

function range(least, most, unit) {
  if (least === undefined && most === undefined) return [];
  const [low, high] = [number(least), number(most)];
  const text = most === undefined ? `at least ${low}` : least === undefined ? `at most ${high}` : `${low} to ${high}`;
  return [`${text} ${unit}`.trim()];
}

// Powers of two by their exponent: JavaScript would round the largest.
function number(value) {
  const exponent = Math.log2(Math.abs(value));
  return exponent > 16 && Number.isInteger(exponent) ? `${value < 0 ? "-" : ""}2^${exponent}` : String(value);
}

// What a client must know of a field's absence: in a request which fields it has to send, in an answer which may lack.
function presence(schemas, schema, required, sent) {
  if (sent) return required ? element("span", { class: "must" }, "required") : null;
  const nullable = schemas.takesNull(schema) && schemas.forms(schema).length;
  const found = [nullable ? "or null" : "", required ? "" : "not always there"];
  return element("span", { class: "limits" }, found.filter(Boolean).join(", "));
}

function fieldList(schemas, object, sent) {
  const required = object.required ?? [];
  const names = Object.keys(object.properties);
  names.sort((a, b) => required.includes(b) - required.includes(a));
  const made = names.map((name) => field(schemas, name, object.properties[name], required.includes(name), sent));
  return element("dl", {}, ...made);
}

function field(schemas, name, schema, required, sent) {
  const preset = [undefined, null, ""].includes(schema.default) ? "" : `default ${JSON.stringify(schema.default)}`;
  const limits = [schemas.limits(schema), preset].filter(Boolean).join("; ");
  const description = schema.description ?? schemas.resolve(schema).description;
  return element(
    "div",
    {},
    element(
      "dt",
      {},
      element("code", {}, name),
      element("span", { class: "type" }, schemas.type(schema)),
      presence(schemas, schema, required, sent),
      limits ? element("span", { class: "limits" }, limits) : null,
    ),
    description ? element("dd", {}, ...prose(description)) : null,
    ...schemas.objects(schema).map((object) => nested(schemas, name, object, sent)),
  );
}

function nested(schemas, name, object, sent) {
  const details = element("details", {}, element("summary", {}, `Fields of ${name}`));
  // Drawn when opened: a type may hold itself.
  details.addEventListener("toggle", () => details.append(fieldList(schemas, object, sent)), { once: true });
  return element("dd", {}, details);
}

function quoted(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

function curl(method, path, operation, body) {
  const stream = body?.stream ? " -N" : "";
  const name = operation.parameters?.find((each) => each.in === "path")?.example ?? "";
  const base = new URL(".", location.href).href.replace(/\/$/, "");
  const lines = [`curl${stream} ${quoted(base + path.replace("{name}", encodeURI(name)))}`];
  if (operation.security) lines.push(`-H "Authorization: Bearer $API_KEY"`);
  if (body) lines.push("-H 'Content-Type: application/json'", `-d ${quoted(JSON.stringify(body))}`);
  return lines.join(" \\\n  ");
}

function example(title, command) {
  const button = element("button", { type: "button", "aria-label": `Copy the command: ${title}` }, "Copy");
  const text = element("pre", {}, element("code", {}, command));
  button.addEventListener("click", () => copy(command, text));
  const bar = element("div", { class: "bar" }, element("span", {}, title), button);
  return element("div", { class: "example" }, bar, text);
}

async function copy(command, text) {
  const status = document.getElementById("status");
  try {
    await navigator.clipboard.writeText(command);
    status.textContent = "Copied.";
  } catch {
    // Without HTTPS a page may not write to the clipboard: what it can do is select.
    getSelection().selectAllChildren(text);
    status.textContent = "Selected: copy it with your keyboard.";
  }
  setTimeout(() => (status.textContent = ""), 3000);
}

function answer(schemas, status, response) {
  const head = [element("span", { class: "status" }, status), " ", ...prose(response.description)];
  const headers = Object.keys(response.headers ?? {}).filter((name) => name !== "X-Request-Id");
  if (headers.length) head.push(element("span", { class: "soft" }, ` Header: ${headers.join(", ")}`));
  const details = element("details", { class: "answer" }, element("summary", {}, ...head));
  for (const [type, media] of Object.entries(response.content)) {
    const [object] = schemas.objects(media["x-event-schema"] ?? media.schema);
    const what = media["x-event-schema"] ? `${type}, each event:` : type;
    details.append(element("p", { class: "soft" }, what), object ? fieldList(schemas, object, false) : "");
  }
  return details;
}

function anchor(method, path) {
  return method + path.replace(/\W+/g, "-");
}

function link(method, path) {
  const badge = element("span", { class: `method ${method}` }, method.toUpperCase());
  return element("a", { href: `#${anchor(method, path)}` }, badge, ` ${path}`);
}

function section(schemas, path, method, operation) {
  const title = element("h2", {}, link(method, path));
  const made = element("section", { id: anchor(method, path) }, title, element("p", {}, operation.summary + "."));
  if (operation.description) made.append(element("p", {}, ...prose(operation.description)));
  const json = operation.requestBody?.content["application/json"];
  const bodies = Object.entries(json?.examples ?? { [operation.summary]: {} });
  made.append(...bodies.map(([name, { value }]) => example(name, curl(method, path, operation, value))));
  if (json) made.append(element("h3", {}, "Fields"), fieldList(schemas, schemas.resolve(json.schema), true));
  const answers = Object.entries(operation.responses).map(([status, response]) => answer(schemas, status, response));
  made.append(element("h3", {}, "Answers"), ...answers);
  return made;
}

function draw(api) {
  const schemas = new Schemas(api.components.schemas);
  const list = Object.entries(api.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => [path, method, operation]),
  );
  document.getElementById("version").textContent = api.info.version;
  const paragraphs = api.info.description.trim().split(/\n\n/);
  document.getElementById("about").append(...paragraphs.map((text) => element("p", {}, ...prose(text))));
  document.getElementById("index").append(
    ...list.map(([path, method]) => element("li", {}, link(method, path))),
  );
  document.getElementById("operations").replaceChildren(
    ...list.map(([path, method, operation]) => section(schemas, path, method, operation)),
  );
  document.getElementById(location.hash.slice(1))?.scrollIntoView({ behavior: "instant" });
}

fetch("openapi.json")
  .then((response) => (response.ok ? response.json() : Promise.reject(new Error(`status ${response.status}`))))
  .then(draw)
  .catch((error) => {
    document.getElementById("waiting").textContent = `openapi.json could not be read: ${error.message}`;
  });
