"""What a cell gave, and the file that keeps it: one line of JSON for each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from fednano.wire.errors import InvalidRequest


@dataclass(frozen=True)
class Spent:
    """By one client in one round, on average over those that trained."""

    sent: int = 0  # bytes: embeddings, adapter, what goes with it
    received: int = 0  # bytes: gradients, adapter
    client_seconds: float = 0.0  # CPU, of its own computation
    llm_seconds: float = 0.0  # of the LLM's for it


@dataclass(frozen=True)
class RoundFigures:
    """Accuracy and loss on the global test set, where the round was evaluated; what training took."""

    number: int
    accuracy: float | None
    loss: float | None
    train_loss: float | None = None
    measures: dict[str, float] = field(default_factory=dict)
    spent: Spent = field(default_factory=Spent)
    shadows: dict[str, float] = field(default_factory=dict)  # accuracy, by the strategy's label


@dataclass(frozen=True)
class Figures:
    """What came of a cell."""

    rounds: list[RoundFigures]
    own: list[float]
    """Accuracy of each client's adapter on what it held back: the merged one's, or its own."""
    own_shared: list[float]
    """The same of the merged adapter, where clients have their own beside it."""
    test_own: list[float]
    """Of each client's own adapter on the global test set, where it has one."""
    adapter: str
    """Digest of the last merged adapter; empty where nothing is merged."""
    seconds: float

    @property
    def merged(self) -> float:
        """Accuracy on the global test set at the end, of what is merged."""
        found = [each.accuracy for each in self.rounds if each.accuracy is not None]
        return found[-1]

    @property
    def accuracy(self) -> float:
        """The same; the mean of the clients' own adapters, where they have some."""
        return fmean(self.test_own) if self.test_own else self.merged


@dataclass(frozen=True)
class Result:
    """A line of the file."""

    key: str
    method: str
    seed: int
    setting: dict[str, str | int]
    model: str  # the fingerprint
    figures: Figures

    @classmethod
    def of(cls, line: dict[str, Any]) -> Result:
        told = dict(line["figures"])
        rounds = [
            RoundFigures(**{**each, "spent": Spent(**each["spent"])}) for each in told.pop("rounds")
        ]
        return cls(**{**line, "figures": Figures(rounds=rounds, **told)})


@dataclass(frozen=True)
class ResultsFile:
    """Only ever appended to, a whole line at a time; a line that a crash cut short is dropped."""

    path: Path

    def read(self, model: str = "") -> dict[str, Result]:
        """By key; those of the model with this fingerprint, where one is named.

        Raises InvalidRequest where a line is something else.
        """
        if not self.path.exists():
            return {}
        text = self.path.read_text()
        whole, _, _ = text.rpartition("\n")
        found = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                result = Result.of(json.loads(line))
            except (ValueError, TypeError, KeyError):
                where = f"{self.path}, line {number}"
                raise InvalidRequest.of(
                    where, "a result of fednano experiment", line[:60]
                ) from None
            if model in ("", result.model):
                found[result.key] = result
        return found

    def last_model(self) -> str:
        """Of the newest result; "" where there is none."""
        found = list(self.read().values())
        return found[-1].model if found else ""

    def mend(self) -> None:
        """Drops what a crash left of a last line."""
        if self.path.exists() and (held := self.path.read_bytes()) and not held.endswith(b"\n"):
            os.truncate(self.path, held.rfind(b"\n") + 1)

    def append(self, results: Iterable[Result]) -> None:
        with self.path.open("a") as file:
            for result in results:
                file.write(json.dumps(asdict(result)) + "\n")
            file.flush()
            os.fsync(file.fileno())
