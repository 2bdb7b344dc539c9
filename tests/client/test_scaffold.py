"""SCAFFOLD at a client: the corrected steps, and the control that it keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fednano.client.adapters import Tensors
from fednano.client.datasets import DigitsShard
from fednano.client.scaffold import Controls, Correction, less
from fednano.client.trainer import Trainer, TrainResult
from fednano.wire.run_config import DataConfig, TrainingConfig

from tests.tiny import large_tensors, no_adapters

SHARD = DigitsShard.deal(DataConfig(limit=40), seed=0, shard=0, of=4)
ETA = 0.05


def random_like(tensors: Tensors, seed: int, size: float = 1.0) -> Tensors:
    rng = np.random.default_rng(seed)
    return {n: (size * rng.normal(size=t.shape)).astype(np.float32) for n, t in tensors.items()}


def train(trainer: Trainer, correction: Tensors | None, **settings: object) -> TrainResult:
    return trainer.train(
        no_adapters(),
        lambda epoch: SHARD.epoch(0, 1, epoch, "c"),
        TrainingConfig.model_validate({"batch_size": 8, **settings}),
        correction=correction,
    )


def test_with_plain_sgd_the_new_control_is_the_papers_second_option() -> None:
    adapters = no_adapters()
    start, correction = adapters.to_tensors(), random_like(large_tensors(), 1)
    control = Correction(adapters, correction)
    optimizer = torch.optim.SGD(adapters.parameters(), ETA)
    for step in range(5):
        gradients = random_like(start, 10 + step)
        for name, parameter in adapters.named().items():
            parameter.grad = torch.tensor(gradients[name])
        control.apply()
        optimizer.step()
    moved = less(start, adapters.to_tensors())
    for name, gradient in control.mean().items():  # c_i - c + (x - y_i) / (K eta)
        wanted = -correction[name] + moved[name] / (5 * ETA)
        np.testing.assert_allclose(gradient, wanted, atol=1e-4)


def test_a_correction_of_zero_changes_nothing_but_tells_the_gradient(trainer: Trainer) -> None:
    plain, measured = train(trainer, None), train(trainer, {})
    assert all((plain.adapter[name] == measured.adapter[name]).all() for name in plain.adapter)
    assert not plain.gradient
    assert measured.gradient.keys() == plain.adapter.keys()
    assert measured.gradient["image.up"].any()


def test_a_correction_far_above_the_gradient_leads_where_it_points(trainer: Trainer) -> None:
    """It comes before clipping, so what is clipped is the corrected gradient."""
    start = no_adapters().to_tensors()
    correction = random_like(start, 2, 1e4)
    result = train(trainer, correction, learning_rate=1e-3)
    for name, tensor in result.adapter.items():
        assert (np.sign(start[name] - tensor) == np.sign(correction[name])).mean() > 0.99
    assert max(np.abs(gradient).max() for gradient in result.gradient.values()) < 1e3


def one(value: float) -> Tensors:
    return {"text.up": np.full((2, 1), value, np.float32)}


@pytest.mark.parametrize("on_disk", [False, True])
def test_an_attempt_that_is_repeated_starts_from_the_same_control(
    tmp_path: Path, on_disk: bool
) -> None:
    def again() -> Controls:
        """The same process, or one that was started again."""
        return Controls("site-1", tmp_path) if on_disk else controls

    controls = Controls("site-1", tmp_path if on_disk else None)
    assert again().of("trial", 1) == {}
    assert again().moved("trial", 1, one(3))["control.text.up"].tolist() == [[3], [3]]
    again().keep("trial", 1, one(3))
    again().keep("trial", 2, one(5))
    assert again().of("trial", 2)["text.up"].tolist() == [[3], [3]]
    assert again().of("trial", 3)["text.up"].tolist() == [[5], [5]]
    assert again().moved("trial", 3, one(4))["control.text.up"].tolist() == [[-1], [-1]]
    assert again().of("trial", 1) == {}  # of another run by that name, long ago
    assert again().of("other", 3) == {}
    again().forget("trial")
    assert again().of("trial", 3) == {}
    assert not list(tmp_path.iterdir())


def test_a_control_file_that_was_cut_short_is_none(tmp_path: Path) -> None:
    controls = Controls("site-1", tmp_path)
    controls.keep("trial", 1, one(3))
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o077 == 0
    path.write_bytes(path.read_bytes()[:40])
    assert Controls("site-1", tmp_path).of("trial", 2) == {}


def test_other_strategies_keep_and_send_no_control(tmp_path: Path) -> None:
    controls = Controls("site-1", tmp_path)
    assert controls.moved("trial", 1, {}) == {}
    controls.keep("trial", 1, {})
    assert not list(tmp_path.iterdir())
