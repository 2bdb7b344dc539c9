"""What a client keeps for itself after a run, and what that is worth."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fednano.client.adapters import NanoAdapters
from fednano.client.coordination import Membership
from fednano.client.examples import Example
from fednano.client.heartbeat import Heartbeat
from fednano.client.personal import Kept, Mixture, kept_at, mixed
from fednano.client.placements import NanoPlacement
from fednano.client.trainer import Trainer
from fednano.client.worker import Worker
from fednano.wire import coordinator_pb2 as pb
from fednano.wire.errors import InvalidRequest
from fednano.wire.run_config import RunConfig

from tests.client.test_evaluating import Coordinator
from tests.tiny import large_tensors

KINDS = ["fine-tuned", "feddpa-f"]


def test_mixed_adapters_give_the_mixture_of_their_outputs() -> None:
    rng = np.random.default_rng(0)
    shapes = {"image.down": (2, 6), "image.up": (6, 2)}
    one, other = ({n: rng.normal(size=s) for n, s in shapes.items()} for _ in range(2))
    x = rng.normal(size=6)

    def output(tensors: Any) -> Any:
        return tensors["image.up"] @ tensors["image.down"] @ x

    expected = 0.7 * output(one) + 0.3 * output(other)
    np.testing.assert_allclose(output(mixed(one, other, 0.3)), expected, rtol=1e-6)


def kept(trainer: Trainer, examples: list[Example], kind: str) -> Kept:
    own, shared = large_tensors(seed=1), large_tensors(seed=2)
    mixture = Mixture.of(trainer.edge, shared, own, examples) if kind == "feddpa-f" else None
    return Kept(0.7, own, mixture)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_answers_the_same_when_it_is_read_again(
    trainer: Trainer, examples: list[Example], tmp_path: Path, kind: str
) -> None:
    before, path = kept(trainer, examples, kind), kept_at(tmp_path, "trial", "c")
    before.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    after = Kept.load(path)
    one, other = (k.tensors(trainer.edge, examples[0]) for k in (before, after))
    assert {n: t.tobytes() for n, t in one.items()} == {n: t.tobytes() for n, t in other.items()}
    placement = NanoPlacement(trainer, 0.7)
    assert after.score(placement, examples, 8) == before.score(placement, examples, 8)


def test_what_was_not_kept_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="--personal: expected what this client kept"):
        Kept.load(kept_at(tmp_path, "trial", "c"))


def test_a_mixture_leans_on_the_own_adapter_the_more_a_question_is_like_its_data(
    trainer: Trainer, examples: list[Example]
) -> None:
    _, two, text = examples
    mixture = Mixture.of(trainer.edge, large_tensors(seed=2), large_tensors(seed=1), [two])
    (near, _), (far, _) = (mixture.by_question(trainer.edge, [e])[0] for e in (two, text))
    own = [np.abs(found["image.up"][:, 4:]).sum() for found in (near, far)]
    assert own[0] > own[1]
    everything = mixture.by_question(trainer.edge, examples)
    assert sorted(e.id for _, chosen in everything for e in chosen) == ["none", "one", "two"]


def test_the_score_of_an_own_adapter_is_the_trainer_s(
    trainer: Trainer, examples: list[Example]
) -> None:
    placement = NanoPlacement(trainer, 0.7)
    found = kept(trainer, examples, "fine-tuned").score(placement, examples, 8)
    expected = trainer.evaluate(NanoAdapters.from_tensors(large_tensors(seed=1), 0.7), examples, 8)
    assert (found.accuracy, found.samples) == (expected.accuracy, 3)
    assert found.loss == pytest.approx(expected.loss)


def evaluated(trainer: Trainer, number: int, directory: Path | None, **more: Any) -> dict[str, Any]:
    """What a trainer reports of a round of a run of two."""
    body = {
        "name": "trial",
        "rounds": 2,
        "data": {"limit": 20, "evaluation_limit": 2},
        **more,
    }
    coordinator = Coordinator(leader=0.1)
    coordinator.client = "c"  # type: ignore[attr-defined]
    member = Membership("trial", "s", RunConfig.model_validate(body), "token", 0, 2)
    heartbeat = Heartbeat(coordinator, member, 60.0)  # type: ignore[arg-type]
    placement = NanoPlacement(trainer, 0.7)
    worker = Worker(coordinator, member, placement, heartbeat, directory=directory)  # type: ignore[arg-type]
    task = pb.EvaluateTask(round=number, attempt=1, adapters=["leader"], shard=0, of=2)
    worker.evaluate(task)
    return coordinator.submitted["leader"]


@pytest.mark.parametrize("kind", KINDS)
def test_after_the_last_round_a_client_has_an_adapter_of_its_own(
    trainer: Trainer, tmp_path: Path, kind: str
) -> None:
    found = evaluated(trainer, 2, tmp_path, personal=kind)
    assert {"accuracy", "personal.accuracy", "personal.global_accuracy"} <= found.keys()
    own, merged = Kept.load(kept_at(tmp_path, "trial", "c")).own, large_tensors()
    assert own.keys() == merged.keys()
    assert all(np.abs(own[name] - np.float32(0.1) * merged[name]).max() > 0 for name in own)


@pytest.mark.parametrize(("number", "kind"), [(1, "fine-tuned"), (2, "none")])
def test_otherwise_nothing_is_trained_and_nothing_kept(
    trainer: Trainer, tmp_path: Path, number: int, kind: str
) -> None:
    found = evaluated(trainer, number, tmp_path, personal=kind)
    assert "personal.accuracy" not in found
    assert not list(tmp_path.iterdir())


def test_without_a_directory_it_is_scored_and_not_kept(trainer: Trainer) -> None:
    assert "personal.accuracy" in evaluated(trainer, 2, None, personal="fine-tuned")
