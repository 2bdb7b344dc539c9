"""A federation from end to end, with light clients over real gRPC."""

from __future__ import annotations

import asyncio

import pytest
from fednano.coordinator.records import RunState
from prometheus_client import generate_latest

from tests.coordinator.conftest import ADMIN, Running
from tests.coordinator.federation import (
    SMALL,
    Crowd,
    FakeClient,
    config_of,
    evaluator,
    expected_result,
    same_bytes,
)


async def test_a_run_goes_from_enrolment_to_its_end(coordinator: Running) -> None:
    await coordinator.store.create_run(config_of(), "test")
    clients = [FakeClient(coordinator.port, ADMIN, f"c{index}") for index in range(3)]
    with Crowd([evaluator(coordinator.port, ADMIN), *clients]) as crowd:
        states = await asyncio.to_thread(crowd.wait)
    run = await coordinator.store.run("trial")
    assert set(states.values()) == {"finished"}
    assert run.state is RunState.FINISHED
    assert (run.last_round, run.members) == (2, ("c0", "c1", "c2"))
    rounds, _ = await coordinator.store.rounds("trial")
    assert [(r.number, r.state, r.clients.submitted) for r in rounds] == [
        (0, "done", ()),
        (1, "done", ("c0", "c1", "c2")),
        (2, "done", ("c0", "c1", "c2")),
    ]
    assert rounds[1].metrics["train_loss"] == 0.5
    assert rounds[1].bytes == {"adapters": 300}
    adapter = await coordinator.store.adapter_of_round("trial", 2)
    assert same_bytes(adapter.tensors, expected_result(run.config, ["c0", "c1", "c2"]))


async def test_evaluators_and_members_score_the_rounds_they_are_asked_for(
    coordinator: Running,
) -> None:
    evaluation = {"own_data": "ends", "every": 2, "seconds": 10.0}
    config = config_of(clients=2, rounds=3, evaluation=evaluation)
    await coordinator.store.create_run(config, "test")
    judge = evaluator(coordinator.port, ADMIN)
    await asyncio.sleep(0.3)
    assert (await asyncio.to_thread(judge.join)).HasField("member")
    with Crowd([judge, *(FakeClient(coordinator.port, ADMIN, name) for name in "ab")]) as crowd:
        await asyncio.to_thread(crowd.wait)
    rounds, _ = await coordinator.store.rounds("trial")
    assert [sorted(round_.own) for round_ in rounds] == [["a", "b"], [], [], ["a", "b"]]
    assert [round_.metrics.get("accuracy") for round_ in rounds] == pytest.approx(
        [0.1, None, 0.3, 0.4], nan_ok=True
    )
    assert (await coordinator.store.run("trial")).best_round == 3


async def test_the_metrics_count_what_happened(coordinator: Running) -> None:
    await coordinator.store.create_run(config_of(clients=2), "test")
    with Crowd([FakeClient(coordinator.port, ADMIN, name) for name in "ab"]) as crowd:
        await asyncio.to_thread(crowd.wait)
    metrics = coordinator.server.metrics
    await metrics.refresh(coordinator.store)
    text = generate_latest(metrics.registry).decode()
    for line in (
        'fednano_updates_total{result="accepted"} 4.0',
        'fednano_bytes_total{direction="sent",kind="adapters"} 400.0',
        'fednano_runs{state="finished"} 1.0',
        "fednano_round_seconds_count 3.0",
        "fednano_leader 1.0",
    ):
        assert line in text
    assert "fednano_redis_memory_limit_bytes 0.0" in text


UNEQUAL = {"rank": 4, "ranks": [1, 4, 2]}


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        *((name, SMALL) for name in ("fedadam", "multi-krum", "product", "ffa", "scaffold")),
        ("product", UNEQUAL),
        ("flora", UNEQUAL),
    ],
)
async def test_rounds_of_a_strategy_follow_from_each_other(
    coordinator: Running, name: str, adapter: dict[str, object]
) -> None:
    sends = name == "scaffold"
    clients = [FakeClient(coordinator.port, ADMIN, f"c{n}", fisher=sends) for n in range(5)]
    config = config_of(strategy={"name": name}, adapter=adapter, rounds=3, clients=5, min_clients=5)
    await coordinator.store.create_run(config, "test")
    with Crowd(clients) as crowd:
        await asyncio.to_thread(crowd.wait)
    last = await coordinator.store.adapter_of_round("trial", 3)
    assert same_bytes(last.tensors, expected_result(config, [c.id for c in clients]))
