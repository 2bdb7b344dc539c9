"""Shadows: other strategies on the same updates, one step from the adapter of the one that leads."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fednano.coordinator import keys
from fednano.coordinator.records import RoundRecord, Tensors
from fednano.coordinator.store_adapters import make_adapter
from fednano.coordinator.strategies import FedAvg, FisherMerging
from fednano.coordinator.submission import Rules
from fednano.lab.redis_server import free_port
from fednano.runs_cli import runs_app
from fednano.wire.coordinator_pb2 import (
    EVALUATOR,
    Evaluation,
    NextTaskReply,
    SubmitEvaluationRequest,
    SubmitReply,
)
from fednano.wire.errors import NotFound
from fednano.wire.run_config import RunConfig
from pydantic import ValidationError

from tests.coordinator import web
from tests.coordinator.conftest import ADMIN, Running
from tests.coordinator.federation import (
    Crowd,
    FakeClient,
    config_of,
    expected_rounds,
    same_bytes,
)
from tests.coordinator.killable import killed_in_turn
from tests.coordinator.test_kills import KILLS, MERGED, create_run, read_run, settings_for
from tests.coordinator.test_runs_cli import call
from tests.coordinator.web import Site
from tests.redis_server import RedisServer

site = web.site
CLIENTS = ["c0", "c1", "c2"]
SHADOWS = [{"name": "fednano-ef"}, {"name": "fedadam"}, {"name": "product"}, {"name": "fedavgm"}]
STEPS = "one-step counterfactuals"


def worth(adapter: Tensors) -> float:
    """A score that tells any two adapters apart."""
    return float(np.abs(adapter["text.up"]).mean())


class Judge(FakeClient):
    """Fetches and scores each adapter that it is asked for."""

    def evaluate(self, task: NextTaskReply, accuracy: float = 0.5) -> SubmitReply:
        wanted = task.evaluate
        scores = [
            Evaluation(
                adapter=digest,
                samples=4,
                metrics={"accuracy": worth(self.adapter(digest=digest))},
            )
            for digest in wanted.adapters
        ]
        header = self.header(wanted.round, wanted.attempt)
        return self.call(
            "SubmitEvaluation", SubmitEvaluationRequest(header=header, evaluations=scores)
        )


def told(round_: RoundRecord) -> list[tuple[str, str, float]]:
    return [(s.label, s.adapter_digest, s.metrics["accuracy"]) for s in round_.shadows]


def by_hand(config: RunConfig) -> list[list[tuple[str, str, float]]]:
    """What the rounds of an undisturbed run must tell of its shadows; round 0 has none."""
    rounds = [
        [make_adapter(state.adapter, config.adapter.scale) for state in states[1:]]
        for states in expected_rounds(config, CLIENTS)
    ]
    labels = [shadow.label for shadow in config.shadows]
    found = [
        [(label, one.digest, worth(one.tensors)) for label, one in zip(labels, made, strict=True)]
        for made in rounds
    ]
    return [[], *found]


async def test_shadows_are_what_merging_the_same_updates_by_hand_gives(
    coordinator: Running,
) -> None:
    config = config_of(strategy={"name": "fedavg"}, shadows=SHADOWS, rounds=3)
    await coordinator.store.create_run(config, "test")
    judge = Judge(coordinator.port, ADMIN, "judge", role=EVALUATOR)
    await asyncio.sleep(0.3)
    assert (await asyncio.to_thread(judge.join)).HasField("member")
    clients = [FakeClient(coordinator.port, ADMIN, name) for name in CLIENTS]
    with Crowd([judge, *clients]) as crowd:
        await asyncio.to_thread(crowd.wait)
        rounds, _ = await coordinator.store.rounds("trial")
        shadow = rounds[3].shadows[0].adapter_digest
        with pytest.raises(NotFound, match="a shadow's is dropped once its round was evaluated"):
            await asyncio.to_thread(judge.adapter, digest=shadow)
    assert [told(round_) for round_ in rounds] == by_hand(config)
    alone = config_of(strategy={"name": "fedavg"}, rounds=3)
    *_, (state,) = expected_rounds(alone, CLIENTS)
    adapter = await coordinator.store.adapter_of_round("trial", 3)
    assert same_bytes(adapter.tensors, state.adapter)  # shadows don't change the run
    assert await left_of_shadows(coordinator.store) == 0


async def left_of_shadows(store: Any) -> int:
    """How many of Redis's keys for them are there."""
    return int(await store.database.call("EXISTS", *keys.passing("trial", len(SHADOWS))))


async def test_a_shadow_s_adapter_is_kept_until_it_was_evaluated_or_the_run_is_over(
    site: Site,
) -> None:
    federation = await site.federation(shadows=[{"name": "fedadam"}])
    await federation.play(1)
    await federation.train(1)
    assert await left_of_shadows(site.store) == 2  # the adapter, and moments
    await federation.evaluate(1)
    assert await left_of_shadows(site.store) == 1
    await federation.train(2)
    assert await left_of_shadows(site.store) == 2
    await site.store.command("trial", "stop", "test")
    assert await left_of_shadows(site.store) == 0


def test_a_coordinator_killed_around_the_merge_ends_in_the_same_shadows(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    config = config_of(deterministic=True, round_seconds=60.0, shadows=SHADOWS[1:])
    port = free_port()
    asyncio.run(create_run(redis_server.url, config))
    settings = settings_for(redis_server, port)
    judge = Judge(port, ADMIN, "judge", role=EVALUATOR)
    clients = [FakeClient(port, ADMIN, name) for name in CLIENTS]
    evaluated = ("fednano.coordinator.store_rounds:RoundStore.finish", "before", "1")
    with Crowd([judge, *clients]) as crowd:
        killed_in_turn(settings, tmp_path, (*KILLS[MERGED], evaluated), crowd.wait)
    _, rounds, _ = asyncio.run(read_run(redis_server.url))
    assert [(r.attempt, r.state) for r in rounds] == [(1, "done")] * 3
    digests = [[shadow[:2] for shadow in shadows] for shadows in by_hand(config)]
    assert [[(s.label, s.adapter_digest) for s in r.shadows] for r in rounds] == digests
    assert [told(round_) for round_ in rounds] == by_hand(config)


def test_clients_send_what_any_of_the_strategies_needs() -> None:
    base = {"text.up": np.zeros((2, 1), np.float32)}
    rules = Rules("digest", base, [FedAvg(), FisherMerging(0.1, True), FisherMerging(0, False)], 1)
    assert rules.auxiliary == ("fisher.text.up",)


def refusal(**values: Any) -> str:
    with pytest.raises(ValidationError) as refused:
        RunConfig.model_validate({"name": "trial", "clients": 9, "min_clients": 5, **values})
    return str(refused.value)


@pytest.mark.parametrize("name", ["fedprox", "ffa", "scaffold"])
def test_a_way_to_train_can_lead_and_be_no_shadow(name: str) -> None:
    wanted = (
        "shadows.0: expected a strategy that only merges, as this one's clients train otherwise"
    )
    assert f"{wanted}, got {name}" in refusal(shadows=[{"name": name}])
    leads = {"name": "trial", "strategy": {"name": name}, "shadows": [{"name": "fednano"}]}
    assert len(RunConfig.model_validate(leads).strategies) == 2


@pytest.mark.parametrize(
    ("leader", "shadows", "reason"),
    [
        ("fedavg", ["fedavg"], "shadows.0: expected another strategy than the one that leads, got"),
        ("fedavg", ["krum", "krum"], "shadows.1: expected each strategy once, got krum"),
        ("fedprox", ["fedavg"], "shadows.0: expected another merging than that of fedprox, which"),
        ("fednano", ["fednano-ef"], "shadows.0: expected fednano or fednano-ef alone, as clients"),
        ("fedavg", ["fednano", "fednano-ef"], "shadows.1: expected fednano or fednano-ef alone"),
        (
            "flora",
            ["fedavg"],
            "shadows.0: expected none where flora leads, whose clients send what",
        ),
        ("product", ["fedyogi"], "shadows.0: expected no moments by element where product leads"),
        ("fedavg", ["trimmed-mean", "median", "x"], "shadows.2.name"),
    ],
)
def test_what_can_t_be_a_shadow_is_refused_with_the_reason(
    leader: str, shadows: list[str], reason: str
) -> None:
    body = {"strategy": {"name": leader}, "shadows": [{"name": name} for name in shadows]}
    assert reason in refusal(**body)


def test_a_shadow_s_settings_and_needs_are_told_by_its_place() -> None:
    wrong = [{"name": "median"}, {"name": "krum", "trim": 0.2}]
    assert "shadows.1.trim: expected nothing for 'krum', as it is a setting" in refusal(
        shadows=wrong
    )
    starved = "min_clients: expected at least 7 updates for shadows.0.name krum as it is set, got 5"
    assert starved in refusal(shadows=[{"name": "krum", "byzantine": 2}])
    many = [{"name": "fedavgm", "momentum": number / 10} for number in range(9)]
    assert "at most 8 items" in refusal(shadows=many)


async def test_rest_tells_of_each_shadow_and_what_it_is(site: Site) -> None:
    shadows = [{"name": "fedadam", "momentum": 0.5}, {"name": "product"}]
    await (await site.federation(shadows=shadows)).play(2)
    first, second = (await site.http.get("/runs/trial/rounds", params={"limit": 2})).json()["items"]
    assert first["shadows"] == []
    assert [one["label"] for one in second["shadows"]] == ["fedadam (momentum 0.5)", "product"]
    assert second["shadows"][0]["strategy"]["momentum"] == 0.5
    assert 0 < second["shadows"][1]["metrics"]["accuracy"] < 1
    digests = {one["adapter_digest"] for one in (second, *second["shadows"])}
    assert len(digests) == 3
    schemas = site.app.openapi()["components"]["schemas"]
    assert STEPS in schemas["RoundReply"]["properties"]["shadows"]["description"]
    assert "independent runs decide results" in schemas["ShadowReply"]["description"]
    events = await site.store.events("trial")
    done = [one.data for one in events if one.kind == "round" and one.data["state"] == "done"][-1]
    assert [one["strategy"]["name"] for one in done["shadows"]] == ["fedadam", "product"]  # type: ignore[attr-defined]


async def test_the_command_line_shows_shadows_beside_the_leader(site: Site) -> None:
    await (await site.federation(shadows=[{"name": "product"}])).play(2)
    shown = (await call(runs_app, site, "show", "trial")).output
    assert STEPS in shown
    leader, shadow = ((r.metrics["accuracy"]) for r in await both(site))
    assert shown.splitlines()[-1].split() == ["1", f"{leader:.3f}", f"{shadow:.3f}"]
    assert shown.splitlines()[-2].split() == ["round", "fedavg,", "leads", "product"]


async def both(site: Site) -> tuple[Any, Any]:
    round_ = await site.store.round("trial", 1)
    return round_, round_.shadows[0]
