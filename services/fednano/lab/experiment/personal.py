"""FedDPA-F: a client's own adapter beside the merged one, mixed for each question.

Yang et al., "Dual-Personalizing Adapter for Federated Foundation Models", NeurIPS 2024 (arXiv
2403.19211): the own adapter starts from the merged one and is trained after the federated rounds; a
question's output is (1 - alpha) of the merged adapter's and alpha of the own one's, alpha = lambda
times the mean cosine similarity to a few of the client's training examples. They compare hidden states
of the LLM. A client of a split model has none, so here it is the mean of an example's vectors before
the adapters. Questions of one task are much alike in those, so alpha is not far below lambda.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from fednano.client.adapters import NanoAdapters
from fednano.client.datasets import Dataset
from fednano.client.examples import Example
from fednano.client.trainer import Trainer
from fednano.coordinator.records import Tensors
from fednano.wire.low_rank import DOWN, UP
from fednano.wire.run_config import RunConfig

LAMBDA, COMPARED = 0.5, 5
_STEPS = 20  # of alpha between 0 and 1: questions of the same are scored together


def evaluate_mixed(
    trainer: Trainer,
    config: RunConfig,
    shared: Tensors,
    own: Tensors,
    data: Dataset,
    examples: Sequence[Example],
) -> float:
    """Accuracy on `examples` of a client that trained `own` on `data`."""
    right = 0.0
    for alpha, chosen in _by_alpha(trainer, config, data, examples):
        adapters = NanoAdapters.from_tensors(mixed(shared, own, alpha), config.adapter.scale)
        found = trainer.evaluate(adapters, chosen, config.evaluation.max_new_tokens)
        right += found.accuracy * len(chosen)
    return right / len(examples)


def mixed(shared: Tensors, own: Tensors, alpha: float) -> Tensors:
    """One adapter that gives (1 - alpha) of the one's output and alpha of the other's: both, side by
    side, at the sum of their ranks."""
    found: Tensors = {}
    for name in shared:
        if name.endswith(DOWN):
            found[name] = np.concatenate([shared[name], own[name]])
        elif name.endswith(UP):
            parts = [np.float32(1 - alpha) * shared[name], np.float32(alpha) * own[name]]
            found[name] = np.concatenate(parts, axis=1)
    return found


def _by_alpha(
    trainer: Trainer, config: RunConfig, data: Dataset, examples: Sequence[Example]
) -> Iterator[tuple[float, list[Example]]]:
    epoch = data.epoch(config.seed, config.rounds + 1, 0, "compared")
    compared = torch.stack([_vector(trainer, example) for example in epoch[:COMPARED]])
    found: dict[int, list[Example]] = {}
    for example in examples:
        alike = cosine_similarity(_vector(trainer, example), compared, dim=-1).mean()
        alpha = LAMBDA * max(0.0, float(alike))
        found.setdefault(round(alpha * _STEPS), []).append(example)
    for step in sorted(found):
        yield step / _STEPS, found[step]


def _vector(trainer: Trainer, example: Example) -> torch.Tensor:
    """[hidden]"""
    return trainer.edge.prepare(example, with_answer=False).base.mean(0)
