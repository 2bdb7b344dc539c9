"""Rounds that wait for nobody: what is merged, how much it counts, and that it counts once."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from fednano.coordinator import buffer, keys
from fednano.coordinator.records import RoundState, RunState
from fednano.coordinator.store import Store
from fednano.coordinator.store_members import Spent
from fednano.coordinator.store_updates import Claim, UpdateMeta
from fednano.coordinator.strategies import Buffered, State, Update
from fednano.lab.redis_server import free_port
from fednano.wire.coordinator_pb2 import NextTaskReply, SubmitReply
from fednano.wire.run_config import RunConfig

from tests.coordinator.conftest import ADMIN, Running
from tests.coordinator.federation import Crowd, FakeClient, config_of, evaluator, same_bytes, step
from tests.coordinator.killable import killed_in_turn
from tests.coordinator.played import Clock, Federation
from tests.coordinator.test_faults import join_all, until
from tests.coordinator.test_kills import STORE, settings_for
from tests.coordinator.web import config
from tests.redis_server import RedisServer

ASYNCHRONOUS = {"buffer": 2, "max_staleness": 1}
ACCEPTED, LATE = SubmitReply.ACCEPTED, SubmitReply.LATE
FEDBUFF = {"strategy": {"name": "fedavg"}, "asynchronous": ASYNCHRONOUS}


@pytest.fixture
async def federation(redis_server: RedisServer) -> AsyncIterator[Federation]:
    """Three members and an evaluator; round 1 is being filled and merges two updates."""
    clock = Clock()
    store = Store.connect(redis_server.url, clock, admin_token=ADMIN)
    await store.prepare()
    federation = Federation(store, clock, config(clients=3, rounds=5, **FEDBUFF))
    await federation.enrol()
    await federation.evaluate(0)
    yield federation
    await store.close()


async def send(federation: Federation, site: int, number: int, delta: float) -> Claim:
    """The update of a site that started as one of round `number` and added `delta` everywhere."""
    base = await federation.store.adapter_of_round(federation.name, 0)
    tensors = {n: np.full_like(tensor, delta) for n, tensor in base.tensors.items()}
    sender = federation.sender(f"site-{site}", number, 1)
    meta = UpdateMeta(10 * (1 + site), {"train_loss": 0.5})
    return await buffer.claim(federation.store, sender, tensors, meta, Spent())


async def fill(federation: Federation, number: int) -> None:
    """A whole round of sites 0 and 1."""
    for site in (0, 1):
        assert (await send(federation, site, number, 1.0)).result == "accepted"
    await federation.settle()
    await federation.evaluate(number)


async def moved(federation: Federation, number: int) -> float:
    """How far round `number` took every element of the adapter."""
    before = await federation.store.adapter_of_round(federation.name, number - 1)
    after = await federation.store.adapter_of_round(federation.name, number)
    steps = [after.tensors[name] - before.tensors[name] for name in after.tensors]
    assert max(np.ptp(each) for each in steps) < 1e-5
    return float(steps[0].mean())


async def test_an_update_counts_less_the_more_merges_it_has_missed(federation: Federation) -> None:
    await send(federation, 0, 1, 1.0)
    await send(federation, 1, 1, 3.0)
    await federation.settle()
    assert await moved(federation, 1) == pytest.approx(2.0, abs=1e-5)
    await federation.evaluate(1)
    await send(federation, 2, 1, 1.0)
    await send(federation, 0, 2, 3.0)
    await federation.settle()
    assert await moved(federation, 2) == pytest.approx((1 / math.sqrt(2) + 3) / 2, abs=1e-5)
    round_ = await federation.store.round(federation.name, 2)
    assert (round_.clients.submitted, round_.wanted) == (("site-0", "site-2"), 2)
    assert round_.metrics["staleness"] == 0.5


def test_the_servers_learning_rate_scales_the_step_and_samples_do_not_count() -> None:
    before = State({"text.up": np.full((2, 3), 10.0, np.float32)})
    deltas = [np.full((2, 3), value, np.float32) for value in (1.0, 4.0)]
    updates = [
        Update("a", 1, {"text.up": deltas[0]}, {}),
        Update("b", 99, {"text.up": deltas[1]}, {}, staleness=3),
    ]
    after = Buffered(0.5).advance(before, updates, block=4).adapter
    assert after["text.up"].tolist() == [[10 + 0.5 * (1 + 4 / 2) / 2] * 3] * 2


async def test_an_update_that_is_sent_again_counts_once_however_far_the_run_has_gone(
    federation: Federation,
) -> None:
    await send(federation, 0, 1, 1.0)
    assert (await send(federation, 0, 1, 1.0)).result == "duplicate"
    await send(federation, 1, 1, 1.0)
    await federation.settle()
    await federation.evaluate(1)
    assert (await send(federation, 0, 1, 1.0)).result == "duplicate"
    assert (await send(federation, 0, 2, 1.0)).result == "accepted"


async def test_an_update_that_missed_too_many_merges_is_late_and_says_so(
    federation: Federation,
) -> None:
    await fill(federation, 1)
    await fill(federation, 2)
    claim = await send(federation, 2, 1, 1.0)
    assert claim.result == "late"
    assert claim.reason == "it started 2 merges ago; the run takes 1 at most"
    assert (await federation.store.round(federation.name, 3)).clients.late == ("site-2",)


async def test_what_comes_while_a_round_is_evaluated_is_part_of_the_next(
    federation: Federation,
) -> None:
    for site in (0, 1):
        await send(federation, site, 1, 1.0)
    await federation.settle()
    assert (await federation.store.round(federation.name, 1)).state is RoundState.EVALUATING
    for site, number in ((2, 1), (0, 2), (1, 2)):
        assert (await send(federation, site, number, 1.0)).result == "accepted"
    await federation.evaluate(1)
    merged = await federation.store.round(federation.name, 2)
    assert merged.state is RoundState.EVALUATING
    assert merged.clients.submitted == ("site-0", "site-1", "site-2")


async def test_whoever_was_slow_may_have_two_updates_in_a_round(federation: Federation) -> None:
    await fill(federation, 1)
    for number in (1, 2):
        assert (await send(federation, 2, number, 1.0)).result == "accepted"
    await federation.settle()
    merged = await federation.store.round(federation.name, 2)
    assert (merged.state, merged.clients.submitted) == (RoundState.EVALUATING, ("site-2",))


async def test_a_round_that_nobody_is_left_for_fails_though_it_has_an_update(
    federation: Federation,
) -> None:
    for site in (0, 1):
        await send(federation, site, 1, 1.0)
    await federation.settle()
    assert (await send(federation, 2, 1, 1.0)).result == "accepted"  # while round 1 is evaluated
    for _ in range(10):
        federation.clock.added += 1000
        await asyncio.wait_for(federation.settle(), 30)
    run = await federation.store.run(federation.name)
    assert run.state is RunState.FAILED
    assert "round 2" in run.failure
    assert "members were there" in run.failure


async def test_an_update_for_an_attempt_that_failed_is_late_before_the_next_one_opens(
    federation: Federation,
) -> None:
    await send(federation, 0, 1, 1.0)
    await federation.store.command(federation.name, "pause", "test")
    federation.clock.added += 1000
    for _ in range(3):
        await federation.settle()
        federation.clock.added += 10
    round_ = await federation.store.round(federation.name, 1)
    assert round_.state is RoundState.FAILED
    assert (await send(federation, 1, 1, 1.0)).result == "late"


async def test_updates_for_a_round_that_never_opens_expire(federation: Federation) -> None:
    for site in (0, 1):
        await send(federation, site, 1, 1.0)
    await federation.settle()
    await send(federation, 2, 1, 1.0)
    await federation.store.command(federation.name, "stop", "test")
    key = keys.update(federation.name, 2, 1, keys.part("site-2", 1))
    assert 0 < int(await federation.store.database.call("TTL", key)) <= 300
    assert (await send(federation, 0, 2, 1.0)).reason == "the run is over"


async def test_nothing_counts_for_a_round_to_come(federation: Federation) -> None:
    rows = await federation.store.ledger(federation.name)
    for number in (0, 2, 1_000_000):
        assert await send(federation, 0, number, 1.0) == Claim("stranger", False)
    assert await federation.store.ledger(federation.name) == rows


async def parts_of(store: Store, name: str, number: int) -> dict[str, dict[str, object]]:
    found = await store.database.hash(keys.submitted(name, number, 1))
    return {part: json.loads(text) for part, text in sorted(found.items())}


async def check_history(store: Store, wanted: RunConfig) -> list[str]:
    """Every adapter follows from the one before and the parts of its round; returns all parts."""
    adapters = [await store.adapter_of_round(wanted.name, n) for n in range(wanted.rounds + 1)]
    every: list[str] = []
    for number in range(1, wanted.rounds + 1):
        updates = []
        for part, meta in (await parts_of(store, wanted.name, number)).items():
            client, started = part.split("@")
            base = adapters[int(started) - 1].tensors
            trained, _ = step(base, client, int(started))
            delta = {name: trained[name] - base[name] for name in base}
            assert meta["staleness"] == number - int(started)
            updates.append(Update(client, 10, delta, {}, number - int(started)))
            every.append(part)
        merged = Buffered(wanted.asynchronous.server_learning_rate).advance(
            State(adapters[number - 1].tensors), updates
        )
        assert same_bytes(merged.adapter, adapters[number].tensors)
    return every


async def train_task(client: FakeClient) -> NextTaskReply:
    found: list[NextTaskReply] = []

    async def handed() -> bool:
        found.append(await asyncio.to_thread(client.next_task, 300))
        return found[-1].HasField("train")

    await until(handed)
    return found[-1]


async def test_clients_of_any_speed_train_without_waiting_for_each_other(
    coordinator: Running,
) -> None:
    wanted = config_of(rounds=3, **FEDBUFF)
    await coordinator.store.create_run(wanted, "test")
    slow, b, c = clients = [FakeClient(coordinator.port, ADMIN, n, fisher=False) for n in "abc"]
    await join_all(clients)
    old = await train_task(slow)
    for quick in (b, c):
        assert (await asyncio.to_thread(quick.train, await train_task(quick))).result == ACCEPTED
    for_b, for_c = await train_task(b), await train_task(c)  # of round 2, which slow isn't at yet
    assert (for_b.train.round, old.train.round) == (2, 1)
    assert not (await asyncio.to_thread(slow.heartbeat, 1, 1)).stop
    assert (await asyncio.to_thread(slow.train, old)).result == ACCEPTED
    again = await train_task(slow)  # from the newest, in the round that has its first update
    assert again.train.round == 2
    assert (await asyncio.to_thread(b.train, for_b)).result == ACCEPTED
    await train_task(b)
    for client, task in ((c, for_c), (slow, again)):
        assert (await asyncio.to_thread(client.train, task)).result == ACCEPTED
    await until(lambda: state_is(coordinator.store, RunState.FINISHED))
    assert await check_history(coordinator.store, wanted) == [
        *("b@1", "c@1"),
        *("a@1", "b@2"),
        *("a@2", "c@2"),
    ]
    for client in clients:
        client.close()


async def state_is(store: Store, state: RunState) -> bool:
    return (await store.run("trial")).state is state


async def test_whoever_trains_in_vain_is_told_to_stop(coordinator: Running) -> None:
    asynchronous = {"buffer": 1, "max_staleness": 0}
    wanted = config_of(clients=2, min_clients=1, **{**FEDBUFF, "asynchronous": asynchronous})
    await coordinator.store.create_run(wanted, "test")
    slow, quick = clients = [FakeClient(coordinator.port, ADMIN, n, fisher=False) for n in "ab"]
    await join_all(clients)
    old = await train_task(slow)
    await asyncio.to_thread(quick.train, await train_task(quick))
    await train_task(quick)
    told = await asyncio.to_thread(slow.heartbeat, 1, 1)
    late = await asyncio.to_thread(slow.train, old)
    reason = "it started 1 merges ago; the run takes 0 at most"
    assert (told.stop, told.reason, late.result, late.reason) == (True, reason, LATE, reason)
    for client in clients:
        client.close()


def test_a_killed_coordinator_loses_no_update_and_merges_none_twice(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    port = free_port()
    wanted = config_of(
        clients=4, rounds=6, **{**FEDBUFF, "asynchronous": {"buffer": 2, "max_staleness": 9}}
    )

    async def created() -> None:
        store = Store.connect(redis_server.url)
        await store.prepare()
        await store.create_run(wanted, "test")
        await store.close()

    async def history() -> list[str]:
        store = Store.connect(redis_server.url)
        try:
            assert (await store.run("trial")).state is RunState.FINISHED
            return await check_history(store, wanted)
        finally:
            await store.close()

    asyncio.run(created())
    settings = settings_for(redis_server, port)
    kills = [
        (f"{STORE}parts:PartStore.claim", "after", "1"),
        (f"{STORE}rounds:RoundStore.freeze", "after", "1"),
        (f"{STORE}rounds:RoundStore.publish", "after", "1"),
        (f"{STORE}rounds:RoundStore.open", "after", "1"),
    ]
    clients = [FakeClient(port, ADMIN, f"c{index}", fisher=False) for index in range(4)]
    with Crowd([evaluator(port, ADMIN), *clients]) as crowd:
        killed_in_turn(settings, tmp_path, kills, crowd.wait)
    every = asyncio.run(history())
    assert len(every) == len(set(every)) >= 12
