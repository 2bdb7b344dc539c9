"""Where in the model the weights lie that a client trains: at the split, before it, or behind it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fednano.client.adapters import NanoAdapters, Tensors
from fednano.client.datasets import Dataset
from fednano.client.edge import EdgeHalf
from fednano.client.examples import Example
from fednano.client.judging import mean, mean_losses
from fednano.client.methods import LocalRound
from fednano.client.trainer import (
    EvaluationResult,
    Learning,
    Progress,
    Trainer,
    TrainResult,
    named,
)
from fednano.client.wires import Crossed
from fednano.models.language_model import Sampling
from fednano.wire.errors import InvalidRequest

Parameters = Mapping[str, torch.nn.Parameter]
"""By the names that travel."""


def unheard(share: float) -> None:
    """Progress that nobody is told of."""


class Placement(Protocol):
    """Trains, scores and asks one kind of weights; tensors are what travels between clients."""

    @property
    def edge(self) -> EdgeHalf:
        """Keeps of each example what no training changes."""
        ...

    def train(
        self, local: LocalRound, data: Dataset, progress: Progress = unheard
    ) -> TrainResult: ...

    def evaluate(
        self,
        tensors: Tensors,
        examples: Sequence[Example],
        longest: int,
        progress: Progress = unheard,
    ) -> EvaluationResult:
        """`longest` is the tokens that an answer may have."""
        ...

    def stream(
        self, tensors: Tensors, examples: Sequence[Example], sampling: Sampling
    ) -> Iterator[tuple[int, int]]:
        """(sample, token) as the LLM produces them."""
        ...

    def forget(self) -> None:
        """The run is over: what a service keeps for it may go."""


@dataclass(frozen=True)
class NanoPlacement:
    """NanoAdapters between the halves."""

    trainer: Trainer
    scale: float

    @property
    def edge(self) -> EdgeHalf:
        return self.trainer.edge

    def train(self, local: LocalRound, data: Dataset, progress: Progress = unheard) -> TrainResult:
        return local.train(self.trainer, data, progress)

    def evaluate(
        self,
        tensors: Tensors,
        examples: Sequence[Example],
        longest: int,
        progress: Progress = unheard,
    ) -> EvaluationResult:
        adapters = NanoAdapters.from_tensors(tensors, self.scale)
        return self.trainer.evaluate(adapters, examples, longest, progress=progress)

    def stream(
        self, tensors: Tensors, examples: Sequence[Example], sampling: Sampling
    ) -> Iterator[tuple[int, int]]:
        adapters = NanoAdapters.from_tensors(tensors, self.scale)
        return self.trainer.stream(adapters, examples, sampling)

    def forget(self) -> None:
        if self.trainer.factored is not None:
            self.trainer.factored.forget()


def trained(
    parameters: Parameters,
    cross: Callable[[Sequence[Example]], Crossed],
    local: LocalRound,
    data: Dataset,
    progress: Progress,
) -> TrainResult:
    """The trainer's local epochs for other weights than NanoAdapters: the same examples in the same
    order, the same step of the optimiser. `cross` takes a batch through the model."""
    start, settings, losses = time.perf_counter(), local.training, list[float]()
    learning = _learning([p for p in parameters.values() if p.requires_grad], local)
    for number in range(settings.epochs):
        examples = data.epoch(local.config.seed, local.number, number, local.name)
        for first in range(0, len(examples), settings.batch_size):
            progress((number + first / len(examples)) / settings.epochs)
            chosen = list(examples[first : first + settings.batch_size])
            with named(chosen):
                crossed = cross(chosen)
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


def check_fit(parameters: Parameters, tensors: Tensors) -> None:
    """Raises InvalidRequest for tensors of other names or shapes."""
    wanted = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if wanted != found:
        places = sorted(wanted.keys() | found.keys())
        name = next(name for name in places if wanted.get(name) != found.get(name))
        expected, got = (held.get(name, "nothing") for held in (wanted, found))
        raise InvalidRequest.of(f"adapter {name}", expected, got)


@torch.no_grad()
def put(parameters: Parameters, tensors: Tensors) -> None:
    """`tensors` in the place of what the parameters hold. Raises InvalidRequest for others."""
    check_fit(parameters, tensors)
    for name, parameter in parameters.items():
        parameter.copy_(torch.tensor(tensors[name]))
