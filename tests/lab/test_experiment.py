"""`fednano experiment`: the plan, what is kept, the report; and cells over the real tiny model."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from fednano.client.datasets import Shard
from fednano.coordinator.store_adapters import make_adapter
from fednano.coordinator.strategies import State
from fednano.lab.experiment.attacks import Flipped, attackers, forged
from fednano.lab.experiment.cell import Bench, Pooled, Solo
from fednano.lab.experiment.plan import Attack, Cell, Plan
from fednano.lab.experiment.report import write_report
from fednano.lab.experiment.results import Figures, ResultsFile
from fednano.lab.experiment.run import RESULTS
from fednano.lab.federation import TINY_MODEL
from fednano.lab.processes import FEDNANO
from fednano.models.split import split
from fednano.wire.errors import InvalidRequest
from fednano.wire.run_config import DataConfig

from tests.lab.plans import SMALL, cells, result

PICTURES = 2  # of a client, held back; each is asked three questions


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    halves = tmp_path_factory.mktemp("halves") / "tiny"
    split(TINY_MODEL, halves)
    return Bench.load(halves)


def figures_of(bench: Bench, cell: Cell) -> Figures:
    return Solo(bench, cell, lambda text: None).run()


def test_a_table_takes_from_the_plan_what_it_does_not_say(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(
        "name: two\nseeds: [3, 4]\nmethods: [fedavg, local]\ntables:\n"
        "  - {name: one, clients: [2]}\n  - {name: other, methods: [fedavg], clients: [2, 5]}\n"
    )
    plan = Plan.read(path)
    found = {(c.method.label, c.config.clients, c.config.seed) for c in plan.cells()}
    expected = {(m, 2, s) for m in ("fedavg", "local") for s in (3, 4)}
    assert found == expected | {("fedavg", 5, 3), ("fedavg", 5, 4)}
    assert len(plan.cells_in(["other"])) == 4
    with pytest.raises(InvalidRequest, match="--table: expected one of one, other, got third"):
        plan.cells_in(["third"])


def test_a_table_s_run_changes_some_of_the_plan_s(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(
        "name: two\nmethods: [fedavg]\nrun: {rounds: 5, evaluation: {every: 5}}\ntables:\n"
        "  - {name: short}\n  - {name: long, run: {rounds: 9}}\n"
    )
    plan = Plan.read(path)
    found = [plan.cells_in([name])[0].config for name in ("short", "long")]
    assert [(each.rounds, each.evaluation.every) for each in found] == [(5, 5), (9, 5)]
    assert "Here: rounds 9." in write_report(plan, {}, tmp_path).read_text()


def test_the_key_is_that_of_what_is_computed_not_of_what_it_is_called() -> None:
    (plain,) = cells()
    (named,) = cells(methods=[{"name": "fedavg", "label": "mean"}])
    (other,) = cells(methods=["fednano"])
    assert plain.key == named.key != other.key


def test_a_method_may_have_a_training_of_its_own() -> None:
    slow = {"name": "fedavg", "label": "slow", "training": {"learning_rate": 1e-4}}
    plain, tuned = cells(methods=["fedavg", slow], run={**SMALL, "training": {"epochs": 2}})
    assert plain.config.training.learning_rate == 5e-3
    assert tuned.config.training.learning_rate == 1e-4
    assert plain.config.training.epochs == tuned.config.training.epochs == 2
    assert plain.key != tuned.key


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"methods": ["fedsgd"]}, "methods: expected one of fedavg"),
        ({"methods": ["fedavg", "fedavg"]}, "methods: expected each once"),
        ({"methods": [{"name": "local", "mu": 1}]}, "expected no settings for local"),
        ({"methods": [{"name": "fedavg", "mu": 1}]}, "strategy.mu: expected nothing for 'fedavg'"),
        ({"methods": [{"name": "fedavg", "training": {"speed": 1}}]}, "run.training.speed"),
        ({"baseline": "krum"}, "baseline: expected one of"),
        ({"run": {"seed": 1}}, "run.seed: expected nothing"),
        ({"partitions": ["zipf"]}, "run.data.partition: expected"),
        ({"run": {"adapter": {"rank": 8}}}, "run.adapter.rank: expected nothing"),
        ({"tables": [{"name": "a", "run": {"seed": 1}}]}, "run.seed: expected nothing"),
        ({"run": {"adapter": None}}, "run.adapter: expected a mapping"),
        ({"run": {"training": {"wire_dtype": "int8"}}}, "run.training.wire_dtype: expected fp32"),
        ({"run": {"training": {"wire": "factored"}}}, "run.training.wire: expected dense"),
        ({"methods": [{"name": "fine-tuned", "strategy": "flora"}]}, "run.personal: expected none"),
        ({"methods": ["flora"], "attacks": ["scale"]}, "attacks: expected label-flip"),
        ({"attacks": ["scale", "scale"]}, "attacks: expected each once"),
        ({"attacks": [{"kind": "scale", "clients": 4}]}, "attacks.clients: expected fewer than 4"),
        ({"methods": ["krum"], "clients": [4]}, "run.min_clients: expected at"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_with_the_field(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps({"name": "bad", "methods": ["fedavg"], **changes}))  # JSON is YAML
    with pytest.raises(InvalidRequest) as refused:
        Plan.read(path)
    assert told in str(refused.value)


def test_every_method_runs_and_says_what_it_should(bench: Bench) -> None:
    methods = [{"name": "fednano-ef", "shadows": ["fedavg"]}, "scaffold", "local", "centralised",
               "fine-tuned", "feddpa-f"]  # fmt: skip
    found = {cell.method.label: figures_of(bench, cell) for cell in cells(methods=methods)}
    starts = {figures.rounds[0].accuracy for figures in found.values()}
    assert len(starts) == 1  # all begin with the same adapter
    assert all(len(figures.own) == 2 for figures in found.values())
    assert found["fednano-ef"].rounds[2].shadows.keys() == {"fedavg"}
    assert found["local"].adapter == found["centralised"].adapter == ""
    assert found["fine-tuned"].adapter == found["feddpa-f"].adapter != found["scaffold"].adapter
    assert found["fine-tuned"].own_shared == found["feddpa-f"].own_shared != []
    assert found["local"].accuracy == fmean(found["local"].test_own)
    assert found["fine-tuned"].merged == found["feddpa-f"].merged
    assert found["fine-tuned"].accuracy == fmean(found["fine-tuned"].test_own)


def test_a_shadow_carries_moments_of_its_own(bench: Bench) -> None:
    """Its merging being the leader's, a momentum of 0 takes the leader's own steps, and one of 0.5
    others from the second round on."""
    shadows = [{"name": "fedavgm", "momentum": m} for m in (0.0, 0.5)]
    (cell,) = cells(methods=[{"name": "fedavg", "shadows": shadows}])
    solo = Solo(bench, cell, lambda text: None)
    before = State(bench.first(cell.config))
    (leader, still, moving), _ = solo._round(1, before)
    assert digest(leader) == digest(still) == digest(moving)
    (leader, still, moving), _ = solo._round(2, leader)
    assert digest(leader) == digest(still) != digest(moving)


def digest(state: State) -> str:
    return make_adapter(state.adapter, 1.0).digest


def test_a_cell_that_fails_is_told(tmp_path: Path) -> None:
    """Of one image none is left to train on."""
    plan = tmp_path / "plan.yaml"
    run = {**SMALL, "data": {"limit": 1, "evaluation_limit": 2}}
    body = {"name": "bad", "methods": ["fedavg"], "clients": [2], "seeds": [0], "run": run}
    plan.write_text(json.dumps(body))
    with started(plan, tmp_path / "out") as running:
        told, _ = running.communicate(timeout=300)
    assert running.returncode == 1, told
    assert "failed: fedavg, task digits" in told
    assert "1 cells are missing" in (tmp_path / "out" / "report.md").read_text()


def test_the_same_cell_gives_the_same_figures(bench: Bench) -> None:
    (cell,) = cells(methods=["scaffold"])
    first, second = (figures_of(bench, cell) for _ in range(2))
    assert first.adapter == second.adapter
    assert [r.accuracy for r in first.rounds] == [r.accuracy for r in second.rounds]


def test_bytes_are_those_of_the_tensors_that_would_cross(bench: Bench) -> None:
    (cell,) = cells(run={**SMALL, "rounds": 1})
    spent = figures_of(bench, cell).rounds[1].spent
    adapter = 4 * 16 * 128 * 4
    vectors = spent.received - adapter
    assert vectors % (128 * 4) == 0
    assert spent.sent - adapter == vectors > 0  # an embedding there, a gradient back


def test_an_attacker_sends_another_step_than_it_took() -> None:
    base, trained = {"a": np.ones(3, np.float32)}, {"a": np.full(3, 1.5, np.float32)}
    flipped = forged(Attack(kind="sign-flip"), base, trained)
    scaled = forged(Attack(kind="scale", factor=4), base, trained)
    assert flipped["a"].tolist() == [0.5] * 3
    assert scaled["a"].tolist() == [3.0] * 3


def test_attackers_are_drawn_by_the_seed_alone() -> None:
    attack = Attack(kind="label-flip", clients=2)
    drawn = {attackers(attack, 10, seed) for seed in range(20)}
    assert all(len(members) == 2 for members in drawn)
    assert len(drawn) > 5
    assert attackers(attack, 10, 3) == attackers(Attack(kind="scale", clients=2), 10, 3)


def test_every_caption_of_an_attacker_is_wrong(bench: Bench) -> None:
    (cell,) = cells(tasks=["scenes"], clients=[3], attacks=["label-flip"])
    solo = Solo(bench, cell, lambda text: None)
    (bad,) = solo._bad
    flipped = solo._shards[bad]
    honest = Shard.deal(cell.config.data, 0, bad, 3)
    pairs = zip(honest.epoch(0, 1, 0, "x"), flipped.epoch(0, 1, 0, "x"), strict=True)
    assert all(right.answer != wrong.answer for right, wrong in pairs)


def test_flipped_labels_are_wrong_ones_of_the_same_kind() -> None:
    shard = Shard.deal(DataConfig(limit=40), 0, 0, 4)
    flipped = Flipped.made(shard, shard.held_back() + shard.epoch(0, 1, 0, "x"))
    right, wrong = (data.epoch(0, 2, 0, "x") for data in (shard, flipped))
    changed = [(r.kind, r.answer, w.answer) for r, w in zip(right, wrong, strict=True)]
    assert ("parity", "no", "yes") in changed
    assert all(r.question == w.question for r, w in zip(right, wrong, strict=True))
    assert sum(before != after for _, before, after in changed) > len(changed) / 2


def test_everybody_s_data_is_trained_on_once_an_epoch() -> None:
    shards = [Shard.deal(DataConfig(limit=30), 0, member, 3) for member in range(3)]
    pooled = Pooled(shards).epoch(0, 1, 0, "pooled")
    separate = [e.id for n, shard in enumerate(shards) for e in shard.epoch(0, 1, 0, f"shard-{n}")]
    assert sorted(example.id for example in pooled) == sorted(separate)
    assert [example.id for example in pooled] != separate


@contextmanager
def started(plan: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    command = [*FEDNANO, "experiment", str(plan), "--out", str(out), "--workers", "1"]
    with subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as running:
        try:
            yield running
        finally:
            running.terminate()


def until(ready: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.timeout(900)
def test_after_a_signal_the_same_command_goes_on(tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.yaml", tmp_path / "out"
    body = {"name": "small", "run": SMALL, "methods": ["fedavg", "median"], "clients": [3]}
    plan.write_text(json.dumps({**body, "seeds": [0, 1]}))
    results = out / RESULTS
    with started(plan, out) as running:
        until(lambda: results.exists() and results.read_text().count("\n") >= 1)
        running.send_signal(signal.SIGINT)
        told, _ = running.communicate(timeout=60)
    assert running.returncode == 130, told
    assert "the same command goes on" in told
    before = results.read_text().splitlines()
    assert 1 <= len(before) < 4
    with started(plan, out) as again:
        told, _ = again.communicate(timeout=400)
    assert again.returncode == 0, told
    assert f"{len(before)} of 4 cells are there already" in told
    lines = results.read_text().splitlines()
    assert lines[: len(before)] == before
    assert len(lines) == 4
    assert "4 of 4 cells" in (out / "report.md").read_text()


def test_results_of_another_model_are_not_taken_for_its_own(tmp_path: Path) -> None:
    (cell,) = cells()
    file = ResultsFile(tmp_path / RESULTS)
    file.append([result(cell, 0.5, "other"), replace(result(cell, 0.8), model="m")])
    assert file.read("m")[cell.key].figures.accuracy == 0.8
    assert file.read("none") == {}


def test_the_plans_in_the_documentation_can_be() -> None:
    docs = Path(__file__).parents[2] / "docs"
    for path in (docs / "plans").glob("*.yaml"):
        assert Plan.read(path).cells()
    shown = (docs / "experiments.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    assert shown == (docs / "plans" / "small.yaml").read_text()
