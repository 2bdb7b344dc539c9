"""`fednano demo`: a whole federation in one command, watched while it runs."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from pydantic import ValidationError
from rich.console import Console
from rich.live import Live

from fednano.lab.demo_view import live_view, result_tables
from fednano.lab.federation import Federation
from fednano.lab.processes import Processes, ProcessFailed, TookTooLong
from fednano.settings import invalid
from fednano.wire.errors import FedNanoError, InvalidRequest
from fednano.wire.run_config import RunConfig, StrategyConfig

_POLL_SECONDS = 0.5
_RUN = "demo"


class Interrupted(BaseException):
    """A signal asked the demo to end."""


class Served(Exception):
    """Everything was done and shown, and has been served for as long as somebody wanted."""


class RunEnded(Exception):
    """The run ended, but not well."""


@dataclass
class Snapshot:
    """What REST said last."""

    run: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    clients: list[dict[str, Any]] = field(default_factory=list)
    totals: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def state(self) -> str:
        return str(self.run.get("state", "starting"))


@dataclass(frozen=True)
class Demo:
    """The demo's choices; everything else is the run's default."""

    clients: int = 4
    rounds: int = 10
    strategy: str = "fednano-ef"
    partition: str = "dirichlet:0.5"
    seed: int = 0

    def config(self) -> RunConfig:
        """Raises InvalidRequest naming the option that can't be."""
        body = {
            "name": _RUN,
            "clients": self.clients,
            "min_clients": max(min(2, self.clients), self._least_updates()),
            "rounds": self.rounds,
            "seed": self.seed,
            "strategy": {"name": self.strategy},
            "data": {"source": "digits", "partition": self.partition},
            "evaluation": {"evaluators": 1},  # else a slow one would miss the zero-shot round
        }
        try:
            return RunConfig.model_validate(body)
        except ValidationError as error:
            raise invalid(error) from None

    def _least_updates(self) -> int:
        try:
            return StrategyConfig.model_validate({"name": self.strategy}).least_updates
        except ValidationError:
            return 1  # `config` says what is wrong

    def run(self, keep: bool, json_file: Path | None) -> int:
        """Returns the exit status; every process that was started has ended by then."""
        config, console = self.config(), Console()
        if json_file is not None and not json_file.absolute().parent.is_dir():
            raise InvalidRequest.of("--json", "a file in a directory that exists", str(json_file))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _interrupt)
        directory = Path(tempfile.mkdtemp(prefix="fednano-demo-"))
        try:
            with Processes(directory) as processes:
                self._federate(Federation(directory, processes), config, console, keep, json_file)
        except Interrupted as signalled:
            console.print(f"\n{signalled}: every process was ended")
            shutil.rmtree(directory, ignore_errors=True)  # it held keys and tokens
            return 130
        except Served:
            console.print("\nevery process was ended")
        except (ProcessFailed, TookTooLong, RunEnded, httpx.HTTPError, FedNanoError) as error:
            console.print("[red]the demo failed[/]: ", end="")
            console.print(str(error), markup=False, highlight=False)
            console.print(f"logs are kept in {directory}", highlight=False)
            return 1
        shutil.rmtree(directory, ignore_errors=True)
        return 0

    def _federate(
        self,
        federation: Federation,
        config: RunConfig,
        console: Console,
        keep: bool,
        json_file: Path | None,
    ) -> None:
        start = time.monotonic()
        with console.status("starting Redis, the coordinator and the LLM service"):
            federation.start_services()
            federation.create_run(config)
        token = federation.make_token("viewer", "dashboard")
        url = f"{federation.addresses.http}/#token={token}"
        console.print(f"dashboard, as long as this runs: {url}", soft_wrap=True, highlight=False)
        federation.start_client("evaluator", _RUN, "evaluator", once="true")
        for number in range(1, self.clients + 1):
            federation.start_client(f"client-{number}", _RUN, once="true")
        snapshot = _watch(federation, config, console)
        seconds = time.monotonic() - start
        console.print(*result_tables(snapshot.run, snapshot.rounds, snapshot.totals), sep="\n")
        console.print(f"{seconds:.0f} s in all, the start of every process included")
        if json_file is not None:
            figures = {**vars(snapshot), "seconds": round(seconds, 2), "config": vars(self)}
            json_file.write_text(json.dumps(figures, indent=2) + "\n")
            console.print(f"figures written to {json_file}", highlight=False)
        if keep:
            console.print(f"still serving; Ctrl-C ends it: {url}", soft_wrap=True, highlight=False)
            _serve_until_interrupted()


def _watch(federation: Federation, config: RunConfig, console: Console) -> Snapshot:
    """Shows the run until it has ended."""
    snapshot = Snapshot()
    members = ["evaluator", *(f"client-{n}" for n in range(1, config.clients + 1))]
    with (
        federation.rest() as api,
        Live(console=console, refresh_per_second=4, transient=True) as live,
    ):
        while snapshot.state not in ("finished", "stopped", "failed"):
            federation.processes.check(may_finish=members)
            try:
                _read(api, snapshot)
            except httpx.TransportError:
                time.sleep(_POLL_SECONDS)
                federation.processes.check(may_finish=members)  # says better what happened
                raise
            live.update(live_view(config, snapshot.run, snapshot.rounds, snapshot.clients))
            time.sleep(_POLL_SECONDS)
    if snapshot.state != "finished":
        raise RunEnded(
            f"the run {snapshot.state}: {snapshot.run.get('failure') or 'no reason given'}"
        )
    return snapshot


def _read(api: httpx.Client, snapshot: Snapshot) -> None:
    snapshot.run = api.get(f"runs/{_RUN}").raise_for_status().json()
    page = api.get(f"runs/{_RUN}/rounds", params={"limit": 1000}).raise_for_status().json()
    snapshot.rounds = sorted(page["items"], key=lambda item: item["number"])
    snapshot.clients = api.get(f"runs/{_RUN}/clients").raise_for_status().json()["items"]
    snapshot.totals = api.get(f"runs/{_RUN}/ledger").raise_for_status().json()["totals"]


def _serve_until_interrupted() -> None:
    try:
        signal.pause()
    except Interrupted:
        raise Served from None


def _interrupt(number: int, frame: FrameType | None) -> None:
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)  # a second Ctrl-C must not leave processes behind
    raise Interrupted(signal.Signals(number).name)
