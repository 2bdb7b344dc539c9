"""Merging: the mean against Flower's, Fisher merging from Redis against a bare GET, and memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fednano.coordinator.strategies import merging_threads
from fednano.lab.bench import flower_worker
from fednano.lab.bench.merge_worker import REDIS_URL, Job, run_job
from fednano.lab.bench.rows import BenchFailed, Reach, Row, Surroundings
from fednano.lab.processes import ProcessFailed
from fednano.lab.redis_server import RedisServer

FLOWER = "flwr[simulation]==1.41.0"
_PARAMETERS = 1 << 20
_FEW = 10
_MIB = 1 << 20
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}


def measure(around: Surroundings) -> Iterator[Row]:
    """(a) the mean, (b) with Fisher from Redis, and memory at few updates and many."""
    job = Job(
        kind="mean",
        folder=str(around.directory),
        updates=100 if around.quick else 1000,
        distinct=16 if around.quick else 32,
        parameters=_PARAMETERS,
        repeats=5 if around.quick else 2,
    )
    yield from Measured(around, job).against_flower()
    yield from Measured(around, job).from_redis()


@dataclass(frozen=True)
class Measured:
    around: Surroundings
    job: Job

    @property
    def setting(self) -> dict[str, str | int | float]:
        job = self.job
        return {
            "updates": job.updates,
            "of them distinct": job.distinct,
            "parameters": job.parameters,
            "dtype": "fp32",
            "threads": merging_threads(),
        }

    def against_flower(self) -> Iterator[Row]:
        """Turn by turn; each keeps its fastest. Flower's reach is that of its faster one."""
        job, around = self.job, self.around
        python = flower_python(around)
        ours: list[dict[str, float]] = []
        theirs: list[dict[str, Any]] = []
        for turn in range(2):
            around.say(f"mean of {job.updates} updates, ours and Flower's, {turn + 1} of 2")
            ours.append(self._ours("mean"))
            theirs.append(self._flower(python))
        self._same_result()
        fastest = min(found["seconds"] for found in ours)
        faster = min(("server", "serverapp"), key=lambda name: min(t[name] for t in theirs))
        for name in ("server", "serverapp"):
            seconds = min(found[name] for found in theirs)
            yield Row(
                "aggregate",
                f"mean, in memory / Flower's flwr.{name}.strategy.FedAvg",
                seconds / fastest,
                "x as fast",
                {**self.setting, "Flower's threads": 1, "bytes": "as each serialises them"},
                {
                    "ours s": fastest,
                    "Flower s": seconds,
                    "ours CPU s": min(found["cpu"] for found in ours),
                    "Flower CPU s": min(found[f"{name} cpu"] for found in theirs),
                    "Flower": f"{theirs[0]['version']} on Python {theirs[0]['python']}",
                },
                Reach("at least", 2.0) if name == faster else None,
            )

    def from_redis(self) -> Iterator[Row]:
        around, server = self.around, RedisServer(self.around.directory / "redis")
        around.processes.start("redis", server.command())
        around.processes.wait_until(server.answers, "the start of Redis")
        around.say("updates with Fisher into Redis")
        self._ours("store", server)
        around.say(f"Fisher merging of {self.job.updates} updates from Redis, and a bare GET")
        found = self._ours("fisher", server)
        size = 8 * self.job.updates * self.job.parameters
        yield Row(
            "aggregate",
            "Fisher merging from Redis / a bare GET of the same bytes",
            found["get"] / found["merge"],
            "x as fast",
            {**self.setting, "strategy": "fednano, scaled", "bytes": size},
            {
                "merge s": found["merge"],
                "GET s": found["get"],
                "its ranges alone s": found["ranges"],
                "merge MiB/s": size / _MIB / found["merge"],
            },
            Reach("at least", 0.8),
        )
        yield self._memory(server)

    def _memory(self, server: RedisServer) -> Row:
        self.around.say(f"peak memory with {_FEW} updates and with {self.job.updates}")
        few = self._ours("memory", server, _FEW)
        many = self._ours("memory", server)
        return Row(
            "aggregate",
            f"peak memory of merging {self.job.updates} updates / of {_FEW}",
            many["peak"] / few["peak"],
            "x",
            {**self.setting, "strategy": "fednano, scaled", "one update MiB": 8.0},
            {
                f"peak MiB, {_FEW} updates": few["peak"] / _MIB,
                f"peak MiB, {self.job.updates} updates": many["peak"] / _MIB,
                "of it before merging MiB": many["before"] / _MIB,
            },
            Reach("at most", 1.1),
        )

    def _ours(
        self, kind: str, server: RedisServer | None = None, updates: int = 0
    ) -> dict[str, float]:
        job = replace(self.job, kind=kind, updates=updates or self.job.updates)
        path, result = run_job(job)
        command = [sys.executable, "-m", "fednano.lab.bench.merge_worker", str(path), str(result)]
        secret = {REDIS_URL: server.url} if server else {}
        self.around.processes.run(path.stem, command, _ONE_THREAD | secret)
        found: dict[str, float] = json.loads(result.read_text())
        return found

    def _flower(self, python: Path) -> dict[str, Any]:
        path, result = run_job(replace(self.job, kind="flower"))
        command = [str(python), flower_worker.__file__, str(path), str(result)]
        self.around.processes.run("flower", command, _ONE_THREAD | _QUIET)
        found: dict[str, Any] = json.loads(result.read_text())
        return found

    def _same_result(self) -> None:
        """Otherwise the times would compare different work."""
        ours = np.load(self.around.directory / "ours.npy")
        for name in ("server", "serverapp"):
            theirs = np.load(self.around.directory / f"flower-{name}.npy")
            if not np.allclose(ours, theirs, atol=1e-5):
                raise BenchFailed(f"Flower's flwr.{name} merges the same updates to something else")


def flower_python(around: Surroundings) -> Path:
    """The interpreter of Flower's environment, which is made where it is missing.

    Raises BenchFailed.
    """
    venv = around.flower_venv
    python = venv / "bin/python"
    ready = venv / f".{FLOWER}"
    if ready.exists():
        return python
    around.say(f"installing {FLOWER} into {venv} (once)")
    install = [str(python), "-m", "pip", "install", "--quiet", FLOWER]
    try:
        around.processes.run("venv", [sys.executable, "-m", "venv", str(venv)], {})
        around.processes.run("pip", install, {})
    except ProcessFailed as error:
        raise BenchFailed(f"Flower could not be installed into {venv}: {error}") from None
    ready.touch()
    return python
