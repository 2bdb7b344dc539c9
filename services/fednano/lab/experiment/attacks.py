"""Clients that do harm: what they train on, and what they send."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fednano.client.datasets import Dataset
from fednano.client.examples import Example
from fednano.coordinator.records import Tensors
from fednano.lab.experiment.plan import Attack

_SALT = 0xA77AC4


def attackers(attack: Attack, clients: int, seed: int) -> frozenset[int]:
    """Which members they are: drawn by the seed, so that every method meets the same."""
    if attack.kind == "none":
        return frozenset()
    drawn = np.random.default_rng([seed, _SALT]).choice(clients, attack.clients, replace=False)
    return frozenset(int(member) for member in drawn)


@dataclass(frozen=True)
class Flipped:
    """A data set with wrong answers: of each kind of question, the one that comes after the right one
    in the alphabet; after the last, the first."""

    of: Dataset
    next: dict[tuple[str, str], str]  # by kind and right answer

    @classmethod
    def made(cls, data: Dataset, everything: Iterable[Example]) -> Flipped:
        """`everything` that may be trained on tells which answers there are."""
        answers: dict[str, set[str]] = {}
        for example in everything:
            answers.setdefault(example.kind, set()).add(example.answer)
        following = {}
        for kind, found in answers.items():
            ordered = sorted(found)
            for answer, after in zip(ordered, ordered[1:] + ordered[:1], strict=True):
                following[kind, answer] = after
        return cls(data, following)

    def __len__(self) -> int:
        return len(self.of)

    def epoch(self, seed: int, round_number: int, epoch: int, client: str) -> list[Example]:
        return [
            replace(example, answer=self.next.get((example.kind, example.answer), example.answer))
            for example in self.of.epoch(seed, round_number, epoch, client)
        ]

    def held_back(self) -> Sequence[Example]:
        """What an attacker is scored on is not touched."""
        return self.of.held_back()


def forged(attack: Attack, base: Tensors, trained: Tensors) -> Tensors:
    """What an attacker sends: the step that it took, times the attack's factor."""
    times = np.float32(attack.times)
    return {name: base[name] + times * (trained[name] - base[name]) for name in trained}
