"""`fednano runs watch`: one run, live in the terminal, until it ends.

The event stream says when something changed, REST says what it is now. A broken stream is opened
again after the last event that was heard.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fednano.rest_client import Refused, RestClient, StreamEvent, run_path
from fednano.wire.errors import Unavailable

ENDED = {"finished": 0, "failed": 1, "stopped": 1}
_STYLES = {
    "finished": "green",
    "done": "green",
    "alive": "green",
    "failed": "red",
    "lost": "red",
    "paused": "yellow",
    "stopped": "yellow",
}
SHADOWS = (
    "\naccuracy of the shadows: one-step counterfactuals, the same updates merged otherwise, each from"
    " the adapter of the strategy that leads; independent runs decide results"
)
_LOOK_SECONDS = 0.5  # at most so often; events come in bursts
_RETRY_SECONDS = (0.5, 1.0, 2.0, 5.0)
_SHOWN_ROUNDS = 12
_GATEWAY = (502, 503, 504)


def watch(client: RestClient, run: str, as_json: bool) -> int:
    """Follows `run` to its end; the exit status."""
    return _print_events(client, run) if as_json else _show(client, run)


def _print_events(client: RestClient, run: str) -> int:
    """One line of JSON per event, from the first one."""

    def heard(event: StreamEvent | None) -> int | None:
        if event is None:
            return None
        line = {"id": event.id, "event": event.kind, "data": event.data}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
        return ENDED.get(str(event.data.get("state"))) if event.kind == "run" else None

    def lost(reason: str) -> None:
        sys.stderr.write(f"reconnecting: {reason}\n")

    return _follow(client, run, heard, lost)


def _show(client: RestClient, run: str) -> int:
    console = Console()
    with Live(Text("connecting"), console=console, refresh_per_second=4) as live:
        looked = 0.0

        def heard(event: StreamEvent | None) -> int | None:
            nonlocal looked
            quiet = event is not None and event.kind != "run"
            if quiet and time.monotonic() - looked < _LOOK_SECONDS:
                return None
            looked = time.monotonic()
            record = client.get(run_path(run))
            live.update(_page(client, record))
            return ENDED.get(record["state"])

        def lost(reason: str) -> None:
            live.update(Text(f"reconnecting: {reason}", style="yellow"))

        return _follow(client, run, heard, lost)


def _follow(
    client: RestClient,
    run: str,
    heard: Callable[[StreamEvent | None], int | None],
    lost: Callable[[str], None],
) -> int:
    """Hands every event to `heard` until that returns an exit status; reconnects for ever."""
    after, failures, connected = "0-0", 0, False
    while True:
        reason = "the stream ended"
        try:
            for event in client.events(run, after):
                failures, connected = 0, True
                after = event.id if event else after
                status = heard(event)
                if status is not None:
                    return status
        except Unavailable as error:
            reason = error.detail
        except Refused as error:
            if error.code not in _GATEWAY:
                raise
            reason = error.detail
        if not connected:
            raise Unavailable(reason)  # a wrong address, most likely
        lost(reason)
        time.sleep(_RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)])
        failures += 1


def _page(client: RestClient, run: dict[str, Any]) -> RenderableType:
    rounds = client.items(f"{run_path(run['name'])}/rounds")
    clients = client.get(f"{run_path(run['name'])}/clients")["items"]
    parts: list[RenderableType] = [_headline(run, rounds)]
    if run["failure"]:
        parts.append(Text(run["failure"], style="red"))
    if clients:
        parts.append(client_table(clients))
    if rounds:
        newest = rounds[-_SHOWN_ROUNDS:]
        parts += [round_table(newest), *shadow_tables(newest)]
    return Group(*parts)


def _headline(run: dict[str, Any], rounds: list[dict[str, Any]]) -> Text:
    scored = [r["metrics"]["accuracy"] for r in rounds if "accuracy" in r["metrics"]]
    line = Text(run["name"], style="bold").append("  ").append(state(run["state"]))
    line.append(f"  round {run['last_round'] or 0} of {run['config']['rounds']}", style="default")
    if scored:
        line.append(f"  accuracy {scored[-1]:.3f}, best {max(scored):.3f}", style="default")
    return line


def state(name: str) -> Text:
    """A state in its colour."""
    return Text(name, style=_STYLES.get(name, "cyan"))


def client_table(clients: list[dict[str, Any]]) -> Table:
    """Clients with what they are doing."""
    table = Table("client", "state", "doing", "progress", box=None, pad_edge=False)
    for one in clients:
        bar = ProgressBar(total=1.0, completed=one["progress"], width=20)
        table.add_row(one["id"], state(one["state"]), one["doing"], bar)
    return table


def round_table(rounds: list[dict[str, Any]]) -> Table:
    """Rounds with who took part, how long they took and what came of them."""
    table = Table(box=None, pad_edge=False)
    for title in ("round", "state"):
        table.add_column(title)
    for title in ("accuracy", "loss", "clients", "seconds"):
        table.add_column(title, justify="right")
    table.add_column("", overflow="fold")
    for one in rounds:
        table.add_row(*_round_row(one))
    return table


def _round_row(one: dict[str, Any]) -> tuple[RenderableType, ...]:
    people, metrics = one["clients"], one["metrics"]
    wanted = one.get("wanted") or len(people["selected"])  # an earlier version doesn't tell
    trouble = [f"{len(people[k])} {k}" for k in ("late", "refused", "lost") if people[k]]
    took = "" if one["finished_at"] is None else f"{one['finished_at'] - one['opened_at']:.1f}"
    number = str(one["number"])
    return (
        number if one["attempt"] == 1 else f"{number} (attempt {one['attempt']})",
        state(one["state"]),
        _score(metrics.get("accuracy")),
        _score(metrics.get("loss")),
        f"{len(people['submitted'])}/{wanted}" if wanted else "",
        took,
        Text(one["failure"] or ", ".join(trouble), style="red" if one["failure"] else "yellow"),
    )


def shadow_tables(rounds: list[dict[str, Any]]) -> list[RenderableType]:
    """Accuracies of the shadows beside that of the strategy that leads, and what they are; nothing
    where there are none."""
    cast = [one for one in rounds if one["shadows"]]
    if not cast:
        return []
    table = Table("round", box=None, pad_edge=False)
    for title in (f"{cast[-1]['strategy']}, leads", *(s["label"] for s in cast[-1]["shadows"])):
        table.add_column(title, justify="right", overflow="fold")
    for one in cast:
        scores = [r["metrics"].get("accuracy") for r in (one, *one["shadows"])]
        table.add_row(str(one["number"]), *map(_score, scores))
    return [Text(SHADOWS, style="dim"), table]


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
