"""The store: runs, tokens, leases, retention, and what Redis must be like."""

from __future__ import annotations

import asyncio
import logging

import pytest
from fednano.coordinator.database import LeaseLost, Raced
from fednano.coordinator.records import RunState
from fednano.coordinator.rounds import Rounds
from fednano.coordinator.store import Store
from fednano.wire.errors import Busy, Conflict, InvalidRequest, NotFound, Unauthenticated

from tests.coordinator.conftest import ADMIN
from tests.coordinator.federation import config_of
from tests.redis_server import RedisServer


async def test_a_run_is_created_once(store: Store) -> None:
    first, created = await store.create_run(config_of(), "me")
    again, created_again = await store.create_run(config_of(), "you")
    assert (created, created_again) == (True, False)
    assert first == again == await store.run("trial")
    assert (first.state, first.created_by) == (RunState.CREATED, "me")


async def test_the_same_name_with_another_configuration_is_a_conflict(store: Store) -> None:
    await store.create_run(config_of(), "me")
    with pytest.raises(Conflict, match=r"rounds: expected 2, got 9") as refused:
        await store.create_run(config_of(rounds=9, adapter={"rank": 4, "scale": 2.0}), "me")
    assert [problem.field for problem in refused.value.problems] == ["adapter.rank", "rounds"]


async def test_runs_are_paged_newest_first(store: Store) -> None:
    for index in range(5):
        await store.create_run(config_of(f"run-{index}"), "me")
    first, cursor = await store.runs(limit=2)
    second, cursor = await store.runs(cursor, limit=2)
    last, end = await store.runs(cursor, limit=2)
    names = [[run.name for run in page] for page in (first, second, last)]
    assert names == [["run-4", "run-3"], ["run-2", "run-1"], ["run-0"]]
    assert end == ""
    with pytest.raises(InvalidRequest, match="cursor"):
        await store.runs("yesterday")


async def test_pause_resume_and_stop_are_harmless_to_repeat(store: Store) -> None:
    await store.create_run(config_of(), "me")
    for command, state in [
        ("pause", "paused"),
        ("pause", "paused"),
        ("resume", "created"),
        ("resume", "created"),
        ("stop", "stopped"),
        ("stop", "stopped"),
    ]:
        assert (await store.command("trial", command, "me")).state == state
    with pytest.raises(Conflict, match="is stopped, so it can't be resumed"):
        await store.command("trial", "resume", "me")
    with pytest.raises(NotFound):
        await store.command("nobody", "stop", "me")


async def test_every_change_is_told_by_an_event(store: Store) -> None:
    await store.create_run(config_of(), "me")
    start = await store.last_event_id("trial")
    await store.command("trial", "pause", "me")
    events = await store.events("trial", start)
    assert [(event.kind, event.data["state"]) for event in events] == [("run", "paused")]
    assert "config" not in events[0].data


async def test_waiting_for_an_event_ends_when_one_comes(store: Store) -> None:
    await store.create_run(config_of(), "me")
    last = await store.last_event_id("trial")
    async with store.listening():
        waiting = asyncio.create_task(store.events("trial", last, block_ms=5000))
        await asyncio.sleep(0.1)
        await store.command("trial", "stop", "me")
        events = await asyncio.wait_for(waiting, 1.5)
    assert events[0].data["state"] == "stopped"
    assert await store.events("trial", events[-1].id, block_ms=20) == []


async def test_names_that_could_leave_their_key_are_not_found(store: Store) -> None:
    await store.create_run(config_of(), "me")
    for name in ("", "trial:events", "x" * 100):
        with pytest.raises(NotFound):
            await store.run(name)
    with pytest.raises(NotFound, match="no adapter"):
        await store.adapter("trial", "../../etc")


async def test_two_leaders_but_one_lease(store: Store) -> None:
    first = await store.lease.acquire("one", 5)
    assert await store.lease.acquire("two", 5) == ""
    assert await store.lease.renew(first, 5)
    await store.lease.release(first)
    second = await store.lease.acquire("two", 5)
    assert second.startswith("two:")
    assert int(second.partition(":")[2]) > int(first.partition(":")[2])


async def test_a_leader_whose_lease_is_gone_advances_nothing(store: Store) -> None:
    await store.create_run(config_of(), "me")
    old = await store.lease.acquire("one", 5)
    await store.lease.release(old)
    new = await store.lease.acquire("two", 5)
    run = await store.run_store.get("trial")
    with pytest.raises(LeaseLost):
        await Rounds(store, old, "trial").step(run, None)
    assert (await store.run("trial")).state is RunState.CREATED
    await Rounds(store, new, "trial").step(run, None)
    assert (await store.run("trial")).state is RunState.ENROLLING


async def test_of_two_advances_from_the_same_state_one_wins(store: Store) -> None:
    await store.create_run(config_of(), "me")
    rounds = Rounds(store, await store.lease.acquire("one", 5), "trial")
    run = await store.run_store.get("trial")
    await rounds.step(run, None)
    with pytest.raises(Raced):
        await rounds.step(run, None)


async def test_tokens_are_kept_as_hashes_and_refused_once_revoked(
    store: Store, redis_server: RedisServer
) -> None:
    record, secret = await store.create_token("hospital", "site")
    identity = await store.identify(secret)
    assert (identity.name, identity.role, identity.token_id) == ("hospital", "site", record.id)
    with redis_server.client() as client:
        everything = [client.hgetall(key) for key in client.scan_iter("fednano:token*")]
    assert secret not in str(everything)
    assert (await store.revoke_token(record.id)).revoked
    with pytest.raises(Unauthenticated):
        await store.identify(secret)
    assert [(token.id, token.revoked) for token in await store.tokens()] == [(record.id, True)]


async def test_the_bootstrap_token_is_nowhere_in_redis(store: Store) -> None:
    assert (await store.identify(ADMIN)).role == "admin"
    assert await store.tokens() == []
    for wrong in ("", "fn_wrong", ADMIN + "x"):
        with pytest.raises(Unauthenticated):
            await store.identify(wrong)


async def test_a_role_that_does_not_exist_is_refused(store: Store) -> None:
    with pytest.raises(InvalidRequest, match="role: expected admin, viewer or site, got 'root'"):
        await store.create_token("x", "root")


async def test_a_newer_schema_is_refused(store: Store, redis_server: RedisServer) -> None:
    with redis_server.client() as client:
        client.set("fednano:schema", 99)
    with pytest.raises(Conflict, match=r"newer FedNano: redis schema: expected at most 1, got 99"):
        await store.prepare()


async def test_an_older_schema_is_migrated(store: Store, redis_server: RedisServer) -> None:
    with redis_server.client() as client:
        client.set("fednano:schema", 0)
        await store.prepare()
        assert client.get("fednano:schema") == b"1"


async def test_a_redis_that_may_forget_is_warned_of(
    store: Store, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    with redis_server.client() as client, caplog.at_level(logging.WARNING):
        client.config_set("appendfsync", "everysec")
        await store.prepare()
        client.config_set("appendfsync", "always")
    assert [record.setting for record in caplog.records] == ["appendfsync"]


async def test_no_new_run_when_redis_is_nearly_full(
    store: Store, redis_server: RedisServer
) -> None:
    await store.create_run(config_of("early"), "me")
    with redis_server.client() as client:
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 100_000)
        with pytest.raises(Busy, match=r"no new run: Redis uses \d+% of \d+ bytes"):
            await store.create_run(config_of("late"), "me")
        existing, created = await store.create_run(config_of("early"), "me")
        client.config_set("maxmemory", 0)
    assert (existing.name, created) == ("early", False)
