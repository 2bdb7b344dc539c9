"""What the demo shows in the terminal, from what REST says."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fednano.wire.run_config import RunConfig

_ALONE = "personal.accuracy"  # of an adapter that a client keeps for itself
Record = dict[str, Any]


def live_view(
    config: RunConfig, run: Record, rounds: list[Record], clients: list[Record]
) -> RenderableType:
    """State, finished rounds and what every client does now."""
    done = [r for r in rounds if r["state"] == "done"]
    headline = Text.assemble(
        (f"{config.strategy.name}", "bold"),
        f", {config.clients} clients, {config.data.partition}: ",
        (str(run.get("state", "starting")), "cyan"),
        f", {max(len(done) - 1, 0)} of {config.rounds} rounds",
    )
    return Group(headline, rounds_table(rounds), _clients_table(clients))


def rounds_table(rounds: list[Record]) -> Table:
    """One row per round; round 0 is the model before any training."""
    table = Table("round", "state", "accuracy", "loss", "train loss", "updates", "seconds", "MB")
    for column in table.columns[2:]:
        column.justify = "right"
    for record in rounds:
        metrics, people = record["metrics"], record["clients"]
        trained = record["number"] > 0
        table.add_row(
            str(record["number"]) if trained else "zero-shot",
            record["state"],
            _percent(metrics.get("accuracy")),
            _number(metrics.get("loss")),
            _number(metrics.get("train_loss")) if trained else "",
            f"{len(people['submitted'])}/{len(people['selected'])}" if trained else "",
            _number(_seconds(record), 1),
            f"{sum(record['bytes'].values()) / 1e6:.1f}",
        )
    return table


def _clients_table(clients: list[Record]) -> Table:
    table = Table.grid(padding=(0, 2))
    for client in clients:
        bar = ProgressBar(total=1.0, completed=client["progress"], width=24)
        style = "" if client["state"] == "alive" else "red"
        doing = client["doing"] if client["state"] == "alive" else client["state"]
        table.add_row(Text(client["id"], style=style), bar, doing)
    return table


def result_tables(run: Record, rounds: list[Record], totals: Record) -> list[RenderableType]:
    """Everything that the demo is about: accuracy before and after, own data, bytes, seconds."""
    done = [r for r in rounds if r["state"] == "done"]
    return [rounds_table(done), _summary(run, done), _own_table(done), _bytes_table(totals)]


def _summary(run: Record, done: list[Record]) -> Text:
    first, last = done[0], done[-1]
    best = next((r for r in done if r["number"] == run.get("best_round")), last)
    seconds = [s for r in done[1:] if (s := _seconds(r)) is not None]
    mean = sum(seconds) / len(seconds) if seconds else 0.0
    return Text.assemble(
        "global test set, exact match of generated answers: zero-shot ",
        (_percent(first["metrics"].get("accuracy")), "bold"),
        ", after the last round ",
        (_percent(last["metrics"].get("accuracy")), "bold green"),
        f" (best {_percent(best['metrics'].get('accuracy'))} in round {best['number']}); ",
        f"{mean:.1f} s per round",
    )


def _own_table(done: list[Record]) -> Table:
    """Accuracy on what each client holds back of its own data."""
    first, last = done[0]["own"], done[-1]["own"]
    measured = {
        "own data, zero-shot": (first, "accuracy"),
        "own data, last round": (last, "accuracy"),
    }
    if any(_ALONE in found for found in last.values()):
        measured["own data, by its own adapter"] = (last, _ALONE)
    table = Table("client", *measured)
    for name in sorted(first.keys() | last.keys()):
        found = (own.get(name, {}).get(metric) for own, metric in measured.values())
        table.add_row(name, *map(_percent, found))
    return table


def _bytes_table(totals: Record) -> Table:
    spent = (
        f"{totals.get('client_seconds', 0):.0f} s of CPU by all clients,"
        f" {totals.get('server_seconds', 0):.0f} s by the LLM for them"
    )
    table = Table("bytes of all clients", "sent", "received", caption=spent)
    sent: Counter[str] = Counter(totals.get("sent", {}))
    received: Counter[str] = Counter(totals.get("received", {}))
    for kind in sorted(sent.keys() | received.keys()):
        table.add_row(kind, f"{sent[kind]:,}", f"{received[kind]:,}")
    table.add_section()
    table.add_row("all", f"{sent.total():,}", f"{received.total():,}")
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _seconds(record: Record) -> float | None:
    finished = record.get("finished_at")
    return float(finished - record["opened_at"]) if finished else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def draw(figures: Path, picture: Path) -> None:
    """The demo's last screen as SVG, from what its --json wrote: the picture in the README."""
    result = json.loads(figures.read_text())
    with Path(os.devnull).open("w") as nowhere:
        console = Console(record=True, width=84, file=nowhere)
        console.print("$ make demo", style="bold")
        console.print(*result_tables(result["run"], result["rounds"], result["totals"]), sep="\n")
        seconds = f"{result['seconds']:.0f} s in all, the start of every process included"
        console.print(seconds, highlight=False)
    svg = console.export_svg(title="fednano demo")
    picture.write_text(re.sub(r"@font-face\s*\{.*?\}", "", svg, flags=re.DOTALL))  # no web fonts


if __name__ == "__main__":  # python -m fednano.lab.demo_view FIGURES.json PICTURE.svg
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
