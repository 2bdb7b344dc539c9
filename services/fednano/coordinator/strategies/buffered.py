"""Asynchronous rounds: what clients added, each to the adapter that it had started from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fednano.coordinator.strategies.state import State
from fednano.coordinator.strategies.updates import BLOCK, Floats, Readable, Span, in_blocks


@dataclass(frozen=True)
class Buffered:
    """theta + server_learning_rate * sum_i s(tau_i) delta_i / k, with s(tau) = 1 / sqrt(1 + tau).

    An update's tensors are delta_i, what training added to an adapter that tau_i merges have passed
    since. All k clients count alike, however many samples they have.

    Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022,
    algorithm 1, with the polynomial discount (a = 1/2) of Xie et al., "Asynchronous Federated
    Optimization", 2019.
    """

    server_learning_rate: float

    def auxiliary(self, names: Iterable[str]) -> tuple[str, ...]:
        return ()

    def advance(self, before: State, updates: Iterable[Readable], block: int = BLOCK) -> State:
        weights = [1 / math.sqrt(1 + update.staleness) for update in updates]
        step = self.server_learning_rate / len(weights)

        def merge(spans: tuple[Span, ...]) -> list[Floats]:
            sums = [
                before.adapter[s.name].reshape(-1)[s.start : s.stop].astype(np.float64)
                for s in spans
            ]
            for weight, update in zip(weights, updates, strict=True):
                for total, delta in zip(sums, update.read(spans), strict=True):
                    total += step * weight * delta.astype(np.float64)
            return [total.astype(np.float32) for total in sums]

        shapes = {name: tensor.shape for name, tensor in before.adapter.items()}
        return State(in_blocks(shapes, block, merge))
