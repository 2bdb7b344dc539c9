"""Server optimisers: what the updates merge to is a step, and the server takes one of its own.

The step that merging would take, merged - current, stands for a gradient (its negative). Moments
are kept for every element between rounds; they are part of the state that goes in and comes out.
Everything is computed in float64 from what is kept in fp32, so a repeated round gives equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from fednano.coordinator.records import Tensors
from fednano.coordinator.strategies.means import FedAvg
from fednano.coordinator.strategies.state import Merging, State
from fednano.coordinator.strategies.updates import BLOCK, Doubles, Readable

MOMENTUM, SECOND = "momentum.", "second."
Moments = dict[str, Doubles]  # by kind, of one tensor


class Rule(Protocol):
    """One step for one tensor."""

    def step(self, delta: Doubles, moments: Moments) -> tuple[Doubles, Moments]:
        """What is added to the adapter, and the new moments; there are none in the first round."""
        ...


@dataclass(frozen=True)
class FedAvgM:
    """v = momentum v + delta; the adapter moves by v.

    Hsu, Qi and Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated
    Visual Classification", arXiv 1909.06335, section 4.3.
    """

    momentum: float

    def step(self, delta: Doubles, moments: Moments) -> tuple[Doubles, Moments]:
        velocity = self.momentum * moments[MOMENTUM] + delta if moments else delta
        return velocity, {MOMENTUM: velocity}


@dataclass(frozen=True)
class Adaptive:
    """m = momentum m + (1 - momentum) delta; the adapter moves by learning_rate m / (sqrt(v) +
    adaptivity). v starts at adaptivity^2, m at 0, and with d = delta^2

    - FedAdagrad: v + d, with a momentum of 0
    - FedAdam: second_momentum v + (1 - second_momentum) d
    - FedYogi: v - (1 - second_momentum) d sign(v - d)

    Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2.
    """

    kind: Literal["fedadagrad", "fedadam", "fedyogi"]
    learning_rate: float
    adaptivity: float
    momentum: float = 0.0
    second_momentum: float = 0.0

    def step(self, delta: Doubles, moments: Moments) -> tuple[Doubles, Moments]:
        before = moments.get(SECOND, np.full(delta.shape, self.adaptivity**2))
        second = self._second(before, delta * delta)
        first = (1 - self.momentum) * delta
        kept = {SECOND: second}
        if self.momentum:
            first += self.momentum * moments.get(MOMENTUM, np.zeros(delta.shape))
            kept[MOMENTUM] = first
        return self.learning_rate * first / (np.sqrt(second) + self.adaptivity), kept

    def _second(self, before: Doubles, square: Doubles) -> Doubles:
        if self.kind == "fedadagrad":
            return before + square
        share = 1 - self.second_momentum
        if self.kind == "fedadam":
            return self.second_momentum * before + share * square
        return before - share * square * np.sign(before - square)


@dataclass(frozen=True)
class ServerOptimizer:
    """Steps by `rule` along what `merging` makes of the updates."""

    rule: Rule
    merging: Merging = field(default_factory=FedAvg)

    def auxiliary(self, names: Iterable[str]) -> tuple[str, ...]:
        return self.merging.auxiliary(names)

    def advance(self, before: State, updates: Iterable[Readable], block: int = BLOCK) -> State:
        merged = self.merging.aggregate(updates, block)
        adapter: Tensors = {}
        moments: Tensors = {}
        for name, current in before.adapter.items():
            delta = merged[name].astype(np.float64) - current
            change, kept = self.rule.step(delta, _moments_of(name, before.moments))
            adapter[name] = (current + change).astype(np.float32)
            moments |= {kind + name: value.astype(np.float32) for kind, value in kept.items()}
        return State(adapter, moments)


def _moments_of(name: str, moments: Tensors) -> Moments:
    return {
        kind: moments[kind + name].astype(np.float64)
        for kind in (MOMENTUM, SECOND)
        if kind + name in moments
    }
