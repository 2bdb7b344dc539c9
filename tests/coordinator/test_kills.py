"""The coordinator is killed (SIGKILL) at every instant that matters, and the run goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fednano.coordinator.records import LedgerTotals, RoundRecord, RunRecord
from fednano.coordinator.store import Store
from fednano.lab.redis_server import free_port
from fednano.wire.run_config import RunConfig

from tests.coordinator.conftest import ADMIN, PRIVATE_KEY
from tests.coordinator.federation import (
    Crowd,
    FakeClient,
    config_of,
    evaluator,
    expected_result,
    same_bytes,
)
from tests.coordinator.killable import Process, killed_in_turn
from tests.redis_server import RedisServer

CLIENTS = ["c0", "c1", "c2"]
CONFIG = config_of(deterministic=True, round_seconds=60.0)
STORE = "fednano.coordinator.store_"
SUBMIT = (f"{STORE}updates:UpdateStore.claim", "after", "1")


def settings_for(redis: RedisServer, port: int) -> dict[str, Any]:
    return {
        "redis_url": redis.url,
        "grpc_port": port,
        "http_port": 0,
        "admin_token": ADMIN,
        "session_key": PRIVATE_KEY.decode(),
        "lease_seconds": 0.5,
        "client_seconds": 3.0,
        "drain_seconds": 0.5,
    }


async def create_run(url: str, config: RunConfig = CONFIG) -> None:
    store = Store.connect(url)
    await store.prepare()
    await store.create_run(config, "test")
    await store.close()


async def read_run(url: str) -> tuple[RunRecord, list[RoundRecord], LedgerTotals]:
    store = Store.connect(url)
    run, (rounds, _) = await store.run("trial"), await store.rounds("trial")
    totals = await store.ledger_totals("trial")
    await store.close()
    return run, rounds, totals


def check_result(redis: RedisServer, client: FakeClient, config: RunConfig = CONFIG) -> None:
    """The same bytes as an undisturbed run, every update counted once."""
    client.run = "trial"
    assert same_bytes(client.adapter(last=True), expected_result(config, CLIENTS))
    run, rounds, totals = asyncio.run(read_run(redis.url))
    assert (run.state, run.last_round) == ("finished", 2)
    assert [(r.attempt, r.state) for r in rounds] == [(1, "done")] * 3
    assert totals.sent == {"adapters": 600}


MERGED = "around the merge"  # where moments and controls are read and written, too
KILLS = {
    "while an update arrives": [("fednano.wire.codec:Payload.feed", "before", "1")] * 2,
    "after each acknowledged update": [SUBMIT] * 6,
    MERGED: [
        (f"{STORE}rounds:RoundStore.freeze", "before", "1"),
        (f"{STORE}rounds:RoundStore.freeze", "after", "1"),
        (f"{STORE}updates:StoredUpdates.fetch", "after", "2"),
        (f"{STORE}rounds:RoundStore.publish", "before", "1"),
        (f"{STORE}rounds:RoundStore.publish", "after", "1"),
    ],
    "between the rounds": [
        (f"{STORE}members:MemberStore.close_enrolment", "after", "1"),
        (f"{STORE}rounds:RoundStore.start", "after", "1"),
        (f"{STORE}rounds:RoundStore.open", "after", "1"),
        (f"{STORE}rounds:RoundStore.enlist", "after", "1"),
        (f"{STORE}rounds:RoundStore.finish", "before", "1"),
        (f"{STORE}rounds:RoundStore.finish", "after", "1"),
    ],
}


@pytest.mark.parametrize(
    ("instant", "strategy"),
    [*((i, "fednano-ef") for i in KILLS), *((MERGED, other) for other in ("fedadam", "scaffold"))],
)
def test_a_killed_coordinator_is_restarted_and_the_run_ends_in_the_same_bytes(
    instant: str, strategy: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    config = config_of(deterministic=True, round_seconds=60.0, strategy={"name": strategy})
    port = free_port()
    asyncio.run(create_run(redis_server.url, config))
    settings = settings_for(redis_server, port)
    fisher = strategy != "fedadam"
    clients = [FakeClient(port, ADMIN, name, fisher=fisher) for name in CLIENTS]
    with Crowd([evaluator(port, ADMIN), *clients]) as crowd:

        def finish() -> None:
            crowd.wait()
            check_result(redis_server, clients[0], config)

        killed_in_turn(settings, tmp_path, KILLS[instant], finish)


def test_a_twin_takes_over_when_the_leader_is_killed_while_merging(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    first, second = free_port(), free_port()
    asyncio.run(create_run(redis_server.url))
    (tmp_path / "twin").mkdir()
    kill = (f"{STORE}updates:StoredUpdates.fetch", "after", "2")
    leader = Process(settings_for(redis_server, first), tmp_path, *kill)
    leader.wait_ready()
    twin = Process(settings_for(redis_server, second), tmp_path / "twin")
    clients = [FakeClient(first, ADMIN, name, twin=second) for name in CLIENTS]
    with Crowd(clients) as crowd:
        try:
            leader.wait_killed()
            crowd.wait()
            check_result(redis_server, clients[0])
            twin.stop()
        finally:
            leader.kill()
            twin.kill()
