"""SCAFFOLD: control variates take out of a client's gradient what its own data add to everybody's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fednano.coordinator.strategies.means import FedAvg
from fednano.coordinator.strategies.state import CONTROL, State
from fednano.coordinator.strategies.updates import BLOCK, Readable, View


@dataclass(frozen=True)
class Scaffold:
    """The adapter is the mean weighted by samples, and the server's control moves by what the
    clients' did: c + 1/N sum (c_i+ - c_i), over those who sent an update. So it is the mean of all N
    members' controls, of whom the others' have stayed.

    Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020,
    algorithm 1, with a server's step of 1. The paper's mean of the models is a plain one; here
    samples weigh, as in every mean of this package. How a client gets c_i+ is the client's part.
    """

    members: int | None = None
    """N; None: as many as send updates."""

    def auxiliary(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(CONTROL + name for name in sorted(names))

    def advance(self, before: State, updates: Iterable[Readable], block: int = BLOCK) -> State:
        moved = [View(update, 1, _controls_of(update)) for update in updates]
        share = len(moved) / (self.members or len(moved))
        controls = {}
        for name, mean in FedAvg().aggregate(moved, block).items():
            control = before.moments.get(name, np.zeros(mean.shape, np.float32))
            step = share * mean.astype(np.float64)
            controls[name] = (control + step).astype(np.float32)
        return State(FedAvg().aggregate(updates, block), controls)


def _controls_of(update: Readable) -> dict[str, tuple[int, ...]]:
    return {CONTROL + name: shape for name, shape in update.shapes.items()}
