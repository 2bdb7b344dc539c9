"""Clients that die, Redis that dies, too few updates, several runs, retention: the run copes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import numpy as np
import pytest
from fednano.coordinator.records import RunState
from fednano.coordinator.server import CoordinatorServer
from fednano.coordinator.settings import CoordinatorSettings
from fednano.wire.coordinator_pb2 import SubmitReply
from fednano.wire.errors import Conflict, NotFound, Unavailable, WrongModel

from tests.coordinator.conftest import ADMIN, Running, settings_of
from tests.coordinator.federation import (
    Crowd,
    FakeClient,
    config_of,
    evaluator,
    expected_result,
    same_bytes,
)
from tests.redis_server import RedisServer


def crowd_of(port: int, names: str, run: str = "") -> list[FakeClient]:
    return [FakeClient(port, ADMIN, name, run=run) for name in names.split()]


async def until(condition: Callable[[], object], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.05)


async def join_all(clients: list[FakeClient]) -> None:
    for client in clients:

        async def joined(client: FakeClient = client) -> bool:
            return (await asyncio.to_thread(client.join)).HasField("member")

        await until(joined)


async def test_a_round_completes_at_its_deadline_without_a_client_that_died(
    coordinator: Running,
) -> None:
    await coordinator.store.create_run(config_of(rounds=1, round_seconds=1.5), "test")
    dead, *others = crowd_of(coordinator.port, "a-dead b c")
    await join_all([dead])
    dead.close()
    with Crowd(others) as crowd:
        states = await asyncio.to_thread(crowd.wait)
    round_ = await coordinator.store.round("trial", 1)
    assert set(states.values()) == {"finished"}
    assert round_.clients.submitted == ("b", "c")
    assert (round_.clients.selected, round_.clients.lost) == (("a-dead", "b", "c"), ("a-dead",))


async def test_an_update_after_the_deadline_is_late_and_seen(coordinator: Running) -> None:
    config = config_of(clients=2, min_clients=1, round_seconds=1.0)
    await coordinator.store.create_run(config, "test")
    slow, quick = clients = crowd_of(coordinator.port, "slow-one the-quick")
    await join_all(clients)
    tasks = {}

    async def both_train() -> bool:
        for client in clients:
            tasks[client.id] = await asyncio.to_thread(client.next_task, 300)
        return all(task.HasField("train") for task in tasks.values())

    await until(both_train)
    await asyncio.to_thread(quick.train, tasks[quick.id])

    async def moved_on() -> bool:
        return (await coordinator.store.run("trial")).round == 2

    await until(moved_on)
    reply = await asyncio.to_thread(slow.train, tasks[slow.id])
    assert (reply.result, reply.reason) == (SubmitReply.LATE, "the round has moved on")
    seen = (await coordinator.store.round("trial", 1)).clients
    assert (seen.late, seen.submitted, seen.lost) == (("slow-one",), ("the-quick",), ())
    for client in clients:
        client.close()


async def test_too_few_updates_fail_the_round_visibly_and_then_the_run(
    coordinator: Running,
) -> None:
    config = config_of(clients=2, rounds=1, round_seconds=0.4, max_attempts=2)
    await coordinator.store.create_run(config, "test")
    lazy = crowd_of(coordinator.port, "a b")
    await join_all(lazy)

    async def failed() -> bool:
        return (await coordinator.store.run("trial")).state is RunState.FAILED

    await until(failed)
    events = await coordinator.store.events("trial")
    rounds = [e.data for e in events if e.kind == "round"]
    failures = [data["failure"] for data in rounds if data["state"] == "failed"]
    assert failures[0] == "attempt 1 of round 1: 0 of 2 updates came in time"
    # By now a slow machine may have counted the silent members as lost.
    assert str(failures[1]).startswith("attempt 2 of round 1: 0 of 2 ")
    assert (await coordinator.store.run("trial")).failure == failures[1]
    again = [data["failure"] for data in rounds if data["attempt"] == 2 and data["state"] == "open"]
    assert again == failures[:1]  # the second attempt tells why there is one
    for client in lazy:
        client.close()


async def test_enrolment_without_enough_clients_fails_the_run(coordinator: Running) -> None:
    await coordinator.store.create_run(config_of(enrol_seconds=0.3), "test")
    only = crowd_of(coordinator.port, "a")
    await join_all(only)

    async def failed() -> bool:
        await asyncio.to_thread(only[0].heartbeat)  # it is there all the time, on any machine
        return (await coordinator.store.run("trial")).state is RunState.FAILED

    await until(failed)
    run = await coordinator.store.run("trial")
    assert run.failure == "1 of at least 2 clients enrolled in time"
    only[0].close()


async def test_several_runs_at_once_keep_apart(coordinator: Running) -> None:
    configs = [config_of(f"run-{seed}", seed=seed, clients=2) for seed in range(3)]
    clients = []
    for config in configs:
        await coordinator.store.create_run(config, "test")
        clients += crowd_of(coordinator.port, "a b", run=config.name)
    with Crowd(clients) as crowd:
        await asyncio.to_thread(crowd.wait)
    for config in configs:
        adapter = await coordinator.store.adapter_of_round(config.name, 2)
        assert same_bytes(adapter.tensors, expected_result(config, ["a", "b"]))


async def test_retention_keeps_first_best_and_last_and_says_when_it_dropped(
    coordinator: Running,
) -> None:
    config = config_of(clients=2, rounds=4, retention={"rounds": 1})
    await coordinator.store.create_run(config, "test")
    judge = evaluator(coordinator.port, ADMIN)
    scores = {0: 0.1, 1: 0.9, 2: 0.3, 3: 0.4, 4: 0.2}
    judged = judge.evaluate
    judge.evaluate = lambda task, _=0: judged(task, scores[task.evaluate.round])
    await join_all([judge])
    with Crowd([judge, *crowd_of(coordinator.port, "a b")]) as crowd:
        await asyncio.to_thread(crowd.wait)
    store = coordinator.store
    run = await store.run("trial")
    assert (run.best_round, run.last_round) == (1, 4)
    for kept in (0, 1, 4):
        assert (await store.adapter_of_round("trial", kept)).tensors
    for dropped in (2, 3):
        with pytest.raises(NotFound, match=rf"of round {dropped} was dropped at 20\d\d-"):
            await store.adapter_of_round("trial", dropped)


async def test_pause_takes_effect_between_rounds(coordinator: Running) -> None:
    await coordinator.store.create_run(config_of(clients=2, rounds=3), "test")
    clients = crowd_of(coordinator.port, "a b")
    await join_all(clients)

    async def opened() -> bool:
        return (await coordinator.store.run("trial")).round == 1

    await until(opened)
    await coordinator.store.command("trial", "pause", "test")
    with Crowd(clients) as crowd:

        async def first_done() -> bool:
            return (await coordinator.store.run("trial")).last_round == 1

        await until(first_done)
        await asyncio.sleep(0.3)
        run = await coordinator.store.run("trial")
        assert (run.state, run.round) == (RunState.PAUSED, 1)
        await coordinator.store.command("trial", "resume", "test")
        assert set((await asyncio.to_thread(crowd.wait)).values()) == {"finished"}


async def test_shards_are_dealt_by_client_id_and_a_lost_seat_is_taken_over(
    redis_server: RedisServer,
) -> None:
    server = CoordinatorServer(settings_of(redis_server.url, client_seconds=0.4))
    port = (await server.start()).grpc
    config = config_of(clients=2, data={"source": "digits"}, round_seconds=30.0)
    await server.store.create_run(config, "test")
    second, first, spare = crowd_of(port, "z a m")
    await join_all([second, first])
    waiting = await asyncio.to_thread(spare.join)
    assert waiting.wait.reason == "run 'trial' has all its 2 clients"
    await until(lambda: _replies(first.heartbeat))
    await asyncio.sleep(0.5)
    await asyncio.to_thread(first.heartbeat)
    reply = await asyncio.to_thread(spare.join)
    assert (reply.member.shard, reply.member.of) == (1, 2)
    assert (await server.store.run("trial")).members == ("a", "m")
    assert (await asyncio.to_thread(second.join)).wait.reason == waiting.wait.reason
    for client in (first, second, spare):
        client.close()
    await server.stop()


async def _replies(call: Callable[[], object]) -> bool:
    await asyncio.to_thread(call)
    return True


async def test_a_client_of_another_model_is_refused_at_join(coordinator: Running) -> None:
    await coordinator.store.create_run(config_of(), "test")
    first, second = crowd_of(coordinator.port, "a b", run="trial")
    await join_all([first])
    with pytest.raises(WrongModel, match="fingerprint: expected a-model, got other") as refused:
        await asyncio.to_thread(lambda: second.join(fingerprint="other", hidden_size=9))
    assert [problem.field for problem in refused.value.problems] == ["fingerprint", "hidden_size"]
    first.close()
    second.close()


async def test_a_newcomer_to_a_run_that_has_ended_is_told_so(coordinator: Running) -> None:
    await coordinator.store.create_run(config_of(), "test")
    await coordinator.store.command("trial", "stop", "test")
    client = crowd_of(coordinator.port, "a", run="trial")[0]
    with pytest.raises(Conflict, match="run 'trial' is stopped"):
        await asyncio.to_thread(client.join)
    client.close()


async def test_redis_is_killed_and_nothing_acknowledged_is_lost(
    mortal_redis: RedisServer,
) -> None:
    server = CoordinatorServer(settings_of(mortal_redis.url))
    port = (await server.start()).grpc
    config = config_of(deterministic=True, round_seconds=60.0)
    await server.store.create_run(config, "test")
    first, *others = clients = crowd_of(port, "a b c")
    await join_all(clients)

    async def trains() -> bool:
        return (await asyncio.to_thread(first.next_task, 500)).HasField("train")

    await until(trains)
    task = await asyncio.to_thread(first.next_task)
    await asyncio.to_thread(first.train, task)
    mortal_redis.kill()
    started = time.monotonic()
    with pytest.raises(Unavailable):
        await asyncio.to_thread(first.heartbeat)
    assert time.monotonic() - started < 5
    await asyncio.sleep(1.2)  # longer than the lease
    mortal_redis.start()
    assert (await server.store.round("trial", 1)).clients.submitted == ("a",)
    with Crowd([first, *others]) as crowd:
        await asyncio.to_thread(crowd.wait)
    adapter = await server.store.adapter_of_round("trial", 2)
    assert same_bytes(adapter.tensors, expected_result(config, ["a", "b", "c"]))
    await server.stop()


async def test_the_run_file_is_applied_once(redis_server: RedisServer, tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: from-file\nclients: 2\n")
    for _ in range(2):
        server = CoordinatorServer(settings_of(redis_server.url, run_file=path))
        await server.start()
        assert [run.name for run in (await server.store.runs())[0]] == ["from-file"]
        await server.stop()


def test_secrets_come_from_files(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("from-a-file\n")
    monkeypatch.setenv("FEDNANO_ADMIN_TOKEN_FILE", str(tmp_path / "token"))
    settings = CoordinatorSettings.load({})
    assert settings.admin_token.get_secret_value() == "from-a-file"
    assert "from-a-file" not in repr(settings)


async def test_sampling_takes_the_cohort_asked_for(coordinator: Running) -> None:
    config = config_of(clients=4, cohort=2, rounds=3, seed=5)
    await coordinator.store.create_run(config, "test")
    with Crowd(crowd_of(coordinator.port, "a b c d")) as crowd:
        await asyncio.to_thread(crowd.wait)
    rounds, _ = await coordinator.store.rounds("trial")
    cohorts = [round_.clients.selected for round_ in rounds[1:]]
    assert [len(cohort) for cohort in cohorts] == [2, 2, 2]
    assert len(np.unique(cohorts)) > 2
