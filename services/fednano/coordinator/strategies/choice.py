"""From a run's configuration to its strategy, and to the adapter that it starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np

from fednano.coordinator.records import Tensors
from fednano.coordinator.strategies.low_rank import FrozenDown, ProductMean, Stack
from fednano.coordinator.strategies.means import FedAvg, FisherMerging
from fednano.coordinator.strategies.optimizers import Adaptive, FedAvgM, ServerOptimizer
from fednano.coordinator.strategies.robust import Krum, Median, TrimmedMean
from fednano.coordinator.strategies.scaffold import Scaffold
from fednano.coordinator.strategies.state import Strategy
from fednano.wire.low_rank import DOWN, drawn
from fednano.wire.placements import Shapes, exchanged
from fednano.wire.run_config import RunConfig, StrategyConfig

T = TypeVar("T")
_INSIDE = 0x10A  # sets the seeds of LoRA inside the LLM apart


def strategy_of(config: StrategyConfig, members: int | None = None) -> Strategy:
    """The strategy that a run with so many members is configured with; None: all of them send an
    update in every round."""
    if config.name == "scaffold":
        return Scaffold(members)
    return _MADE[config.name](config)


def _adaptive(config: StrategyConfig) -> ServerOptimizer:
    assert config.name in ("fedadagrad", "fedadam", "fedyogi")
    rates = (_set(config.server_learning_rate), _set(config.adaptivity))
    moments = (config.momentum or 0.0, config.second_momentum or 0.0)  # FedAdagrad has neither
    return ServerOptimizer(Adaptive(config.name, *rates, *moments))


def _set(value: T | None) -> T:
    """The configuration gives every setting that its strategy has."""
    assert value is not None
    return value


_MADE: dict[str, Callable[[StrategyConfig], Strategy]] = {
    "fedavg": lambda config: FedAvg(),
    "fedavgm": lambda config: ServerOptimizer(FedAvgM(_set(config.momentum))),
    "fedadagrad": _adaptive,
    "fedadam": _adaptive,
    "fedyogi": _adaptive,
    "fedprox": lambda config: FedAvg(),  # the rest of it is in the clients' loss
    "fednano": lambda config: FisherMerging(_set(config.damping), config.fisher == "scaled"),
    "fednano-ef": lambda config: FisherMerging(_set(config.damping), config.fisher == "scaled"),
    "median": lambda config: Median(),
    "trimmed-mean": lambda config: TrimmedMean(_set(config.trim)),
    "krum": lambda config: Krum(_set(config.byzantine)),
    "multi-krum": lambda config: Krum(_set(config.byzantine), _set(config.selected)),
    "product": lambda config: ProductMean(),
    "ffa": lambda config: FrozenDown(),
    "flora": lambda config: Stack(_set(config.max_rank)),
}


def first_adapter(config: RunConfig, hidden_size: int, weights: Shapes) -> Tensors:
    """A run's, before any training: the model is the checkpoint. `weights` are those that its
    placement trains, as clients announce them."""
    adapter = config.adapter
    if config.placement == "nano-adapters":
        return initial_adapter(adapter.modalities, adapter.rank, hidden_size, config.seed)
    shapes = exchanged(config.placement, weights, adapter.rank)
    if config.placement == "lora":
        return _drawn_inside(shapes, config.seed)
    return {name: np.zeros(shape, np.float32) for name, shape in shapes}


def _drawn_inside(shapes: Shapes, seed: int) -> Tensors:
    """A [r, in] as PEFT draws it, uniform in +-1/sqrt(in), but by the seed; B [out, r] zero."""
    rng = np.random.default_rng([seed, _INSIDE])
    found: Tensors = {}
    for name, shape in shapes:
        bound = shape[1] ** -0.5 if name.endswith(DOWN) else 0.0
        found[name] = rng.uniform(-bound, bound, shape).astype(np.float32)
    return found


def initial_adapter(modalities: Iterable[str], rank: int, hidden_size: int, seed: int) -> Tensors:
    """NanoAdapters before any training. They change nothing yet."""
    return drawn(modalities, rank, hidden_size, [seed])
