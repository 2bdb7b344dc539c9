"""The Fisher estimate is the mean of squared per-sample gradients."""

from __future__ import annotations

import copy

import numpy as np
import torch
from fednano.client.adapters import NanoAdapters
from fednano.client.batches import Batch
from fednano.client.edge import EdgeHalf, NanoEdge
from fednano.client.examples import Example
from fednano.client.fisher import FisherEstimate
from fednano.models.frozen import FrozenLLM


def one_by_one(
    edge: EdgeHalf, llm: FrozenLLM, adapters: NanoAdapters, examples: list[Example]
) -> dict[str, torch.Tensor]:
    """Backward through one sample at a time, square, mean."""
    sums = {name: torch.zeros_like(p) for name, p in adapters.named_parameters()}
    for example in examples:
        own = copy.deepcopy(adapters)
        batch = Batch.of([edge.prepare(example)])
        hidden = NanoEdge(own)(batch)
        reply = llm.step(batch.sequences(hidden.detach()), batch.labels, 1 / batch.label_counts)
        hidden.backward(reply.gradient)
        for name, parameter in own.named_parameters():
            if parameter.grad is not None:
                sums[name] += parameter.grad.square()
    return {name: total / len(examples) for name, total in sums.items()}


def test_fisher_of_a_batch_is_a_loop_over_single_samples(
    edge: EdgeHalf, frozen: FrozenLLM, adapters: NanoAdapters, examples: list[Example]
) -> None:
    expected = one_by_one(edge, frozen, adapters, examples)
    batch = Batch.of([edge.prepare(example) for example in examples])
    weights = torch.tensor([0.5, 0.1, 0.02])
    hidden = NanoEdge(adapters)(batch).detach()
    estimate = FisherEstimate(adapters)
    estimate.add(
        batch, frozen.step(batch.sequences(hidden), batch.labels, weights).gradient, weights
    )
    for name, found in estimate.mean().items():
        wanted = expected["by_name." + name.removeprefix("fisher.")].numpy()
        assert wanted.max() > 0
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=wanted.max() * 1e-5)


def test_a_client_without_images_has_no_image_fisher(
    edge: EdgeHalf, frozen: FrozenLLM, adapters: NanoAdapters, examples: list[Example]
) -> None:
    batch = Batch.of([edge.prepare(examples[2])])
    weights = 1 / batch.label_counts
    reply = frozen.step(batch.sequences(batch.base), batch.labels, weights)
    estimate = FisherEstimate(adapters)
    estimate.add(batch, reply.gradient, weights)
    found = estimate.mean()
    assert not found["fisher.image.up"].any()
    assert found["fisher.text.up"].any()
