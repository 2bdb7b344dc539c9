// The figures at the top of a run.

import { bar, h, setText } from "./dom.js";
import { bytes, score, seconds, total } from "./format.js";

const NAMES = ["Round", "Accuracy", "Loss", "Clients", "Traffic", "Time"];

export class Tiles {
  constructor() {
    this.tiles = {};
    const made = NAMES.map((name) => {
      const [value, note] = [h("dd", { class: "value" }), h("dd", { class: "note" })];
      this.tiles[name] = { value, note };
      return h("div", { class: "tile" }, h("dt", {}, name), value, note);
    });
    this.progress = bar(0, "rounds done");
    this.tiles.Round.note.before(this.progress);
    this.element = h("dl", { class: "tiles" }, ...made);
  }

  put(name, value, note) {
    setText(this.tiles[name].value, value);
    setText(this.tiles[name].note, note);
  }

  show(run, rounds, clients, totals) {
    const done = run.last_round ?? 0;
    const wanted = run.config.rounds;
    this.progress.value = done / wanted;
    this.put("Round", `${done} / ${wanted}`, working(run, rounds));
    this.showScores(run, rounds);
    this.showClients(run, clients);
    const [sent, received] = [total(totals.sent), total(totals.received)];
    this.put("Traffic", bytes(sent + received), `${bytes(sent)} sent, ${bytes(received)} received by clients`);
    this.tick(run);
  }

  showScores(run, rounds) {
    const scored = rounds.filter((round) => "accuracy" in round.metrics);
    const at = (number) => scored.find((round) => round.number === number);
    const best = at(run.best_round);
    const notes = [
      best && `best ${score(best.metrics.accuracy)} in round ${best.number}`,
      at(0) && `zero-shot ${score(at(0).metrics.accuracy)}`,
    ].filter(Boolean);
    this.put("Accuracy", score(scored.at(-1)?.metrics.accuracy), notes.join(", ") || "no evaluation yet");
    const lossy = rounds.filter((round) => "loss" in round.metrics);
    const trained = rounds.filter((round) => "train_loss" in round.metrics).at(-1);
    const note = trained ? `in training ${score(trained.metrics.train_loss)}` : "on the test set";
    this.put("Loss", score(lossy.at(-1)?.metrics.loss), note);
  }

  showClients(run, clients) {
    const trainers = clients.filter((client) => client.role === "trainer");
    const alive = trainers.filter((client) => client.state === "alive").length;
    const samples = trainers.reduce((sum, client) => sum + client.samples, 0);
    const evaluators = clients.some((client) => client.role !== "trainer" && client.state === "alive");
    const notes = [samples && `${samples.toLocaleString()} samples`, evaluators && "evaluator present"];
    const over = clients.some((client) => client.state === "left");
    const note = [over ? "took part" : "alive", ...notes.filter(Boolean)].join(", ");
    this.put("Clients", over ? `${trainers.length}` : `${alive} / ${trainers.length || run.config.clients}`, note);
  }

  tick(run) {
    const started = run.started_at;
    const now = run.finished_at ?? Date.now() / 1000;
    const waiting = `enrolment open for ${seconds(now - run.created_at)}`;
    if (started === null) this.put("Time", "–", run.finished_at === null ? waiting : "never started");
    else this.put("Time", seconds(now - started), run.finished_at === null ? "since enrolment closed" : "in all");
  }
}

function working(run, rounds) {
  if (run.state === "finished") return "all done";
  if (run.finished_at !== null) return `${run.state} in round ${run.round}`;
  const current = rounds.find((round) => round.number === run.round);
  if (!current) return run.state;
  const again = current.attempt > 1 ? `, attempt ${current.attempt}` : "";
  return `round ${current.number} ${current.state}${again}`;
}
