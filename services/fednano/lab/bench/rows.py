"""What a bench is, and what it measures: rows, each with a figure and, mostly, a reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fednano.lab.processes import Processes
from fednano.wire.errors import FedNanoError


class BenchFailed(FedNanoError):
    """A bench could not be measured; the sentence says why."""


@dataclass(frozen=True)
class Reach:
    """What a figure must not exceed, or not fall below."""

    kind: Literal["at most", "at least"]
    value: float

    def holds(self, figure: float) -> bool:
        return figure <= self.value if self.kind == "at most" else figure >= self.value

    def __str__(self) -> str:
        return f"{self.kind} {self.value:g}"


@dataclass(frozen=True)
class Row:
    """One measurement. `setting` states its size, dtype and wire; `parts` what the figure was made
    of, with units; a figure without a reach is for information."""

    bench: str
    case: str
    figure: float
    unit: str  # "x" for a ratio
    setting: Mapping[str, str | int | float]
    parts: Mapping[str, str | int | float] = field(default_factory=dict)
    reach: Reach | None = None

    @property
    def met(self) -> bool | None:
        """None where there is no reach."""
        return self.reach.holds(self.figure) if self.reach else None


@dataclass(frozen=True)
class Surroundings:
    """What a bench is given: a directory of its own, somebody who ends its processes, and choices."""

    directory: Path
    processes: Processes
    quick: bool
    flower_venv: Path
    say: Callable[[str], None]  # to people who wait


Measure = Callable[[Surroundings], Iterator[Row]]


@dataclass(frozen=True)
class Bench:
    """`load` imports what measures: some need torch, and --list should not wait for that."""

    name: str
    compares: str
    reach: str
    load: Callable[[], Measure]
