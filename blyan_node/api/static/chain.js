// The newest blocks as a graph, tentative and final told apart, and the last cuts.

import { get } from "./api.js";
import { h, s, short, table } from "./dom.js";

const section = document.getElementById("chain");
const SHOWN = 48;
const STEP = 46; // pixels between two heights
const LANE = 26; // pixels between two blocks of one height

export async function show() {
  const [network, cuts, ...chains] = await Promise.all([
    get("network"),
    get("cuts?limit=8"),
    ...["A", "B", "T"].map((chain) => get(`chain/${chain}/blocks?limit=${SHOWN}`)),
  ]);
  const blocks = chains.flatMap((page) => page.data).sort((one, other) => other.height - one.height || (one.id < other.id ? -1 : 1));
  section.replaceChildren(
    h("p", {}, `Network ${network.name}: cut ${network.final.k} is final, ${network.pending} records wait.`),
    blocks.length ? graph(blocks.slice(0, SHOWN)) : h("p", {}, "No blocks yet."),
    table(
      "Last final cuts", ["cut", "id", "round", "signers"],
      cuts.data.map((cut) => [String(cut.k), h("code", {}, short(cut.id)), String(cut.round), String(cut.signers.length)]),
    ),
  );
}

/** Heights go from left to right; blocks of one height stand below each other, in the order of their ids. */
function graph(blocks) {
  const heights = [...new Set(blocks.map((block) => block.height))].sort((one, other) => one - other);
  const places = new Map();
  for (const [column, height] of heights.entries()) {
    const level = blocks.filter((block) => block.height === height);
    level.forEach((block, row) => places.set(block.id, { x: 16 + column * STEP, y: 18 + row * LANE }));
  }
  const edges = blocks.flatMap((block) =>
    block.parents.filter((parent) => places.has(parent)).map((parent) => edge(places.get(parent), places.get(block.id))),
  );
  const width = 32 + (heights.length - 1) * STEP;
  const height = Math.max(...[...places.values()].map((place) => place.y)) + 18;
  const drawing = s(
    "svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "list", "aria-label": "Newest blocks" },
    ...edges, ...blocks.map((block) => node(block, places.get(block.id))),
  );
  const frame = h("div", { class: "graph", tabindex: "0", "aria-label": "Graph of blocks, scrolls" }, drawing);
  requestAnimationFrame(() => (frame.scrollLeft = frame.scrollWidth));
  const legend = h(
    "p", { class: "legend" },
    ...["A meta", "B weights", "T payments"].map((text) => h("span", { class: `chain-${text[0]}` }, text)),
    h("span", { class: "hollow" }, "tentative"),
  );
  return h("figure", {}, frame, legend);
}

function edge(from, to) {
  return s("path", { class: "edge", d: `M${from.x} ${from.y} C${from.x + 20} ${from.y} ${to.x - 20} ${to.y} ${to.x} ${to.y}` });
}

function node(block, { x, y }) {
  const told = `${block.chain} ${block.type} ${short(block.id)}, ${block.records ?? "pruned"} records, ${block.word}`;
  return s(
    "circle", { class: `block chain-${block.chain} ${block.word}`, cx: x, cy: y, r: 7, role: "listitem", "aria-label": told },
    s("title", {}, told),
  );
}
