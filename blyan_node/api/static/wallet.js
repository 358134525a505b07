// What an address owns, tentative and final, and its last movements.

import { get } from "./api.js";
import { bly, h, short, table } from "./dom.js";

const section = document.getElementById("wallet");
let address = null;

export async function show() {
  if (section.contains(document.activeElement) && document.activeElement.tagName === "INPUT") return; // somebody types
  address ??= (await get("status")).address;
  const [balance, history] = await Promise.all([
    get(`balance/${encodeURIComponent(address)}`),
    get(`transactions?address=${encodeURIComponent(address)}&limit=20`),
  ]);
  const row = (name, field) => [name, bly(balance.final[field]), bly(balance.tentative[field])];
  section.replaceChildren(
    chooser(),
    table(`${address}, in BLY`, ["", "final", "tentative"], [
      row("balance", "balance_nano"), row("bonded", "bonded_nano"), row("unbonding", "unbonding_nano"),
    ]),
    table(
      "Last movements", ["cut", "what", "with", "BLY", "stands"],
      history.data.map((each) => [
        String(each.k), each.kind, each.other === null ? "–" : h("span", { title: each.other }, short(each.other)),
        bly(each.amount_nano), each.word,
      ]),
    ),
    h("p", { class: "small" }, "Payments are signed where the keys are: blyan-node wallet send."),
  );
}

function chooser() {
  const input = h("input", { id: "address", value: address, size: 44, spellcheck: "false", autocomplete: "off" });
  const choose = (event) => {
    event.preventDefault();
    address = input.value.trim();
    input.blur();
    show().catch((error) => section.append(h("p", { class: "fault", role: "alert" }, error.message)));
  };
  return h("form", { class: "row", submit: choose }, h("label", { for: "address" }, "Address"), input, h("button", {}, "Show"));
}
