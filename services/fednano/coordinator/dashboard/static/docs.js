// The API's own description, readable: built from openapi.json, nothing loaded from elsewhere.

import { h, row, table } from "./dom.js";

const main = document.getElementById("main");
const FIELDS = [["name"], ["type"], ["default"], ["meaning"]];

function typeOf(schema) {
  if (!schema) return "nothing";
  if (schema.$ref) return schemaLink(schema.$ref);
  if (schema.anyOf) return h("span", {}, ...schema.anyOf.flatMap((one, i) => [i ? " or " : "", typeOf(one)]));
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.type === "array") return h("span", {}, "list of ", typeOf(schema.items));
  if (schema.type === "object" && schema.additionalProperties) return h("span", {}, "map to ", typeOf(schema.additionalProperties));
  return [schema.type || "anything", limits(schema)].filter(Boolean).join(" ");
}

function limits(schema) {
  const signs = { minimum: "≥", exclusiveMinimum: ">", maximum: "≤", exclusiveMaximum: "<", pattern: "~" };
  return Object.entries(signs).filter(([key]) => schema[key] !== undefined).map(([key, sign]) => `${sign} ${schema[key]}`).join(", ");
}

function schemaLink(ref) {
  const name = ref.split("/").at(-1);
  return h("a", { href: `#schema-${name}` }, name);
}

function fieldTable(label, fields) {
  const made = table(label, FIELDS);
  made.show(fields.map(({ name, schema, required, description }) => row(FIELDS, [
    h("code", {}, name), typeOf(schema),
    schema?.default === undefined ? (required ? "required" : "–") : JSON.stringify(schema.default),
    description || schema?.description || "",
  ])), "no fields");
  return made.element;
}

function operation(method, path, spec) {
  const id = `${method}-${path}`;
  const parts = [h("h3", { id }, h("span", { class: "method", "data-method": method }, method.toUpperCase()), " ", h("code", {}, path)),
    h("p", {}, h("strong", {}, spec.summary), spec.description ? ` — ${spec.description}` : "")];
  const parameters = (spec.parameters || []).map((one) => ({ ...one, name: `${one.name} (${one.in})` }));
  if (parameters.length) parts.push(fieldTable(`Parameters of ${id}`, parameters));
  const body = spec.requestBody?.content?.["application/json"]?.schema;
  if (body) parts.push(h("p", {}, "Body: ", typeOf(body)));
  const replies = Object.entries(spec.responses).map(([status, reply]) => {
    const [[media, content]] = Object.entries(reply.content || { "no body": {} });
    return h("li", {}, h("code", {}, status), " ", content.schema && Object.keys(content.schema).length ? typeOf(content.schema) : media, ` (${reply.description})`);
  });
  parts.push(h("ul", { class: "replies" }, ...replies));
  return h("article", { class: "panel", "aria-labelledby": id }, ...parts);
}

function schemaPart(name, schema) {
  const required = new Set(schema.required || []);
  const fields = Object.entries(schema.properties || {}).map(([field, inner]) => ({ name: field, schema: inner, required: required.has(field) }));
  return h("article", { class: "panel", id: `schema-${name}` }, h("h3", {}, name), h("p", {}, schema.description || ""),
    fields.length ? fieldTable(`Fields of ${name}`, fields) : h("p", {}, typeOf(schema)));
}

async function show() {
  const reply = await fetch("/openapi.json", { credentials: "same-origin" });
  if (!reply.ok) {
    main.replaceChildren(h("p", { class: "banner", role: "alert" }, "Sign in on the dashboard first."));
    return;
  }
  const api = await reply.json();
  const paths = Object.entries(api.paths).flatMap(([path, methods]) => Object.entries(methods).map(([method, spec]) => operation(method, path, spec)));
  const schemas = Object.entries(api.components.schemas).map(([name, schema]) => schemaPart(name, schema));
  main.replaceChildren(h("h1", {}, `${api.info.title} ${api.info.version}`),
    h("p", { class: "note" }, "Every request but health needs a bearer token: Authorization: Bearer TOKEN. Errors are problem+json."),
    h("h2", {}, "Requests"), ...paths, h("h2", {}, "Bodies"), ...schemas);
}

show();
