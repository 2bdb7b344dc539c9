"""Many simulated clients on one coordinator process and one Redis: latency, and whether all is kept."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np

from fednano.client.daemon import POLL_MS
from fednano.lab.bench.played import HIDDEN, Habits, Played, allow_files, play
from fednano.lab.bench.rows import BenchFailed, Reach, Row, Surroundings
from fednano.lab.federation import Federation
from fednano.wire.run_config import RunConfig
from fednano.wire.sessions import write_keys

_RUN = "bench"
_RANK = 4
_ROUNDS = 3
_QUICK_WAIT_MS = 2000


def measure(around: Surroundings) -> Iterator[Row]:
    """A run of several rounds in which every client takes part."""
    clients = 100 if around.quick else 1000
    allow_files(clients)
    federation = _started(around)
    federation.create_run(_config(clients))
    token = federation.make_token("site", "bench")
    around.say(f"{clients} clients, {_ROUNDS} rounds")
    wait_ms = _QUICK_WAIT_MS if around.quick else POLL_MS
    training = 10.0 if around.quick else 30.0  # some wait for the next round until their call ends
    habits = Habits(federation.addresses.grpc, token, _RUN, wait_ms, training)
    played = asyncio.run(play(habits, clients))
    around.processes.check()
    setting: dict[str, str | int | float] = {
        "clients": clients,
        "connections": clients,
        "rounds": _ROUNDS,
        "wait ms": wait_ms,
        "training s": f"0 to {training:.0f}",
        "adapter": f"rank {_RANK}, hidden {HIDDEN}, fp32, with Fisher",
        "appendfsync": "always",
    }
    yield from _latency(played, setting)
    yield _lost(federation, played, setting)


def _started(around: Surroundings) -> Federation:
    """Redis and the coordinator; nobody needs an LLM here."""
    federation = Federation(around.directory, around.processes)
    token = around.directory / "admin.token"
    token.touch(mode=0o600)
    token.write_text(federation.admin_token)
    write_keys(around.directory / "keys")
    around.say("Redis and the coordinator")
    federation.start_redis()
    federation.start_coordinator(log_level="warning")
    federation.wait_for("coordinator")
    return federation


def _config(clients: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": _RUN,
            "clients": clients,
            "min_clients": clients,
            "rounds": _ROUNDS,
            "adapter": {"rank": _RANK, "scale": 2.0},
            "data": {"source": "own"},
            "evaluation": {"own_data": "never"},
            "enrol_seconds": 600,
            "round_seconds": 600,
        }
    )


def _latency(played: Played, setting: dict[str, str | int | float]) -> Iterator[Row]:
    held = np.array(played.beyond_wait) * 1000
    if not len(held):
        raise BenchFailed("no NextTask was held for its whole wait: nothing to measure")
    yield Row(
        "coordinator",
        "p99 of NextTask beyond its wait",
        float(np.percentile(held, 99)),
        "ms",
        setting,
        {
            "calls held to the end": len(held),
            "median ms": float(np.median(held)),
            "largest ms": float(held.max()),
            "calls in all": played.calls,
            "calls of any kind tried again": sum(played.repeated.values()),
            "p99 of the clients' own lateness ms": float(np.percentile(played.late, 99)) * 1000,
            "the clients' CPU s": played.cpu_seconds,
        },
        Reach("at most", 250.0),
    )
    spread = [max(times) - min(times) for _, times in sorted(played.handed_out.items())]
    yield Row(
        "coordinator",
        "a round's task, from the first client that gets it to the last",
        float(np.median(spread)),
        "s",
        setting,
        {
            "join p99 s": float(np.percentile(played.join_seconds, 99)),
            "fetch p99 s": float(np.percentile(played.fetch_seconds, 99)),
            "submit p99 s": float(np.percentile(played.submit_seconds, 99)),
            "whole run s": played.seconds,
        },
    )


def _lost(federation: Federation, played: Played, setting: dict[str, str | int | float]) -> Row:
    """What was acknowledged, against what the coordinator's own books say afterwards."""
    acknowledged = {(number, client) for number, client in played.acknowledged}
    with federation.rest() as api:
        merged = {
            (item["number"], client)
            for item in _all(api, f"runs/{_RUN}/rounds")
            for client in item["clients"]["submitted"]
        }
        booked = {(row["round"], row["client"]) for row in _all(api, f"runs/{_RUN}/ledger")}
    missing = acknowledged - (merged & booked)
    return Row(
        "coordinator",
        "acknowledged updates that round or ledger do not have",
        float(len(missing)),
        "updates",
        setting,
        {
            "acknowledged": len(acknowledged),
            "expected": _ROUNDS * len(played.join_seconds),
            "in rounds": len(merged),
            "in ledger": len(booked),
        },
        Reach("at most", 0.0),
    )


def _all(api: httpx.Client, path: str) -> Iterator[dict[str, Any]]:
    """Every page's items."""
    cursor = ""
    while True:
        params: dict[str, str | int] = {"limit": 1000}
        if cursor:
            params["cursor"] = cursor
        page = api.get(path, params=params).raise_for_status().json()
        yield from page["items"]
        cursor = page["next"]
        if not cursor:
            return
