// Who serves which layers, as this node sees it.

import { get } from "./api.js";
import { h, short, table } from "./dom.js";

const section = document.getElementById("swarm");

export async function show() {
  const status = await get("status");
  section.replaceChildren(
    ...(status.models.length ? status.models.map(coverage) : [h("p", {}, "The network has no model yet.")]),
    peers(status),
    h("p", { class: "small" }, `This node: ${status.state}, ${status.sessions} sessions, network ${status.network_name}.`),
  );
}

/** One cell for each unit; how strong its colour is tells how many peers serve it. */
function coverage(model) {
  const least = Math.min(...model.coverage);
  const cells = model.units.map((unit, index) => {
    const count = model.coverage[index];
    const told = `${unit}: ${count} ${count === 1 ? "peer" : "peers"}`;
    return h("li", { class: `served-${Math.min(count, 3)}`, title: told, "aria-label": told });
  });
  const gaps = model.units.filter((_, index) => model.coverage[index] === 0);
  const told = gaps.length ? `nobody serves ${gaps.join(", ")}` : `every layer is served, by ${least} or more`;
  return h(
    "article", { class: gaps.length ? "gap" : "" },
    h("h2", {}, model.name),
    h("p", { class: "told" }, told),
    h("ol", { class: "units", "aria-label": `Coverage of ${model.name}` }, ...cells),
  );
}

function peers(status) {
  const rows = status.peers.map((peer) => [
    h("span", { title: peer.peer }, short(peer.peer)),
    peer.state,
    peer.model === null || peer.first === null ? "–" : `${peer.model} ${peer.first}–${peer.last}`,
    peer.round_trip_ms === null ? "–" : `${peer.round_trip_ms.toFixed(1)} ms`,
  ]);
  return table(status.peers.length === 1 ? "1 peer" : `${status.peers.length} peers`, ["peer", "state", "serves units", "round trip"], rows);
}
