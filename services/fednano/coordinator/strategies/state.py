"""What a strategy is: the adapter of one round and the updates in, the adapter of the next out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from fednano.coordinator.records import Tensors
from fednano.coordinator.strategies.updates import BLOCK, Readable

CONTROL = "control."


@dataclass(frozen=True)
class State:
    """Where a round leaves a run, and so all that the next one begins with."""

    adapter: Tensors
    moments: Tensors = field(default_factory=dict)
    """What a strategy carries on beside the adapter, fp32: a server optimiser `momentum.<tensor>` and
    `second.<tensor>`, SCAFFOLD `control.<tensor>`. Nothing before the first round, and nothing with
    any other strategy."""

    @property
    def handed(self) -> Tensors:
        """What of it clients get together with the adapter: SCAFFOLD's c."""
        return {name: held for name, held in self.moments.items() if name.startswith(CONTROL)}


class Strategy(Protocol):
    """Advances a run by one round's updates."""

    def auxiliary(self, names: Iterable[str]) -> tuple[str, ...]:
        """Names of the tensors that must come with an adapter of these names."""
        ...

    def advance(self, before: State, updates: Iterable[Readable], block: int = BLOCK) -> State:
        """The state after the round: a function of its arguments alone, so that a round that is
        repeated ends where it ended. There must be at least one update; they are iterated again
        for every `block` elements, of which larger ones suit updates that are far away."""
        ...


class Merging(ABC):
    """A strategy that looks at the updates alone."""

    def auxiliary(self, names: Iterable[str]) -> tuple[str, ...]:
        return ()

    def advance(self, before: State, updates: Iterable[Readable], block: int = BLOCK) -> State:
        return State(self.aggregate(updates, block))

    @abstractmethod
    def aggregate(self, updates: Iterable[Readable], block: int = BLOCK) -> Tensors:
        """The next adapter."""
