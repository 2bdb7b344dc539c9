"""This project's side of the bench `federation`: a run through real services, until its accuracy on the
test set reaches a target, and what it took until then."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import httpx
import psutil

from fednano.lab.bench.rows import BenchFailed
from fednano.lab.federation import Federation
from fednano.wire.run_config import RunConfig

_ENDED = ("finished", "stopped", "failed")
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Wire:
    """How embeddings and gradients travel."""

    form: Literal["dense", "factored"]
    dtype: Literal["fp32", "int8"]

    def __str__(self) -> str:
        return f"{self.form} {self.dtype}"

    @property
    def name(self) -> str:
        """Of a run, and in its clients' names."""
        return f"{self.form}-{self.dtype}"


@dataclass(frozen=True)
class Reached:
    """Until the first round at whose end the target was reached. Bytes are a client's, on average."""

    round: int
    accuracy: Sequence[float]  # on the test set, of round 0 and each one after
    start_up: float  # seconds, before the first round is opened
    seconds: float  # of training and merging, without the evaluations
    busiest: float  # of them, the client seconds of the client that had most
    sent: float
    received: float
    peak: int  # bytes of the client process that took most
    before: int = 0  # of them, where it is known, before it imported torch


def first_reaching(target: float, accuracy: Sequence[float], whose: str) -> int:
    """The round, 1 or later. Raises BenchFailed where there is none."""
    for number, found in enumerate(accuracy):
        if number and found >= target:
            return number
    best = max(accuracy[1:], default=0.0)
    raise BenchFailed(f"{whose}: {target:g} was not reached, the best round had {best:.3f}")


def federate(federation: Federation, config: RunConfig, wire: Wire, target: float) -> Reached:
    """A run with clients of its own, which are ended afterwards."""
    crossing = {"wire": wire.form, "wire_dtype": wire.dtype}
    training = config.training.model_copy(update=crossing)
    config = config.model_copy(update={"name": f"{config.name}-{wire.name}", "training": training})
    begun, clients = time.time(), [f"{wire.name}-{number + 1}" for number in range(config.clients)]
    federation.create_run(config)
    # No run is named to them: they stay when theirs has ended, so that their memory can be read.
    federation.start_client(f"{wire.name}-evaluator", "", "evaluator")
    for name in clients:
        federation.start_client(name, "")
    with federation.rest() as api:
        rounds = _until_reached(federation, api, config.name, target)
        peak = max(peak_bytes(_process_of(name).pid) for name in clients)
        if _state(api, config.name) not in _ENDED:
            api.post(f"runs/{config.name}/stop").raise_for_status()
        rows = api.get(f"runs/{config.name}/ledger").raise_for_status().json()["items"]
    for name in (*clients, f"{wire.name}-evaluator"):
        federation.processes.kill(name)
    accuracy = [each["metrics"]["accuracy"] for each in rounds]
    number = first_reaching(target, accuracy, f"{wire} wire")
    spent = [row for row in rows if row["client"] in clients and row["round"] <= number]
    return Reached(
        round=number,
        accuracy=accuracy,
        start_up=rounds[1]["opened_at"] - begun,
        seconds=sum(_training_seconds(each, config) for each in rounds[1 : number + 1]),
        busiest=max(sum(_column(spent, name, "client_seconds")) for name in clients),
        sent=mean(_bytes(spent, name, "sent_bytes") for name in clients),
        received=mean(_bytes(spent, name, "received_bytes") for name in clients),
        peak=peak,
    )


def _until_reached(
    federation: Federation, api: httpx.Client, run: str, target: float
) -> list[dict[str, Any]]:
    """The rounds that are done, once one of them reached the target or the run has ended."""
    while True:
        federation.processes.check()
        ended = _state(api, run) in _ENDED
        page = api.get(f"runs/{run}/rounds", params={"limit": 1000}).raise_for_status().json()
        rounds = [each for each in page["items"] if each["state"] == "done"]
        rounds.sort(key=lambda each: each["number"])
        if ended or any(r["number"] and r["metrics"]["accuracy"] >= target for r in rounds):
            return rounds
        time.sleep(_POLL_SECONDS)


def _state(api: httpx.Client, run: str) -> str:
    return str(api.get(f"runs/{run}").raise_for_status().json()["state"])


def _training_seconds(round_: dict[str, Any], config: RunConfig) -> float:
    """Until it was merged: what is left as its deadline is that of the evaluation, set then."""
    merged_at = float(round_["deadline"]) - config.evaluation.seconds
    return merged_at - float(round_["opened_at"])


def _column(rows: Sequence[dict[str, Any]], client: str, name: str) -> list[Any]:
    return [row[name] for row in rows if row["client"] == client]


def _bytes(rows: Sequence[dict[str, Any]], client: str, name: str) -> int:
    """Without framing, which the other side's records lack, too."""
    kinds = [amounts.items() for amounts in _column(rows, client, name)]
    return sum(amount for each in kinds for kind, amount in each if kind != "framing")


def _process_of(client: str) -> psutil.Process:
    """Of those that this process started."""
    for child in psutil.Process().children():
        if child.environ().get("FEDNANO_CLIENT_ID") == client:
            return child
    raise BenchFailed(f"the process of {client} has ended")


def peak_bytes(pid: int) -> int:
    """Peak resident memory of a process that still runs. Raises BenchFailed but on Linux."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        raise BenchFailed("the peak memory of another process is read from /proc: Linux") from None
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10
