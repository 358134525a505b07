// Makes elements. Whatever comes from the network becomes text nodes and attributes, never markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes (functions become listeners) and children (strings become text). */
export function h(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** The same, inside an svg. */
export function s(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** A long id, shortened to its ends. */
export function short(id) {
  return id.length > 16 ? `${id.slice(0, 8)}…${id.slice(-5)}` : id;
}

/** nano-BLY, given as a decimal string since numbers lose digits beyond 2^53, as BLY. */
export function bly(nano) {
  const digits = nano.padStart(10, "0");
  return `${digits.slice(0, -9)}.${digits.slice(-9)}`.replace(/\.?0+$/, "");
}

/** A table with a header row. */
export function table(caption, header, rows) {
  return h(
    "table", {},
    h("caption", {}, caption),
    h("thead", {}, h("tr", {}, ...header.map((cell) => h("th", { scope: "col" }, cell)))),
    h("tbody", {}, ...rows.map((row) => h("tr", {}, ...row.map((cell) => h("td", {}, cell))))),
  );
}
