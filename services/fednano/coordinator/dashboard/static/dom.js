// Building elements without markup in strings: what a server sends is only ever text.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** An HTML element: h("td", {class: "num"}, "0.91"). */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An SVG element. */
export function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

/** Sets text only where it differs, so that screen readers and selections aren't disturbed. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A titled section. */
export function panel(title, ...content) {
  const id = `panel-${title.toLowerCase().replace(/\W+/g, "-")}`;
  return h("section", { class: "panel", "aria-labelledby": id }, h("h2", { id }, title), ...content);
}

/** A table in a box of its own that scrolls sideways, with a body to be refilled. */
export function table(label, columns) {
  const head = columns.map(([title, kind]) => h("th", { scope: "col", class: kind }, title));
  const body = h("tbody");
  const element = h(
    "div",
    { class: "scroll", role: "region", "aria-label": `${label}, as a table`, tabindex: "0" },
    h("table", {}, h("caption", { class: "hidden" }, label), h("thead", {}, h("tr", {}, ...head)), body),
  );
  const show = (rows, empty) => {
    const none = h("tr", {}, h("td", { colspan: columns.length, class: "empty" }, empty));
    body.replaceChildren(...(rows.length ? rows : [none]));
  };
  return { element, show };
}

/** A cell per value, in the kinds of the columns. */
export function row(columns, values, attributes = {}) {
  const cells = values.map((value, i) => h(i ? "td" : "th", { class: columns[i][1], scope: i ? null : "row" }, value));
  return h("tr", attributes, ...cells);
}

/** A state, told by word and colour. */
export function chip(state) {
  return h("span", { class: "chip", "data-state": state }, state);
}

/** A bar between 0 and 1 with its value for screen readers. */
export function bar(share, label) {
  return h("progress", { max: 1, value: Math.max(0, Math.min(1, share || 0)), "aria-label": label });
}
