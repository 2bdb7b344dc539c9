"""When the door closes: with `clients` members, after a quiet time, or at the latest moment."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from fednano.coordinator.records import RunState
from fednano.coordinator.store import Store
from fednano.coordinator.store_members import Spent

from tests.coordinator.played import Clock, Federation
from tests.coordinator.web import ADMIN, config
from tests.redis_server import RedisServer

QUIET, LATEST = 10.0, 500.0


@pytest.fixture
async def federation(redis_server: RedisServer) -> AsyncIterator[Federation]:
    """A run for up to eight clients that waits for latecomers only a while."""
    clock = Clock()
    store = Store.connect(redis_server.url, clock, admin_token=ADMIN)
    await store.prepare()
    wanted = {"clients": 8, "enrol_seconds": LATEST, "enrol_quiet_seconds": QUIET}
    federation = Federation(store, clock, config().model_copy(update=wanted))
    await federation.open()
    yield federation
    await store.close()


async def state(federation: Federation, after: float) -> RunState:
    """Of the run, so many seconds later."""
    federation.clock.added += after
    for member in federation.members.values():
        await federation.store.members.beat(federation.name, member, 0, Spent())
    await federation.settle()
    return (await federation.store.run(federation.name)).state


async def test_enrolment_closes_once_nobody_new_has_come_for_the_quiet_time(
    federation: Federation,
) -> None:
    await federation.join("site-0")
    await federation.join("site-1")
    assert await state(federation, after=QUIET - 2) is RunState.ENROLLING
    await federation.join("site-2")  # the time begins anew
    assert await state(federation, after=QUIET - 2) is RunState.ENROLLING
    assert await state(federation, after=3) is RunState.RUNNING
    run = await federation.store.run_store.get(federation.name)
    assert run.members == ("site-0", "site-1", "site-2")


async def test_too_few_clients_are_waited_for_however_quiet_it_is(federation: Federation) -> None:
    await federation.join("site-0")
    assert await state(federation, after=LATEST / 2) is RunState.ENROLLING
    assert await state(federation, after=LATEST / 2 + 1) is RunState.FAILED


async def test_members_who_left_before_the_door_closed_are_not_counted(
    federation: Federation,
) -> None:
    await federation.join("site-0")
    await federation.join("site-1")
    del federation.members["site-1"]  # not heard again
    gone = federation.store.members.client_seconds + QUIET
    assert await state(federation, after=gone) is RunState.ENROLLING
    assert await state(federation, after=LATEST) is RunState.FAILED


async def test_a_pause_is_not_quiet_time(federation: Federation) -> None:
    await federation.join("site-0")
    await federation.join("site-1")
    await federation.store.command(federation.name, "pause", "test")
    assert await state(federation, after=QUIET * 3) is RunState.PAUSED
    await federation.store.command(federation.name, "resume", "test")
    assert await state(federation, after=0) is RunState.ENROLLING
    assert await state(federation, after=QUIET + 1) is RunState.RUNNING


async def test_an_evaluator_that_is_asked_for_is_waited_for_but_not_for_ever(
    redis_server: RedisServer,
) -> None:
    clock = Clock()
    store = Store.connect(redis_server.url, clock, admin_token=ADMIN)
    await store.prepare()
    for name, comes in (("with", True), ("without", False)):
        wanted = config().model_copy(update={"name": name, "enrol_seconds": LATEST})
        wanted = wanted.model_copy(
            update={"evaluation": wanted.evaluation.model_copy(update={"evaluators": 1})}
        )
        federation = Federation(store, clock, wanted)
        await federation.open()
        for i in range(wanted.clients):
            await federation.join(f"site-{i}")
        assert await state(federation, after=LATEST / 2) is RunState.ENROLLING
        if comes:
            await federation.join("evaluator")
        assert await state(federation, after=0) is (
            RunState.RUNNING if comes else RunState.ENROLLING
        )
        assert await state(federation, after=LATEST / 2 + 1) is RunState.RUNNING
        await store.command(name, "stop", "test")
        await federation.rounds.store.lease.release(federation.rounds.lease)
    await store.close()
