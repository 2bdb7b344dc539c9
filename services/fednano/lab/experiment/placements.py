"""What a cell asks of the weights that its clients train, wherever in the model they lie."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fednano.client.adapters import NanoAdapters
from fednano.client.datasets import Dataset
from fednano.client.edge import EdgeHalf
from fednano.client.examples import Example
from fednano.client.judging import mean, mean_losses
from fednano.client.methods import LocalRound
from fednano.client.trainer import EvaluationResult, Learning, Trainer, TrainResult
from fednano.client.wires import Crossed
from fednano.coordinator.records import Tensors
from fednano.coordinator.strategies import initial_adapter
from fednano.wire.run_config import RunConfig

Parameters = Mapping[str, torch.nn.Parameter]
"""By the names that travel."""


class Placement(Protocol):
    """Trains and scores one kind of weights; what it is given and gives travels between clients."""

    def initial(self) -> Tensors:
        """Before any training: the model is the checkpoint."""
        ...

    @property
    def edge(self) -> EdgeHalf:
        """Keeps of each example what no training changes."""
        ...

    def train(self, local: LocalRound, data: Dataset) -> TrainResult: ...

    def evaluate(self, tensors: Tensors, examples: Sequence[Example]) -> EvaluationResult: ...


@dataclass(frozen=True)
class NanoPlacement:
    """NanoAdapters, as the services train them."""

    trainer: Trainer
    config: RunConfig

    def initial(self) -> Tensors:
        adapter, hidden = self.config.adapter, self.trainer.llm.hidden_size
        return initial_adapter(adapter.modalities, adapter.rank, hidden, self.config.seed)

    @property
    def edge(self) -> EdgeHalf:
        return self.trainer.edge

    def train(self, local: LocalRound, data: Dataset) -> TrainResult:
        return local.train(self.trainer, data)

    def evaluate(self, tensors: Tensors, examples: Sequence[Example]) -> EvaluationResult:
        adapters = NanoAdapters.from_tensors(tensors, self.config.adapter.scale)
        return self.trainer.evaluate(adapters, examples, self.config.evaluation.max_new_tokens)


def trained(
    parameters: Parameters,
    cross: Callable[[Sequence[Example]], Crossed],
    local: LocalRound,
    data: Dataset,
) -> TrainResult:
    """The trainer's local epochs for other weights than NanoAdapters: the same examples in the same
    order, the same step of the optimiser. `cross` takes a batch through the model."""
    start, settings, losses = time.perf_counter(), local.training, list[float]()
    learning = _learning([p for p in parameters.values() if p.requires_grad], local)
    for number in range(settings.epochs):
        examples = data.epoch(local.config.seed, local.number, number, local.name)
        for first in range(0, len(examples), settings.batch_size):
            crossed = cross(list(examples[first : first + settings.batch_size]))
            learning.step(crossed)
            if number == settings.epochs - 1:
                losses += mean_losses(crossed)
    seconds = time.perf_counter() - start
    return TrainResult(copied(parameters), {}, len(losses), mean(losses), seconds)


def _learning(parameters: list[torch.nn.Parameter], local: LocalRound) -> Learning:
    settings, mu = local.training, local.config.strategy.mu or 0.0
    optimizer = torch.optim.AdamW(
        parameters, settings.learning_rate, weight_decay=settings.weight_decay
    )
    origin = [parameter.detach().clone() for parameter in parameters] if mu else []
    return Learning(optimizer, parameters, origin, mu, None, settings.max_grad_norm)


def copied(parameters: Parameters) -> Tensors:
    return {name: p.detach().cpu().numpy().copy() for name, p in parameters.items()}


@torch.no_grad()
def put(parameters: Parameters, tensors: Tensors) -> None:
    """`tensors` in the place of what the parameters hold."""
    assert parameters.keys() == tensors.keys()
    for name, parameter in parameters.items():
        parameter.copy_(torch.tensor(tensors[name]))
