// A conversation, streamed; and which peers computed it, drawn while they do.

import { get, stream } from "./api.js";
import { h, short } from "./dom.js";

const talk = document.getElementById("talk");
const route = document.getElementById("route");
const prompt = document.getElementById("prompt");
const model = document.getElementById("model");
const send = document.getElementById("send");
const stop = document.getElementById("stop");

const messages = [];
let running = null;

export function start() {
  document.getElementById("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running && prompt.value.trim()) answer(prompt.value.trim());
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      document.getElementById("ask").requestSubmit();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
  });
  stop.addEventListener("click", () => running?.abort());
}

/** Offer the models that the network has; those that lack layers are named as such. */
export async function show() {
  const { data } = await get("v1/models");
  const chosen = model.value;
  model.replaceChildren(
    ...data.map((each) =>
      h("option", { value: each.id }, each.missing.length ? `${each.id} (nobody serves some layers)` : each.id),
    ),
  );
  if (data.some((each) => each.id === chosen)) model.value = chosen;
  send.disabled = data.length === 0;
  prompt.placeholder = data.length ? "Ask something" : "No model yet: blyan-node model import PATH";
}

async function answer(text) {
  messages.push({ role: "user", content: text });
  talk.append(h("li", { class: "user" }, text));
  prompt.value = "";
  const line = h("li", { class: "assistant", "aria-busy": "true" });
  talk.append(line);
  running = new AbortController();
  busy(true);
  let said = "";
  try {
    for await (const chunk of stream({ model: model.value || undefined, messages, max_tokens: 512 }, running.signal)) {
      if (chunk.blyan?.route) draw(chunk.blyan);
      for (const choice of chunk.choices) {
        said += choice.delta.content ?? "";
        line.textContent = said;
      }
      line.scrollIntoView({ block: "nearest" });
    }
  } catch (error) {
    const why = error.name === "AbortError" ? "stopped" : error.message;
    line.append(h("span", { class: "fault", role: "alert" }, ` (${why})`));
  } finally {
    messages.push({ role: "assistant", content: said });
    line.removeAttribute("aria-busy");
    running = null;
    busy(false);
    prompt.focus();
  }
}

function busy(on) {
  send.hidden = on;
  stop.hidden = !on;
}

/** Draw a route: a box for each stage, as wide as it has layers, with its times once they are measured. */
function draw({ route: hops, latency_ms: latency }) {
  const boxes = hops.map((hop) => {
    const box = h(
      "li", { title: hop.peer },
      h("b", {}, short(hop.peer)),
      h("span", {}, `${hop.first} to ${hop.last}`),
      h("span", {}, latency === undefined ? "…" : `${hop.compute_ms.toFixed(1)} ms, ${hop.network_ms.toFixed(1)} ms away`),
    );
    box.style.flexGrow = Math.max(1, hop.layers);
    return box;
  });
  const caption = latency === undefined ? "computing on" : `${(latency / 1000).toFixed(1)} s, computed on`;
  const count = new Set(hops.map((hop) => hop.peer)).size;
  route.replaceChildren(h("figcaption", {}, `${caption} ${count} ${count === 1 ? "node" : "nodes"}`), h("ol", {}, ...boxes));
  route.hidden = false;
}
