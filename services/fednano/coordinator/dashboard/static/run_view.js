// One run: REST gives the values, the event stream says when to ask for them again. So what is
// shown always equals what REST answers.

import { all, get, post, roundsUrl, runPath } from "./api.js";
import { chip, h, setText } from "./dom.js";
import { score } from "./format.js";
import { Ledger } from "./ledger.js";
import { follow } from "./live.js";
import { Charts, ClientsTable, RoundsTable, Settings, Traffic } from "./run_parts.js";
import { Tiles } from "./tiles.js";

const SETTLE_MS = 150; // events come in bursts
const LOOK_MS = 5000; // progress within a round makes no events
const ENDED = ["finished", "stopped", "failed"];
const STALE = {
  run: ["run"],
  round: ["run"],
  client: ["clients"],
  update: ["run", "clients", "traffic"],
  evaluation: ["run", "traffic"],
};

export class RunView {
  constructor(root, name, who, { state, refused, tell }) {
    Object.assign(this, { root, name, who, state, refused, tell });
    this.stale = new Set();
    this.staleRounds = new Set();
    this.rounds = new Map();
    this.clients = [];
    this.totals = { sent: {}, received: {}, client_seconds: 0, server_seconds: 0 };
  }

  start() {
    this.build();
    this.stopFollowing = follow(this.name, {
      opened: () => this.refresh(true),
      heard: (kind, data) => this.heard(kind, data),
      state: (state) => (state === "signed out" ? this.refused({ status: 401 }) : this.state(state)),
    });
    this.refresh(true);
    this.looking = setInterval(() => this.look(), LOOK_MS);
    this.ticking = setInterval(() => this.tick(), 1000);
  }

  stop() {
    this.over = true;
    this.stopFollowing?.();
    clearInterval(this.looking);
    clearInterval(this.ticking);
    clearTimeout(this.timer);
  }

  build() {
    this.parts = {
      tiles: new Tiles(), charts: new Charts(), clients: new ClientsTable(),
      traffic: new Traffic(), rounds: new RoundsTable(), settings: new Settings(),
      ledger: new Ledger((number) => all(`${runPath(this.name)}/ledger`, `round=${number}`)),
    };
    const { tiles, charts, clients, traffic, rounds, ledger, settings } = this.parts;
    this.chip = h("span");
    this.buttons = h("div", { class: "buttons" });
    this.failure = h("p", { class: "banner", role: "alert", hidden: true });
    this.notice = h("p", { class: "banner", role: "alert", hidden: true });
    this.root.replaceChildren(
      h("div", { class: "title" }, h("h1", {}, this.name), this.chip, this.buttons),
      this.failure, this.notice, tiles.element, charts.element,
      h("div", { class: "pair" }, clients.element, traffic.element),
      rounds.element, ledger.element, settings.element,
    );
  }

  heard(kind, data) {
    if (kind === "round") {
      this.staleRounds.add(data.number);
      if (data.state === "done") this.tell(`Round ${data.number} done: accuracy ${score(data.metrics?.accuracy)}`);
      if (data.state === "failed") this.tell(`Round ${data.number} failed: ${data.failure}`);
    } else if (Number.isInteger(data.round)) {
      this.staleRounds.add(data.round);
    }
    for (const part of STALE[kind]) this.stale.add(part);
    if (!this.timer) this.timer = setTimeout(() => this.refresh(false), SETTLE_MS);
  }

  look() {
    if (!this.run || ENDED.includes(this.run.state) || document.hidden) return;
    this.stale.add("clients");
    if (!this.timer) this.timer = setTimeout(() => this.refresh(false), 0);
  }

  /** Asks again for everything, or for what is stale, and shows it. */
  async refresh(everything) {
    const [parts, numbers] = [new Set(this.stale), [...this.staleRounds]];
    this.stale.clear();
    this.staleRounds.clear();
    clearTimeout(this.timer);
    this.timer = null;
    try {
      await Promise.all([
        (everything || parts.has("run")) && this.loadRun(),
        everything ? this.loadRounds() : this.loadSome(numbers),
        (everything || parts.has("clients")) && this.loadClients(),
        (everything || parts.has("traffic") || numbers.length) && this.loadTraffic(),
      ]);
      if (!this.over) this.show();
    } catch (error) {
      this.failed(error, parts, numbers);
    }
  }

  failed(error, parts, numbers) {
    if (this.over || this.refused(error)) return;
    if (error.status === 404 && !this.run) {
      this.root.replaceChildren(h("h1", {}, this.name), h("p", { class: "empty" }, error.message));
      this.stop();
      return;
    }
    for (const part of parts) this.stale.add(part);
    for (const number of numbers) this.staleRounds.add(number);
    this.timer ??= setTimeout(() => this.refresh(!this.run), 2000);
  }

  async loadRun() {
    this.run = await get(runPath(this.name));
  }

  async loadRounds() {
    const rounds = await all(`${runPath(this.name)}/rounds`);
    this.rounds = new Map(rounds.map((round) => [round.number, round]));
  }

  async loadSome(numbers) {
    for (const round of await Promise.all(numbers.map((n) => get(`${runPath(this.name)}/rounds/${n}`)))) {
      this.rounds.set(round.number, round);
    }
  }

  async loadClients() {
    this.clients = (await get(`${runPath(this.name)}/clients`)).items;
  }

  async loadTraffic() {
    this.totals = (await get(`${runPath(this.name)}/ledger?limit=1`)).totals;
  }

  show() {
    const { run, clients, totals } = this;
    const rounds = [...this.rounds.values()].sort((a, b) => a.number - b.number);
    this.chip.replaceChildren(chip(run.state));
    setText(this.failure, run.failure ? `Failed: ${run.failure}` : "");
    this.failure.hidden = !run.failure;
    this.showButtons();
    this.parts.tiles.show(run, rounds, clients, totals);
    this.parts.charts.show(rounds);
    this.parts.clients.show(clients, rounds);
    this.parts.traffic.show(totals);
    this.parts.rounds.show(rounds, roundsUrl(this.name));
    this.parts.ledger.show(rounds);
    this.parts.settings.show(run.config);
  }

  tick() {
    if (this.run && !ENDED.includes(this.run.state)) this.parts.tiles.tick(this.run);
  }

  showButtons() {
    const { state } = this.run;
    const wanted = this.who.role !== "admin" || ENDED.includes(state) ? [] : [state === "paused" ? "resume" : "pause", "stop"];
    if (this.offered === wanted.join()) return;
    this.offered = wanted.join();
    this.buttons.replaceChildren(...wanted.map((command) =>
      h("button", { type: "button", class: "quiet", onclick: () => this.command(command) }, command)));
  }

  async command(command) {
    if (command === "stop" && !window.confirm(`Stop ${this.name}? A stopped run can't be resumed.`)) return;
    try {
      await post(`${runPath(this.name)}/${command}`);
      this.notice.hidden = true;
    } catch (error) {
      if (this.refused(error)) return;
      setText(this.notice, error.message);
      this.notice.hidden = false;
    }
    this.refresh(true);
  }
}
