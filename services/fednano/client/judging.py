"""How right answers are: word for word, by shared words, and by the place of the right caption."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fednano.client.examples import Example


class Scored(Protocol):
    """What a step gives, and a score."""

    @property
    def loss_sums(self) -> torch.Tensor: ...  # [samples]

    @property
    def token_counts(self) -> torch.Tensor: ...  # [samples]


@dataclass(frozen=True)
class Judgement:
    """What a generated answer is worth."""

    kind: str
    right: bool
    shared: float | None
    """F1 of its words against the wanted ones; None where one word was wanted."""

    @classmethod
    def of(cls, example: Example, answer: str) -> Judgement:
        given, wanted = _words(answer), _words(example.answer)
        return cls(
            example.kind,
            answer.strip().casefold() == example.answer.strip().casefold(),
            _f1(given, wanted) if len(wanted) > 1 else None,
        )


@dataclass(frozen=True)
class Rank:
    """The place of the right one among an example's candidates, from 1."""

    kind: str
    place: int

    @classmethod
    def of(cls, example: Example, losses: Sequence[float]) -> Rank:
        """By the mean loss of each candidate's tokens, least first; the right one loses every tie, and
        what is not a number."""
        own = losses[example.candidates.index(example.answer)]
        return cls(example.kind, sum(not loss > own for loss in losses))


def choices(example: Example) -> list[Example]:
    """An example for each candidate, as if that were the answer."""
    return [
        Example(f"{example.id}-{number}", example.images, example.question, text, example.kind)
        for number, text in enumerate(example.candidates)
    ]


def mean_losses(scored: Scored) -> list[float]:
    """Of each sample, over its labelled tokens."""
    losses: list[float] = (scored.loss_sums / scored.token_counts).tolist()
    return losses


def accuracies(
    judged: Sequence[Judgement], ranked: Sequence[Rank]
) -> tuple[float, dict[str, float]]:
    """The share of right answers, and that of each kind of question.

    Choices are a kind of their own, right where the right candidate comes first, and no part of the
    whole unless there is nothing else.
    """
    written = [(one.kind, one.right) for one in judged]
    chosen = [(one.kind, one.place == 1) for one in ranked]
    kinds = sorted({kind for kind, _ in written + chosen if kind})
    return mean([right for _, right in written or chosen]), {
        kind: mean([right for k, right in written + chosen if k == kind]) for kind in kinds
    }


def measures(judged: Sequence[Judgement], ranked: Sequence[Rank]) -> dict[str, float]:
    """What there is beyond accuracies: `f1` where answers have several words (Rajpurkar et al., SQuAD,
    arXiv 1606.05250, without its leaving out of articles), and of choices recall at 1 and at 5 and
    the mean rank.
    """
    found: dict[str, float] = {}
    shared = [one.shared for one in judged if one.shared is not None]
    if shared:
        found["f1"] = mean(shared)
    if ranked:
        places = [one.place for one in ranked]
        found["retrieval.recall1"] = mean([place <= 1 for place in places])
        found["retrieval.recall5"] = mean([place <= 5 for place in places])
        found["retrieval.rank"] = mean(places)
    return found


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _words(text: str) -> list[str]:
    return text.casefold().split()


def _f1(given: list[str], wanted: list[str]) -> float:
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))
