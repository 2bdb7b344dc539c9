"""What a bench is, and what it measures: rows, each with a figure and, mostly, a reach."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
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
    figure: float  # NaN where it was not measured: then `parts` says why
    unit: str  # "x" for a ratio
    setting: Mapping[str, str | int | float]
    parts: Mapping[str, str | int | float] = field(default_factory=dict)
    reach: Reach | None = None

    @property
    def measured(self) -> bool:
        return not math.isnan(self.figure)

    @property
    def met(self) -> bool | None:
        """None where there is no reach, or no figure."""
        return self.reach.holds(self.figure) if self.reach and self.measured else None

    @property
    def shown(self) -> str:
        """The figure as people read it."""
        return f"{self.figure:.3f} {self.unit}" if self.measured else "not measured"

    def unmeasured(self, why: str) -> Row:
        """The same row of a machine that can't measure it, with the command that would elsewhere."""
        parts = {"why": why, "would be measured by": f"fednano bench {self.bench}"}
        return replace(self, figure=math.nan, parts=parts)


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
