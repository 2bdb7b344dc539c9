// What each client spent on a round: asked for when it is unfolded, as large runs have many rows.

import { h, row, table } from "./dom.js";
import { bytes, seconds, total } from "./format.js";

const COLUMNS = [["client"], ["sent", "num"], ["received", "num"], ["own compute", "num"], ["LLM compute", "num"]];

export class Ledger {
  /** `load` gives the rows of a round. */
  constructor(load) {
    this.load = load;
    this.numbers = "";
    this.table = table("What each client spent", COLUMNS);
    this.round = h("select", { "aria-label": "round", onchange: () => this.refresh() });
    this.element = h(
      "details",
      { class: "panel", ontoggle: () => this.refresh() },
      h("summary", {}, "What each client spent"),
      h("p", { class: "note" }, "Round ", this.round),
      this.table.element,
    );
  }

  /** The rounds that there are, newest first; the newest is shown until somebody chooses. */
  show(rounds) {
    const numbers = rounds.map((round) => round.number).reverse();
    if (numbers.join() !== this.numbers) {
      const [newest, chosen] = [this.round.options[0]?.value, this.round.value];
      this.numbers = numbers.join();
      this.round.replaceChildren(...numbers.map((number) => h("option", {}, String(number))));
      if (chosen && chosen !== newest) this.round.value = chosen;
    }
    this.refresh();
  }

  async refresh() {
    if (!this.element.open || !this.round.value) return;
    const number = this.round.value;
    const rows = await this.load(number).catch(() => null);
    if (rows === null || number !== this.round.value) return; // the page tells of failures itself
    this.table.show(rows.map(cells), "Nothing was reported yet.");
  }
}

function cells(one) {
  return row(COLUMNS, [
    one.client, amount(one.sent_bytes), amount(one.received_bytes),
    seconds(one.client_seconds), seconds(one.server_seconds),
  ]);
}

/** A sum; its kinds are in the tooltip. */
function amount(kinds) {
  const each = Object.entries(kinds).map(([kind, count]) => `${kind} ${count.toLocaleString()}`);
  return h("span", { title: each.join(", ") || null }, bytes(total(kinds)));
}
