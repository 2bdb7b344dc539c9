"""What a run's strategy wants its clients to train: the round's adapter, or a part of it, or more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fednano.client.adapters import NanoAdapters, Tensors
from fednano.client.datasets import Dataset
from fednano.client.scaffold import CONTROL, less
from fednano.client.trainer import FisherMode, Progress, Trainer, TrainResult
from fednano.wire.low_rank import DOWN, cut, drawn
from fednano.wire.run_config import RunConfig, TrainingConfig

_FISHER: dict[str, FisherMode] = {"fednano": "extra-pass", "fednano-ef": "last-epoch"}


@dataclass(frozen=True)
class LocalRound:
    """A client's training in a round: all that the result hangs on but its data and the LLM."""

    config: RunConfig
    number: int
    name: str  # what the order of the data hangs on
    rank: int
    base: Tensors  # the round's adapter
    training: TrainingConfig
    handed: Tensors = field(default_factory=dict)  # SCAFFOLD's c, as `control.<tensor>`
    control: Tensors = field(default_factory=dict)  # its c_i; a tensor that either lacks is 0

    def train(
        self, trainer: Trainer, data: Dataset, progress: Progress = lambda share: None
    ) -> TrainResult:
        config = self.config
        draw = [config.seed, self.number, *self.name.encode()]
        return trainer.train(
            adapters_to_train(config, self.base, config.adapter.scale, self.rank, draw),
            lambda epoch: data.epoch(config.seed, self.number, epoch, self.name),
            self.training,
            fisher_mode(config),
            progress,
            config.strategy.mu or 0.0,
            self._correction() if config.strategy.name == "scaffold" else None,
        )

    def _correction(self) -> Tensors:
        """c - c_i."""
        control = {name.removeprefix(CONTROL): held for name, held in self.handed.items()}
        return less(control, self.control)


def fisher_mode(config: RunConfig) -> FisherMode:
    """As the strategy that leads needs it, or a shadow: they never need it in two ways."""
    return next((_FISHER[one.name] for one in config.strategies if one.name in _FISHER), "none")


def adapters_to_train(
    config: RunConfig,
    base: Mapping[str, NDArray[np.float32]],
    scale: float,
    rank: int,
    draw: Sequence[int],
) -> NanoAdapters:
    """From the round's adapter `base` those of a client of this rank. What they give back, as
    `to_tensors`, is what the client sends.

    With `flora` that is a fresh A, drawn by `draw`, and B = 0 beside the frozen `base`; with `ffa` A
    is frozen. A rank below that of `base` takes its first rows of A and columns of B, which `product`
    orders by what they matter.
    """
    if config.strategy.name == "flora":
        sizes = {n.removesuffix(DOWN): t.shape[1] for n, t in base.items() if n.endswith(DOWN)}
        fresh = drawn(sizes, rank, next(iter(sizes.values())), draw)
        adapters = NanoAdapters.from_tensors(fresh, scale)
        adapters.put_beside(base)
        return adapters
    adapters = NanoAdapters.from_tensors(cut(base, rank), scale)
    if config.strategy.name == "ffa":
        adapters.freeze_down()
    return adapters
