"""Who takes part: the first of those that were sampled, whoever comes late, and those who leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fednano.coordinator import keys
from fednano.coordinator.records import RoundState
from fednano.coordinator.store import Store
from fednano.coordinator.store_members import Spent
from fednano.lab.redis_server import free_port
from fednano.wire.run_config import RunConfig
from pydantic import ValidationError

from tests.coordinator.conftest import ADMIN, Running
from tests.coordinator.federation import Crowd, FakeClient, config_of
from tests.coordinator.killable import killed_in_turn
from tests.coordinator.played import Clock, Federation
from tests.coordinator.test_faults import join_all, until
from tests.coordinator.test_kills import STORE, create_run, read_run, settings_for
from tests.coordinator.web import config
from tests.redis_server import RedisServer

SPARES = {"clients": 5, "min_clients": 1, "cohort": 2, "spares": 2}


@pytest.fixture
async def federation(redis_server: RedisServer) -> AsyncIterator[Federation]:
    """Five members, of which round 1 has sampled four and wants two."""
    clock = Clock()
    store = Store.connect(redis_server.url, clock, admin_token=ADMIN)
    await store.prepare()
    federation = Federation(store, clock, config(**SPARES))
    await federation.enrol()
    await federation.play(1)
    yield federation
    await store.close()


async def selected(federation: Federation) -> tuple[str, ...]:
    return (await federation.store.round(federation.name, 1)).clients.selected


async def test_of_a_cohort_with_spares_exactly_the_first_are_merged(federation: Federation) -> None:
    four = await selected(federation)
    results = await asyncio.gather(*(federation.submit(name, 1) for name in four))
    assert sorted(results) == ["accepted", "accepted", "late", "late"]
    await federation.settle()
    round_ = await federation.store.round(federation.name, 1)
    assert (len(four), round_.wanted, round_.state) == (4, 2, RoundState.EVALUATING)
    by_result = dict(zip(four, results, strict=True))
    assert round_.clients.submitted == tuple(n for n in four if by_result[n] == "accepted")
    assert round_.clients.late == tuple(n for n in four if by_result[n] == "late")


async def test_a_spare_that_was_overtaken_is_late_and_a_silent_one_is_lost(
    federation: Federation,
) -> None:
    first, second, busy, silent = await selected(federation)
    federation.clock.added += federation.store.members.client_seconds + 1
    for name in (first, second, busy):
        await federation.store.members.beat(federation.name, federation.members[name], 1, Spent())
    for name in (first, second):
        assert await federation.submit(name, 1) == "accepted"
    await federation.settle()
    clients = (await federation.store.round(federation.name, 1)).clients
    assert (clients.submitted, clients.late, clients.lost) == ((first, second), (busy,), (silent,))


async def test_at_the_deadline_fewer_than_were_wanted_are_merged(federation: Federation) -> None:
    only = (await selected(federation))[0]
    await federation.submit(only, 1)
    await federation.settle()
    assert (await federation.store.round(federation.name, 1)).state is RoundState.COLLECTING
    federation.clock.added += federation.config.round_seconds
    await federation.settle()
    merged = await federation.store.round(federation.name, 1)
    assert (merged.adapter_digest != "", merged.clients.submitted) == (True, (only,))


async def test_a_round_that_an_earlier_version_opened_wants_its_whole_cohort(
    federation: Federation,
) -> None:
    await federation.store.database.call("HDEL", keys.round_(federation.name, 1), "wanted")
    for name in await selected(federation):
        assert await federation.submit(name, 1) == "accepted"


async def test_who_is_overtaken_is_told_to_stop(coordinator: Running) -> None:
    wanted = config_of(clients=3, cohort=2, spares=1, evaluation={"own_data": "never"})
    await coordinator.store.create_run(wanted, "test")
    clients = [FakeClient(coordinator.port, ADMIN, name) for name in "abc"]
    await join_all(clients)
    tasks = []
    for client in clients:
        while not (task := await asyncio.to_thread(client.next_task, 300)).HasField("train"):
            pass
        tasks.append(task)
    slow, task = clients[2], tasks[2].train
    assert not (await asyncio.to_thread(slow.heartbeat, task.round, task.attempt)).stop
    for client, own in zip(clients[:2], tasks[:2], strict=True):
        await asyncio.to_thread(client.train, own)

    async def told_to_stop() -> bool:
        reply = await asyncio.to_thread(slow.heartbeat, task.round, task.attempt)
        assert not reply.stop or reply.reason.startswith("the round ")
        return reply.stop

    await until(told_to_stop)
    seen = (await coordinator.store.round("trial", 1)).clients
    assert (seen.submitted, seen.late, seen.lost) == (("a", "b"), ("c",), ())
    for client in clients:
        client.close()


def test_a_killed_coordinator_merges_no_more_and_no_less_than_the_first(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    port = free_port()
    wanted = config_of(clients=4, cohort=2, spares=2)
    asyncio.run(create_run(redis_server.url, wanted))
    settings = settings_for(redis_server, port)
    kills = [
        (f"{STORE}updates:UpdateStore.claim", "after", "2"),
        (f"{STORE}rounds:RoundStore.freeze", "before", "1"),
        (f"{STORE}rounds:RoundStore.freeze", "after", "1"),
    ]
    with Crowd([FakeClient(port, ADMIN, f"c{index}") for index in range(4)]) as crowd:
        killed_in_turn(settings, tmp_path, kills, crowd.wait)
    run, rounds, _ = asyncio.run(read_run(redis_server.url))
    assert run.state == "finished"
    for round_ in rounds[1:]:
        assert len(round_.clients.submitted) == round_.wanted == 2
        assert round_.attempt == 1


async def test_a_running_run_loses_a_client_and_wins_another(coordinator: Running) -> None:
    wanted = config_of(clients=2, min_clients=1, rounds=4, round_seconds=1.5, late_joiners=True)
    await coordinator.store.create_run(wanted, "test")
    leaves, stays, comes = (
        FakeClient(coordinator.port, ADMIN, n) for n in ("leaves", "b", "comes")
    )
    await join_all([leaves, stays])
    while not (task := await asyncio.to_thread(leaves.next_task, 300)).HasField("train"):
        pass
    assert (await asyncio.to_thread(comes.join)).HasField("member")
    assert (await asyncio.to_thread(comes.next_task)).HasField("wait")  # for the next round
    await asyncio.to_thread(leaves.train, task)
    leaves.close()
    with Crowd([stays, comes]) as crowd:
        states = await asyncio.to_thread(crowd.wait)
    assert set(states.values()) == {"finished"}
    rounds, _ = await coordinator.store.rounds("trial")
    who = [round_.clients.submitted for round_ in rounds]
    assert who == [(), ("b", "leaves"), ("b", "comes"), ("b", "comes"), ("b", "comes")]
    assert rounds[2].clients.lost == ("leaves",)
    members = {member.id: member for member in await coordinator.store.clients("trial")}
    assert {name: member.joined_round for name, member in members.items()} == {
        "leaves": 0,
        "b": 0,
        "comes": 1,
    }
    assert members["comes"].joined_at > members["leaves"].joined_at
    assert members["leaves"].last_seen < members["comes"].last_seen
    assert (await coordinator.store.run("trial")).members == ("b", "comes", "leaves")


async def test_without_late_joiners_a_running_run_is_full(coordinator: Running) -> None:
    await coordinator.store.create_run(config_of(clients=1, min_clients=1), "test")
    first, late = (FakeClient(coordinator.port, ADMIN, name) for name in "ab")
    await join_all([first])
    while not (await asyncio.to_thread(first.next_task, 300)).HasField("train"):
        pass
    reply = await asyncio.to_thread(late.join)
    assert reply.wait.reason == "run 'trial' has all its 1 clients"
    for client in (first, late):
        client.close()


OWN = {"data": {"source": "own"}}
FEDBUFF = {"strategy": {"name": "fedavg"}, "asynchronous": {"buffer": 2}}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"spares": 1}, "spares: expected 0 without a cohort"),
        ({"spares": 1, "cohort": 2, "deterministic": True}, "spares: expected 0 where determ"),
        ({"spares": 3, "cohort": 2}, r"spares: expected at most 2, which clients \(4\)"),
        ({"late_joiners": True}, "late_joiners: expected false for data.source digits"),
        (
            {**OWN, "late_joiners": True, "deterministic": True},
            "late_joiners: expected false where",
        ),
        (
            {**OWN, "late_joiners": True, "strategy": {"name": "scaffold"}},
            "late_joiners: expected false for strategy.name scaffold",
        ),
        ({"asynchronous": {"buffer": 2}}, "strategy.name fedavg.*got fednano-ef"),
        ({**FEDBUFF, "deterministic": True}, "deterministic: expected none with asynchronous"),
        ({**FEDBUFF, "cohort": 2}, "cohort: expected none with asynchronous"),
        ({**FEDBUFF, "shadows": [{"name": "median"}], "min_clients": 3}, "shadows: expected none"),
        ({**FEDBUFF, "asynchronous": {"buffer": 5}}, r"asynchronous.buffer: expected 2 .* to 4"),
        (
            {**FEDBUFF, "retention": {"rounds": 10}},
            r"asynchronous.max_staleness: expected less than retention.rounds \(10\)",
        ),
    ],
)
def test_what_makes_no_sense_together_is_refused_with_the_reason(
    values: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValidationError, match=reason):
        RunConfig.model_validate({"name": "trial", **values})
