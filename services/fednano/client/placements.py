"""Where in the model the weights lie that a client trains: at the split, before it, or behind it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

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


class Placement(ABC):
    """Trains, scores and asks one kind of weights; tensors are what travels between clients."""

    @property
    @abstractmethod
    def edge(self) -> EdgeHalf:
        """Keeps of each example what no training changes."""

    @abstractmethod
    def train(
        self, local: LocalRound, data: Dataset, progress: Progress = unheard
    ) -> TrainResult: ...

    @abstractmethod
    def asked(self, tensors: Tensors) -> tuple[Trainer, NanoAdapters]:
        """Who answers with these tensors, and the NanoAdapters among them."""

    def evaluate(
        self,
        tensors: Tensors,
        examples: Sequence[Example],
        longest: int,
        progress: Progress = unheard,
    ) -> EvaluationResult:
        """`longest` is the tokens that an answer may have."""
        trainer, adapters = self.asked(tensors)
        return trainer.evaluate(adapters, examples, longest, progress=progress)

    def stream(
        self, tensors: Tensors, examples: Sequence[Example], sampling: Sampling
    ) -> Iterator[tuple[int, int]]:
        """(sample, token) as the LLM produces them."""
        trainer, adapters = self.asked(tensors)
        return trainer.stream(adapters, examples, sampling)

    @abstractmethod
    def forget(self) -> None:
        """The run is over: what a service keeps for it may go."""


@dataclass(frozen=True)
class NanoPlacement(Placement):
    """NanoAdapters between the halves."""

    trainer: Trainer
    scale: float

    @property
    def edge(self) -> EdgeHalf:
        return self.trainer.edge

    def train(self, local: LocalRound, data: Dataset, progress: Progress = unheard) -> TrainResult:
        return local.train(self.trainer, data, progress)

    def asked(self, tensors: Tensors) -> tuple[Trainer, NanoAdapters]:
        return self.trainer, NanoAdapters.from_tensors(tensors, self.scale)

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
    mu = local.config.strategy.mu or 0.0
    learning = Learning.begin(parameters.values(), settings, mu)
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
