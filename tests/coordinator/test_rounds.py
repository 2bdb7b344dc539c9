"""What becomes of a round's updates: none is lost that was acknowledged, none is kept for ever."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from fednano.coordinator import keys
from fednano.coordinator.database import Raced
from fednano.coordinator.records import RoundState, RunState
from fednano.coordinator.store import Store

from tests.coordinator.played import Clock, Federation
from tests.coordinator.web import ADMIN, config
from tests.redis_server import RedisServer


@pytest.fixture
async def federation(redis_server: RedisServer) -> AsyncIterator[Federation]:
    """A run whose round 1 collects updates."""
    clock = Clock()
    store = Store.connect(redis_server.url, clock, admin_token=ADMIN)
    await store.prepare()
    federation = Federation(store, clock, config())
    await federation.enrol()
    await federation.play(1)
    yield federation
    await store.close()


async def life(federation: Federation, client: str) -> int:
    """Seconds that an update of round 1 still has; -1: for ever, -2: there is none."""
    key = keys.update(federation.name, 1, 1, client)
    return int(await federation.store.database.call("TTL", key))


async def test_the_updates_of_a_finished_round_expire(federation: Federation) -> None:
    await federation.train(1)
    assert await life(federation, "site-0") == -1
    await federation.evaluate(1)
    assert (await federation.store.round("trial", 1)).state is RoundState.DONE
    assert 0 < await life(federation, "site-0") <= 300
    assert 0 < await life(federation, "site-1") <= 300


async def test_the_updates_of_a_stopped_run_expire(federation: Federation) -> None:
    await federation.submit("site-0", 1)
    await federation.store.command("trial", "stop", "test")
    assert 0 < await life(federation, "site-0") <= 300


async def test_a_run_that_is_given_up_leaves_no_open_round_and_no_updates(
    federation: Federation,
) -> None:
    await federation.submit("site-0", 1)
    await federation.rounds.give_up("it can't go on")
    run, round_ = await federation.store.run("trial"), await federation.store.round("trial", 1)
    assert (run.state, run.failure) == (RunState.FAILED, "it can't go on")
    assert (round_.state, round_.failure) == (RoundState.FAILED, "it can't go on")
    assert 0 < await life(federation, "site-0") <= 300


async def test_a_run_with_a_damaged_round_can_be_given_up(federation: Federation) -> None:
    await federation.store.database.call("HSET", keys.round_("trial", 1), "attempt", "{")
    await federation.rounds.give_up("a damaged record")
    assert (await federation.store.run("trial")).failure == "a damaged record"


async def test_an_update_acknowledged_while_its_attempt_was_failing_counts(
    federation: Federation,
) -> None:
    store, lease = federation.store, federation.rounds.lease
    run = await store.run_store.get("trial")
    round_ = await store.round_store.get("trial", 1)
    assert round_ is not None
    await federation.submit("site-0", 1)
    assert await federation.submit("site-1", 1) == "accepted"
    with pytest.raises(Raced):  # the leader saw one of the two
        await store.round_store.fail(lease, run, round_, "1 of 2", submitted=1, last=False)
    await federation.settle()
    merged = await store.round("trial", 1)
    assert (merged.attempt, merged.state) == (1, RoundState.EVALUATING)
    assert merged.clients.submitted == ("site-0", "site-1")
