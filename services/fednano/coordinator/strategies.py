"""How updates become the next adapter: pure functions of the updates, in numpy.

`updates` can be iterated again, one is held in memory at a time, and sums are kept in float64.
The caller iterates in client-id order, so that the bytes don't depend on who arrived first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fednano.coordinator.records import Tensors
from fednano.wire.run_config import StrategyConfig

FISHER = "fisher."
Sums = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Update:
    """What one client sent: its adapter, its number of samples, and auxiliary tensors."""

    client: str
    samples: int
    adapter: Tensors
    auxiliary: Tensors


class Strategy(Protocol):
    """Merges one round's updates."""

    def auxiliary(self, names: Iterable[str]) -> tuple[str, ...]:
        """Names of the tensors that must come with an adapter of these names."""
        ...

    def aggregate(self, updates: Iterable[Update]) -> Tensors:
        """The next adapter. There must be at least one update."""
        ...


class FedAvg:
    """The mean weighted by samples: sum n_k theta_k / sum n_k.

    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    AISTATS 2017, algorithm 1.
    """

    def auxiliary(self, names: Iterable[str]) -> tuple[str, ...]:
        return ()

    def aggregate(self, updates: Iterable[Update]) -> Tensors:
        sums: Sums = {}
        samples = 0
        for update in updates:
            samples += update.samples
            for name, theta in update.adapter.items():
                _add(sums, name, update.samples * theta.astype(np.float64))
        return {name: (total / samples).astype(np.float32) for name, total in sums.items()}


@dataclass(frozen=True)
class FisherMerging:
    """Elementwise sum n_k (F_k + lambda) theta_k / sum n_k (F_k + lambda).

    FedNano, arXiv 2506.14824, section 3; the merging itself is Matena and Raffel, "Merging Models
    with Fisher-Weighted Averaging", NeurIPS 2022, equation 5. FedNano and FedNano-EF merge alike:
    they differ in how a client gets F_k, in a pass after training or during its last epoch.

    Scaled, each client's F_k is divided by its mean, tensor by tensor, and is 0 where that mean
    is 0, so that one client's steep loss doesn't drown the others. Where the weights' sum is 0 the
    result is the mean weighted by samples.
    """

    damping: float
    scaled: bool

    def auxiliary(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(FISHER + name for name in sorted(names))

    def aggregate(self, updates: Iterable[Update]) -> Tensors:
        weighted: Sums = {}
        weights: Sums = {}
        plain: Sums = {}
        samples = 0
        for update in updates:
            samples += update.samples
            for name, tensor in update.adapter.items():
                theta = tensor.astype(np.float64)
                weight = update.samples * self._importance(update.auxiliary[FISHER + name])
                _add(weighted, name, weight * theta)
                _add(weights, name, weight)
                _add(plain, name, update.samples * theta)
        return {
            name: _divide(weighted[name], weights[name], plain[name] / samples) for name in plain
        }

    def _importance(self, fisher: NDArray[np.float32]) -> NDArray[np.float64]:
        """F_k + lambda, with F_k scaled where that is asked for."""
        values = fisher.astype(np.float64)
        if self.scaled:
            mean = values.mean()
            values = values / mean if mean > 0 else np.zeros_like(values)
        return values + self.damping


def strategy_of(config: StrategyConfig) -> Strategy:
    """The strategy that a run is configured with."""
    if config.name == "fedavg":
        return FedAvg()
    return FisherMerging(config.damping, config.fisher == "scaled")


def initial_adapter(modalities: Iterable[str], rank: int, hidden_size: int, seed: int) -> Tensors:
    """Per modality A [rank, hidden] uniform in +-1/sqrt(hidden), named `<modality>.down`, and
    B [hidden, rank] zero, named `<modality>.up`: the adapter changes nothing yet."""
    tensors: Tensors = {}
    bound = 1 / np.sqrt(hidden_size)
    for modality in modalities:
        rng = np.random.default_rng([seed, *modality.encode()])
        down = rng.uniform(-bound, bound, (rank, hidden_size))
        tensors[f"{modality}.down"] = down.astype(np.float32)
        tensors[f"{modality}.up"] = np.zeros((hidden_size, rank), np.float32)
    return tensors


def _add(sums: Sums, name: str, values: NDArray[np.float64]) -> None:
    if name in sums:
        sums[name] += values
    else:
        sums[name] = values.copy()


def _divide(
    weighted: NDArray[np.float64], weights: NDArray[np.float64], otherwise: NDArray[np.float64]
) -> NDArray[np.float32]:
    """weighted / weights, and `otherwise` where the weights are 0; never NaN."""
    safe = weights > 0
    merged = np.where(safe, weighted / np.where(safe, weights, 1), otherwise)
    return merged.astype(np.float32)
