"""A client's work in a round, on the LLM in this process."""

from __future__ import annotations

import pytest
from fednano.client.adapters import NanoAdapters
from fednano.client.datasets import DigitsShard, digits_test
from fednano.client.heartbeat import TaskGivenUp
from fednano.client.trainer import Trainer, TrainResult
from fednano.models.language_model import Sampling
from fednano.wire.errors import InvalidRequest
from fednano.wire.run_config import DataConfig, TrainingConfig

from tests.tiny import large_tensors, no_adapters

SHARD = DigitsShard.deal(DataConfig(limit=60), seed=0, shard=0, of=4)


def train(
    trainer: Trainer,
    fisher: str = "none",
    mu: float = 0.0,
    adapters: NanoAdapters | None = None,
    **settings: object,
) -> TrainResult:
    return trainer.train(
        adapters or no_adapters(),
        lambda epoch: SHARD.epoch(0, 1, epoch, "c"),
        TrainingConfig.model_validate(settings),
        fisher,  # type: ignore[arg-type]
        mu=mu,
    )


def test_accuracy_is_that_of_generating_every_answer(trainer: Trainer) -> None:
    examples = digits_test(limit=40)
    adapters = NanoAdapters.from_tensors(
        {name: tensor * 0.1 for name, tensor in large_tensors().items()}, scale=0.7
    )
    result = trainer.evaluate(adapters, examples)
    answers = trainer.answers(adapters, examples, Sampling(8))
    right = [a == e.answer for a, e in zip(answers, examples, strict=True)]
    assert 0.2 < result.accuracy < 0.98
    assert result.accuracy == pytest.approx(sum(right) / len(right))
    assert result.by_kind.keys() == {"name", "numeral", "parity"}


def test_training_lowers_the_loss(trainer: Trainer) -> None:
    first, later = train(trainer, epochs=1), train(trainer, epochs=4)
    assert later.loss < first.loss
    assert first.samples == len(SHARD) == 48


def test_training_is_deterministic(trainer: Trainer) -> None:
    first, again = train(trainer), train(trainer)
    assert all((first.adapter[name] == again.adapter[name]).all() for name in first.adapter)


def test_both_loss_modes_train_alike(trainer: Trainer) -> None:
    server, client = train(trainer, loss="server"), train(trainer, loss="client")
    for name, tensor in server.adapter.items():
        assert abs(tensor - client.adapter[name]).max() < 1e-3


@pytest.mark.parametrize("mode", ["last-epoch", "extra-pass"])
def test_fisher_comes_with_the_update(trainer: Trainer, mode: str) -> None:
    result = train(trainer, mode)
    assert result.fisher.keys() == {f"fisher.{name}" for name in result.adapter}
    assert all((tensor >= 0).all() and tensor.any() for tensor in result.fisher.values())


def test_the_extra_pass_changes_no_adapter(trainer: Trainer) -> None:
    plain, measured = train(trainer), train(trainer, "extra-pass")
    assert all((plain.adapter[name] == measured.adapter[name]).all() for name in plain.adapter)


def test_a_single_ef_step_has_no_gradient_for_a(trainer: Trainer) -> None:
    """At B = 0 A's gradient is zero; merging must cope with such a Fisher."""
    result = train(trainer, "last-epoch", batch_size=4096)
    assert not result.fisher["fisher.image.down"].any()
    assert result.fisher["fisher.image.up"].any()


def test_fedprox_holds_a_client_near_the_rounds_adapter(trainer: Trainer) -> None:
    def distance(mu: float) -> float:
        adapter = train(trainer, mu=mu, max_grad_norm=0, epochs=2).adapter
        start = no_adapters().to_tensors()
        return sum(float(((adapter[name] - start[name]) ** 2).sum()) for name in start)

    free, held = distance(0.0), distance(10.0)
    assert held < 0.5 * free


def test_a_frozen_down_is_not_trained(trainer: Trainer) -> None:
    adapters = no_adapters()
    adapters.freeze_down()
    start, end = adapters.to_tensors(), train(trainer, adapters=adapters).adapter
    assert (end["image.down"] == start["image.down"]).all()
    assert (end["text.down"] == start["text.down"]).all()
    assert (end["image.up"] != start["image.up"]).any()


def test_work_can_be_given_up(trainer: Trainer) -> None:
    def enough(share: float) -> None:
        if share > 0.5:
            raise TaskGivenUp("enough")

    with pytest.raises(TaskGivenUp):
        trainer.train(
            no_adapters(),
            lambda epoch: SHARD.epoch(0, 1, epoch, "c"),
            TrainingConfig(),
            progress=enough,
        )


def test_tensors_that_are_no_adapter_are_refused() -> None:
    tensors = large_tensors()
    del tensors["text.up"]
    with pytest.raises(InvalidRequest, match="expected down and up of image and/or text"):
        NanoAdapters.from_tensors(tensors, 1.0)
    tensors = large_tensors()
    tensors["image.up"] = tensors["image.up"][:, :2]
    with pytest.raises(InvalidRequest, match=r"got down \[4, 128\], up \[128, 2\]"):
        NanoAdapters.from_tensors(tensors, 1.0)
