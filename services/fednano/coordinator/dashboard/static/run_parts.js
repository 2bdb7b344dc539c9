// What a run's page is made of below the tiles: charts, clients, traffic, rounds, configuration.

import { Chart } from "./chart.js";
import { bar, chip, h, panel, row, setText, table } from "./dom.js";
import { ago, bytes, duration, score, seconds, total } from "./format.js";

const MOST_LINES = 4;
const NEWEST_ROUNDS = 50;
const SHADOWS = "One-step counterfactuals: every round each shadow merges the same updates, from the leader's adapter. "
  + "Its curve is not that of a run of its own; independent runs decide results.";

export class Charts {
  constructor() {
    this.accuracy = new Chart("Accuracy", "share correct", score);
    this.loss = new Chart("Loss", "nats per token", (value) => String(Number(value.toPrecision(3))));
    this.seconds = new Chart("Seconds per round", "seconds", (value) => String(Number(value.toPrecision(3))), true);
    this.shadows = new Chart("Shadows, one step from the leader", "share correct", score);
    this.shadows.element.append(h("p", { class: "note" }, SHADOWS));
    this.shadows.element.classList.add("shadows");
    this.shadows.element.hidden = true;
    this.element = h("div", { class: "charts" }, this.accuracy.element, this.loss.element, this.seconds.element, this.shadows.element);
  }

  show(rounds) {
    const names = new Set(rounds.flatMap((round) => Object.keys(round.metrics)));
    const kinds = [...names].filter((name) => name !== "accuracy" && name.startsWith("accuracy")).sort();
    const accuracies = ["accuracy", ...kinds].slice(0, MOST_LINES);
    this.accuracy.show(accuracies.map((name) => line(rounds, name, name.replace(/^accuracy[._/-]/, "") || name)));
    this.loss.show([line(rounds, "loss", "test"), line(rounds, "train_loss", "training")]);
    const timed = rounds.filter((round) => duration(round) !== null);
    this.seconds.show([{ name: "seconds", points: timed.map((round) => [round.number, duration(round)]) }]);
    this.showShadows(rounds.filter((round) => round.shadows.length));
  }

  /** Rounds that have shadows: the accuracy of the strategy that leads, then of each shadow. */
  showShadows(rounds) {
    this.shadows.element.hidden = !rounds.length;
    if (!rounds.length) return;
    const { strategy, shadows } = rounds.at(-1);
    const of = (i) => rounds.map((round) => ({ number: round.number, metrics: round.shadows[i].metrics }));
    const beside = shadows.map(({ label }, i) => line(of(i), "accuracy", `${label}, shadow`));
    this.shadows.show([line(rounds, "accuracy", `${strategy}, leads`), ...beside]);
  }
}

function line(rounds, metric, name) {
  const measured = rounds.filter((round) => Number.isFinite(round.metrics[metric]));
  return { name, points: measured.map((round) => [round.number, round.metrics[metric]]) };
}

const CLIENTS = [["client"], ["state"], ["doing"], ["progress"], ["shard", "num"], ["samples", "num"], ["own data", "num"], ["seen", "num wide"]];

export class ClientsTable {
  constructor() {
    this.table = table("Clients", CLIENTS);
    this.element = panel("Clients", this.table.element);
  }

  show(clients, rounds) {
    const own = Object.assign({}, ...rounds.map((round) => round.own));
    // Of an adapter that the client keeps for itself, where the run wants one.
    const alone = (accuracy) => (Number.isFinite(accuracy) ? h("span", { class: "note" }, ` ${score(accuracy)} by its own adapter`) : null);
    const since = ({ joined_round: round }) => (round ? h("span", { class: "note" }, ` since round ${round}`) : null);
    const rows = clients.map((client) => row(CLIENTS, [
      h("span", {}, client.id, since(client)),
      chip(client.state),
      client.doing || "–",
      bar(client.progress, `${client.id}: ${Math.round(client.progress * 100)} % of ${client.doing || "nothing"}`),
      client.shard === null ? "–" : String(client.shard),
      client.samples.toLocaleString(),
      h("span", {}, score(own[client.id]?.accuracy), alone(own[client.id]?.["personal.accuracy"])),
      ago(client.last_seen),
    ]));
    this.table.show(rows, "Nobody has joined yet.");
  }
}

const TRAFFIC = [["kind"], ["sent", "num"], ["received", "num"]];

export class Traffic {
  constructor() {
    this.table = table("Bytes by kind", TRAFFIC);
    this.compute = h("p", { class: "note" });
    this.element = panel("Bytes by kind", this.table.element, this.compute);
  }

  show({ sent, received, client_seconds: own, server_seconds: llm }) {
    setText(this.compute, `Compute: ${seconds(own)} of the clients' CPUs, ${seconds(llm)} of the LLM service.`);
    const kinds = [...new Set([...Object.keys(sent), ...Object.keys(received)])];
    const size = (kind) => (sent[kind] || 0) + (received[kind] || 0);
    kinds.sort((a, b) => size(b) - size(a));
    const exact = (count) => h("span", { title: `${count.toLocaleString()} bytes` }, bytes(count));
    const rows = kinds.map((kind) => row(TRAFFIC, [kind, exact(sent[kind] || 0), exact(received[kind] || 0)]));
    if (rows.length) rows.push(row(TRAFFIC, ["all", exact(total(sent)), exact(total(received))], { class: "sum" }));
    this.table.show(rows, "Nothing was sent yet.");
  }
}

const ROUNDS = [
  ["round"], ["state"], ["accuracy", "num"], ["loss", "num"], ["selected", "num"], ["submitted", "num"],
  ["late", "num"], ["refused", "num"], ["lost", "num"], ["time", "num"], ["bytes", "num"], ["adapter"],
];

export class RoundsTable {
  constructor() {
    this.table = table("Rounds", ROUNDS);
    this.more = h("button", { type: "button", class: "quiet", hidden: true, onclick: () => this.showAll() });
    this.element = panel("Rounds", this.table.element, this.more);
  }

  showAll() {
    this.unfolded = true;
    this.show(this.rounds);
  }

  /** `base` is the address of the rounds, for downloads. */
  show(rounds, base) {
    this.rounds = rounds;
    this.base = base ?? this.base;
    const newest = [...rounds].reverse();
    const shown = this.unfolded ? newest : newest.slice(0, NEWEST_ROUNDS);
    this.more.hidden = shown.length === rounds.length;
    this.more.textContent = `Show all ${rounds.length} rounds`;
    this.table.show(shown.flatMap((round) => roundRows(round, this.base)), "No round was opened yet.");
  }
}

function roundRows(round, base) {
  const { clients, metrics } = round;
  const people = (ids) => h("span", { title: ids.join(", ") || null, class: ids.length ? null : "zero" }, String(ids.length));
  const took = duration(round);
  const cells = row(ROUNDS, [
    round.attempt > 1 ? `${round.number} (attempt ${round.attempt})` : String(round.number),
    chip(round.state),
    score(metrics.accuracy),
    score(metrics.loss),
    people(clients.selected),
    h("span", {}, people(clients.submitted), outOf(round)),
    ...["late", "refused", "lost"].map((kind) => people(clients[kind])),
    took === null ? "–" : seconds(took),
    bytes(total(round.bytes)),
    round.adapter_digest ? adapterLink(round, base) : "–",
  ]);
  if (!round.failure) return [cells];
  return [cells, h("tr", { class: "why" }, h("td", { colspan: ROUNDS.length }, h("div", { class: "stick" }, `Round ${round.number}: ${round.failure}`)))];
}

/** Where a round doesn't want one update of each that was selected: how many, and how stale they were. */
function outOf({ wanted, clients, metrics }) {
  if (!wanted || wanted === clients.selected.length) return null;
  const stale = Number.isFinite(metrics.staleness) ? `merges missed on average: ${score(metrics.staleness)}` : null;
  return h("span", { class: "note", title: stale }, ` of ${wanted}`);
}

function adapterLink(round, base) {
  const title = `safetensors, sha256 ${round.adapter_digest}`;
  return h("a", { href: `${base}/${round.number}/adapter`, download: true, title }, h("code", {}, round.adapter_digest.slice(0, 10)));
}

export class Settings {
  constructor() {
    this.list = h("dl", { class: "settings" });
    this.element = h("details", { class: "panel" }, h("summary", {}, "Configuration"), this.list);
  }

  show(config) {
    const nested = (value) => value !== null && typeof value === "object" && (!Array.isArray(value) || value.some(nested));
    const flat = (value, path) => (nested(value)
      ? Object.entries(value).flatMap(([key, inner]) => flat(inner, path ? `${path}.${key}` : key))
      : [[path, Array.isArray(value) ? value.join(", ") : String(value)]]);
    const pairs = flat(config, "").map(([key, value]) => h("div", {}, h("dt", {}, key), h("dd", {}, value || "–")));
    this.list.replaceChildren(...pairs);
  }
}
