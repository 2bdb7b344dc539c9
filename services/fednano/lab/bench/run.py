"""Runs benches and reports: progress on standard error, a table, JSON, and whether all was reached."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fednano.lab.bench.machine import describe_machine
from fednano.lab.bench.registry import BENCHES, chosen
from fednano.lab.bench.rows import Row, Surroundings
from fednano.lab.processes import Processes, ProcessFailed, TookTooLong
from fednano.wire.errors import FedNanoError, InvalidRequest

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asked the bench to end."""


def list_benches() -> None:
    table = Table("bench", "compares", "reach", box=None, header_style="bold")
    for bench in BENCHES:
        table.add_row(bench.name, bench.compares, bench.reach)
    Console().print(table)


def run_benches(
    names: Sequence[str], quick: bool, json_file: Path | None, flower_venv: Path
) -> int:
    """The exit status: 0, 1 where a reach was missed or a bench failed, 130 after Ctrl-C."""
    benches, told = chosen(names), Console(stderr=True, highlight=False)
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise InvalidRequest.of("--json", "a file in a directory that exists", str(json_file))
    rows: list[Row] = []
    machine = describe_machine()
    directory, keep = Path(tempfile.mkdtemp(prefix="fednano-bench-")), False
    try:
        with _interruptible():
            for bench in benches:
                told.print(f"[bold]{bench.name}[/]: {bench.compares}")
                for row in _measured(
                    bench.load(), directory / bench.name, quick, flower_venv, told
                ):
                    rows.append(row)
                    told.print(f"  {row.case}: {row.shown}", markup=False)
    except Interrupted as signalled:
        told.print(f"\n{signalled}: every process was ended")
        return 130
    except (ProcessFailed, TookTooLong, httpx.HTTPError, FedNanoError) as error:
        keep = True
        told.print("[red]the bench failed[/]: ", end="")
        told.print(str(error), markup=False)
        told.print(f"logs are kept in {directory}")
        return 1
    finally:
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)
    _report(machine, rows, json_file)
    return int(any(row.met is False for row in rows))


def _measured(
    measure: Any, directory: Path, quick: bool, flower_venv: Path, told: Console
) -> Iterator[Row]:
    directory.mkdir()
    with Processes(directory) as processes:
        yield from measure(
            Surroundings(
                directory, processes, quick, flower_venv, lambda text: told.print(f"  {text} ...")
            )
        )


@contextmanager
def _interruptible() -> Iterator[None]:
    """Signals raise Interrupted within, the first one only: it ends the processes in peace."""
    before = {number: signal.signal(number, _interrupt) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise Interrupted(signal.Signals(number).name)


def _report(
    machine: Mapping[str, str | int | float], rows: Sequence[Row], json_file: Path | None
) -> None:
    console = Console()
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()), style="dim")
    console.print(_table(rows))
    if json_file is not None:
        found = {"machine": machine, "rows": [_as_json(row) for row in rows]}
        json_file.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n")
        console.print(f"figures written to {json_file}", highlight=False)


def _as_json(row: Row) -> dict[str, Any]:
    """JSON knows no NaN: what was not measured has no figure."""
    figure = row.figure if row.measured else None
    return {**asdict(row), "figure": figure, "reach": _text(row), "met": row.met}


def _table(rows: Sequence[Row]) -> Table:
    """What a figure was made of and its setting stand below its case: a terminal is not wide."""
    table = Table("bench", "case", "figure", "reach", header_style="bold", show_lines=True)
    marks = {True: ("reached", "green"), False: ("missed", "red"), None: ("", "")}
    for row in rows:
        below = [(f"\n{_pairs(row.parts)}", ""), (f"\n{_pairs(row.setting)}", "dim")]
        case = Text.assemble((row.case, "bold"), *below)
        reach = Text.assemble(_text(row), "\n", marks[row.met])
        table.add_row(Text(row.bench, no_wrap=True), case, Text(row.shown), reach)
    return table


def _text(row: Row) -> str:
    return str(row.reach) if row.reach else ""


def _pairs(values: Mapping[str, str | int | float]) -> str:
    shown = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in values.items()}
    return "; ".join(f"{name}: {value}" for name, value in shown.items())
