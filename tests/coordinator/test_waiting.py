"""Whoever waits for a task is woken by what concerns it, by nothing else, and even without a ring."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from fednano.coordinator import keys, servicer
from fednano.coordinator.server import CoordinatorServer
from fednano.coordinator.store import Store
from fednano.wire.coordinator_pb2 import NextTaskReply
from fednano.wire.errors import SessionEnded
from redis import ResponseError

from tests.coordinator.conftest import ADMIN, Running, settings_of
from tests.coordinator.federation import FakeClient, config_of
from tests.coordinator.test_faults import crowd_of, join_all
from tests.redis_server import RedisServer

PATIENT = 180.0  # client_seconds: nobody looks again by itself within the next wait
WAIT_MS = 20_000


@pytest.fixture
async def patient(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Running]:
    """A coordinator whose clients look when they are woken."""
    monkeypatch.setattr(servicer, "_LOOK_AGAIN_SECONDS", PATIENT)
    server = CoordinatorServer(settings_of(redis_server.url, client_seconds=PATIENT))
    yield Running(server, await server.start())
    await server.stop()


@pytest.fixture
async def another(redis_server: RedisServer) -> AsyncIterator[Running]:
    """A second coordinator of the same Redis."""
    server = CoordinatorServer(settings_of(redis_server.url, client_seconds=PATIENT))
    yield Running(server, await server.start())
    await server.stop()


def waits(client: FakeClient, wait_ms: int = WAIT_MS) -> asyncio.Task[NextTaskReply]:
    return asyncio.create_task(asyncio.to_thread(client.next_task, wait_ms))


async def last_seen(store: Store, client: str, after: float = 0.0) -> float:
    """When it was heard last, once that is later than `after`."""
    while True:
        member = await store.members.get("trial", client)
        if member is not None and member.last_seen > after:
            return member.last_seen
        await asyncio.sleep(0.02)


async def collecting(running: Running, names: str) -> list[FakeClient]:
    """Clients of a run that have all been handed round 1."""
    clients = crowd_of(running.port, names)
    config = config_of(clients=len(clients), rounds=1)
    await running.store.create_run(config, "test")
    await join_all(clients)
    for task in [waits(client, 8000) for client in clients]:
        assert (await task).HasField("train")
    return clients


async def test_a_task_is_handed_out_as_soon_as_its_round_opens(patient: Running) -> None:
    await patient.store.create_run(config_of(clients=2), "test")
    early, last = clients = crowd_of(patient.port, "early last")
    await join_all([early])
    task = waits(early)
    await last_seen(patient.store, "early", await last_seen(patient.store, "early"))
    await join_all([last])
    assert (await task).HasField("train")
    for client in clients:
        client.close()


async def test_nobody_is_woken_by_what_others_do(patient: Running) -> None:
    first, other, third = clients = await collecting(patient, "a b c")
    task = await asyncio.to_thread(first.next_task)
    await asyncio.to_thread(first.train, task)
    before = await last_seen(patient.store, "a")
    held = waits(first)
    looked = await last_seen(patient.store, "a", before)
    with patient.store.database.bell("trial") as bell:
        for doing in ("loading", "training", "sending"):
            await asyncio.to_thread(lambda now=doing: other.heartbeat(1, 1, doing=now))
            assert await bell.wait(5)
        await asyncio.to_thread(other.train, task)
        assert await bell.wait(5)
    assert await last_seen(patient.store, "a") == looked  # every look is a sign of life
    await asyncio.to_thread(third.train, task)
    assert (await held).HasField("finished")
    for client in clients:
        client.close()


async def test_a_ring_that_is_lost_is_made_up_for(coordinator: Running, redis_server) -> None:
    client = crowd_of(coordinator.port, "a")[0]
    await coordinator.store.create_run(config_of(), "test")
    await join_all([client])
    before = await last_seen(coordinator.store, "a")
    held = waits(client, 8000)
    await last_seen(coordinator.store, "a", before)
    with redis_server.client() as direct, direct.pipeline() as silent:
        silent.hset(keys.run("trial"), "state", "stopped")
        silent.hincrby(keys.run("trial"), "version", 1)
        silent.execute()
    assert (await held).HasField("finished")
    client.close()


async def test_everybody_looks_once_lost_rings_can_be_heard_again(
    patient: Running, redis_server: RedisServer
) -> None:
    database = patient.store.database
    with database.bell("trial", ("round",), patience=60) as bell:
        await bell.wait(1)  # the first subscription
        with redis_server.client() as client:
            assert client.execute_command("CLIENT KILL TYPE pubsub") == 1
        assert await bell.wait(10)


async def test_another_coordinator_never_tells_of_what_is_over(
    patient: Running, another: Running
) -> None:
    first, *_ = clients = await collecting(patient, "a b")
    task = await asyncio.to_thread(first.next_task)
    first.close()
    first.dial(another.port)
    assert (await asyncio.to_thread(first.next_task)).train == task.train
    first.close()
    first.dial(patient.port)
    await asyncio.to_thread(first.train, task)
    first.close()
    first.dial(another.port)
    assert (await asyncio.to_thread(first.next_task)).HasField("wait")
    await patient.store.command("trial", "stop", "test")
    assert (await asyncio.to_thread(first.next_task)).HasField("finished")
    for client in clients:
        client.close()


async def test_a_process_that_was_replaced_is_told_while_it_waits(
    patient: Running, another: Running
) -> None:
    await patient.store.create_run(config_of(), "test")
    old, new = crowd_of(patient.port, "a")[0], crowd_of(another.port, "a")[0]
    await join_all([old])
    before = await last_seen(patient.store, "a")
    held = waits(old)
    await last_seen(patient.store, "a", before)
    await join_all([new])
    with pytest.raises(SessionEnded):
        await held
    old.close()
    new.close()


async def test_many_small_commands_share_a_round_trip_and_one_that_fails_fails_alone(
    store: Store, redis_server: RedisServer
) -> None:
    database = store.database
    await database.call("SET", "text", ADMIN)
    with redis_server.client() as client:
        before = client.info("clients")["connected_clients"]
        wanted = [database.small("APPEND", "many", "x") for _ in range(500)]
        replies = await asyncio.gather(
            *wanted, database.small("INCR", "text"), return_exceptions=True
        )
        after = client.info("clients")["connected_clients"]
    assert sorted(replies[:-1]) == list(range(1, 501))
    assert isinstance(replies[-1], ResponseError)
    assert after == before  # one after the other, over the connection that was there
