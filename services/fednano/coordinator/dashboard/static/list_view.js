// All runs, looked at again every few seconds.

import { all } from "./api.js";
import { bar, chip, h, panel, row, table } from "./dom.js";
import { moment } from "./format.js";

const EVERY_MS = 3000;
const COLUMNS = [["run"], ["state"], ["rounds", "wide"], ["done", "num"], ["strategy", "wide"], ["members", "num"], ["created", "wide"]];

export class ListView {
  constructor(root, { state, refused }) {
    Object.assign(this, { root, state, refused });
  }

  start() {
    this.table = table("Runs", COLUMNS);
    this.root.replaceChildren(h("h1", {}, "Runs"), panel("All runs", this.table.element));
    this.refresh();
  }

  stop() {
    clearTimeout(this.timer);
    this.over = true;
  }

  async refresh() {
    try {
      const runs = await all("/runs");
      if (this.over) return;
      this.state("live");
      runs.sort((a, b) => b.created_at - a.created_at);
      this.table.show(runs.map(line), "No runs yet. Make one with: fednano runs apply -f run.yaml");
    } catch (error) {
      if (this.over) return;
      if (this.refused(error)) return;
      this.state("reconnecting");
    }
    this.timer = setTimeout(() => this.refresh(), EVERY_MS);
  }
}

function line(run) {
  const done = run.last_round ?? 0;
  const { rounds } = run.config;
  const reason = run.failure ? h("small", { class: "reason" }, run.failure) : null;
  return row(COLUMNS, [
    h("a", { href: `#run=${encodeURIComponent(run.name)}` }, run.name),
    h("span", {}, chip(run.state), reason),
    bar(done / rounds, `${done} of ${rounds} rounds`),
    `${done} / ${rounds}`,
    run.config.strategy.name,
    String(run.members.length),
    moment(run.created_at),
  ]);
}
