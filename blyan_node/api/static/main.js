// Switches between the views, and keeps the one that is open up to date.

import { get, setKey, takeKey } from "./api.js";
import * as chain from "./chain.js";
import * as chat from "./chat.js";
import * as swarm from "./swarm.js";
import * as wallet from "./wallet.js";

const VIEWS = { chat, swarm, chain, wallet };
const EVERY = 2000; // milliseconds
const tabs = [...document.querySelectorAll('[role="tab"]')];
const state = document.getElementById("state");
const dialog = document.getElementById("keydialog");
let open = "chat";

function select(name) {
  open = name;
  for (const tab of tabs) {
    const chosen = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    document.getElementById(tab.getAttribute("aria-controls")).hidden = !chosen;
  }
  refresh();
}

async function refresh() {
  try {
    const health = await get("health");
    state.textContent = health.ready ? "ready" : `not ready: ${health.why}`;
    await VIEWS[open].show();
  } catch (error) {
    state.textContent = error.message;
    if (error.status === 401 && !dialog.open) dialog.showModal();
  }
}

function moveFocus(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (step === undefined) return;
  const next = tabs[(tabs.indexOf(document.activeElement) + step + tabs.length) % tabs.length];
  next.focus();
  next.click();
}

for (const tab of tabs) tab.addEventListener("click", () => select(tab.getAttribute("aria-controls")));
document.querySelector('[role="tablist"]').addEventListener("keydown", moveFocus);
document.getElementById("keyform").addEventListener("submit", () => {
  setKey(document.getElementById("key").value.trim());
  refresh();
});

takeKey();
chat.start();
select("chat");
document.getElementById("prompt").focus();

/** One refresh after the other, so that a slow node is not asked twice at once; a hidden page asks nothing. */
async function keepFresh() {
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, EVERY));
    if (!document.hidden) await refresh();
  }
}
keepFresh();
