"""What clients train, by their run's strategy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fednano.client.adapters import NanoAdapters
from fednano.client.batches import Batch
from fednano.client.datasets import DigitsShard
from fednano.client.edge import EdgeHalf, NanoEdge
from fednano.client.examples import Example
from fednano.client.methods import adapters_to_train
from fednano.client.trainer import Trainer
from fednano.wire.run_config import DataConfig, RunConfig, TrainingConfig

from tests.tiny import large_tensors

SHARD = DigitsShard.deal(DataConfig(limit=40), seed=0, shard=0, of=4)


def made(strategy: str, rank: int) -> NanoAdapters:
    config = RunConfig.model_validate({"name": "trial", "strategy": {"name": strategy}})
    return adapters_to_train(config, large_tensors(rank=4), 0.7, rank, [1, 2])


def test_a_client_of_a_smaller_rank_takes_the_first_rows() -> None:
    base, own = large_tensors(rank=4), made("product", 3).to_tensors()
    assert {name: t.shape for name, t in own.items()} == {
        name: (3, 128) if name.endswith("down") else (128, 3) for name in base
    }
    assert (own["text.down"] == base["text.down"][:3]).all()
    assert (own["text.up"] == base["text.up"][:, :3]).all()


def test_with_flora_a_fresh_adapter_lies_beside_the_frozen_one(
    edge: EdgeHalf, examples: list[Example]
) -> None:
    batch = Batch.of([edge.prepare(example) for example in examples])
    adapters, base = made("flora", 2), NanoAdapters.from_tensors(large_tensors(rank=4), 0.7)
    torch.testing.assert_close(NanoEdge(adapters)(batch), NanoEdge(base)(batch))  # B = 0
    with torch.no_grad():
        for name, parameter in adapters.named().items():
            parameter.copy_(torch.tensor(large_tensors(rank=2, seed=5)[name]))
    added = NanoAdapters.from_tensors(adapters.to_tensors(), 0.7)
    both = NanoEdge(base)(batch) + NanoEdge(added)(batch) - batch.base
    torch.testing.assert_close(NanoEdge(adapters)(batch), both)


def test_only_the_fresh_adapter_is_trained_and_sent(trainer: Trainer) -> None:
    adapters = made("flora", 2)
    start, held = adapters.to_tensors(), adapters.by_name["text"].down[:4].detach().clone()
    settings = TrainingConfig(weight_decay=0.1)
    result = trainer.train(adapters, lambda e: SHARD.epoch(0, 1, e, "c"), settings)
    assert (adapters.by_name["text"].down[:4] == held).all()
    assert result.adapter["text.down"].shape == (2, 128)
    assert all((result.adapter[name] != start[name]).any() for name in start)


@pytest.mark.parametrize("strategy", ["flora", "product"])
def test_clients_draw_the_same_again_and_each_its_own(strategy: str) -> None:
    config = RunConfig.model_validate({"name": "trial", "strategy": {"name": strategy}})
    first, again, other = (
        adapters_to_train(config, large_tensors(), 0.7, 4, draw).to_tensors()
        for draw in ([1, 2], [1, 2], [1, 3])
    )
    assert all((first[name] == again[name]).all() for name in first)
    assert (first["text.down"] != other["text.down"]).any() == (strategy == "flora")
    assert np.isfinite(first["text.down"]).all()
