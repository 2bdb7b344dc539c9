"""Requests of several callers as one batch, and one request as several: what may be joined, and how.

Rows of a batch don't see each other, and a loss is a sum over a sample's own tokens. So each caller's
part of a joined result is what it would have got alone, but for fp32's rounding: sums over a larger
matrix are added in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, Self, TypeVar

import torch

from fednano.models.language_model import ForwardResult, ScoreResult, Sequences, StepResult

R = TypeVar("R")


class Work(Protocol[R]):
    """What one request, or a batch of them, has the engine compute. Works of one type on one engine
    can be joined."""

    @property
    def divisible(self) -> bool:
        """Whether `part` may be asked for."""
        ...

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sample."""
        ...

    def run(self) -> R: ...

    def part(self, samples: Sequence[int]) -> Self:
        """Those samples, in that order."""
        ...

    @classmethod
    def joined(cls, works: Sequence[Self]) -> Self:
        """One behind the other."""
        ...

    def split(self, result: R, works: Sequence[Self]) -> list[R]:
        """What `run` gave for the joined `works`, apart again."""
        ...

    def merged(self, results: Sequence[R], samples: Sequence[int], lengths: Sequence[int]) -> R:
        """The result of a request from those of its parts.

        `samples` are the parts' samples one part behind the other, `lengths` those of the request.
        """
        ...


@dataclass(frozen=True)
class Steps:
    """ForwardBackward."""

    compute: Callable[[Sequences, torch.Tensor, torch.Tensor], StepResult]
    sequences: Sequences
    labels: torch.Tensor  # [tokens]
    weights: torch.Tensor  # [samples]
    divisible = True

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.sequences.lengths

    def run(self) -> StepResult:
        return self.compute(self.sequences, self.labels, self.weights)

    def part(self, samples: Sequence[int]) -> Steps:
        return Steps(
            self.compute,
            _part(self.sequences, samples),
            _rows(self.labels, self.lengths, samples),
            self.weights[list(samples)],
        )

    @classmethod
    def joined(cls, works: Sequence[Steps]) -> Steps:
        return cls(
            works[0].compute,
            joined([work.sequences for work in works]),
            torch.cat([work.labels for work in works]),
            torch.cat([work.weights for work in works]),
        )

    def split(self, result: StepResult, works: Sequence[Steps]) -> list[StepResult]:
        samples = [len(work.lengths) for work in works]
        tokens = [sum(work.lengths) for work in works]
        return [
            StepResult(*(part.to(work.sequences.values.device) for part in parts))
            for work, *parts in zip(
                works,
                result.loss_sums.split(samples),
                result.token_counts.split(samples),
                result.gradient.split(tokens),
                strict=True,
            )
        ]

    def merged(
        self, results: Sequence[StepResult], samples: Sequence[int], lengths: Sequence[int]
    ) -> StepResult:
        back = _inverse(samples)
        came = [lengths[sample] for sample in samples]
        return StepResult(
            torch.cat([result.loss_sums for result in results])[back],
            torch.cat([result.token_counts for result in results])[back],
            _rows(torch.cat([result.gradient for result in results]), came, back),
        )


@dataclass(frozen=True)
class Scores:
    """Score."""

    compute: Callable[[Sequences, torch.Tensor], ScoreResult]
    sequences: Sequences
    labels: torch.Tensor  # [tokens]
    divisible = True

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.sequences.lengths

    def run(self) -> ScoreResult:
        return self.compute(self.sequences, self.labels)

    def part(self, samples: Sequence[int]) -> Scores:
        labels = _rows(self.labels, self.lengths, samples)
        return Scores(self.compute, _part(self.sequences, samples), labels)

    @classmethod
    def joined(cls, works: Sequence[Scores]) -> Scores:
        labels = torch.cat([work.labels for work in works])
        return cls(works[0].compute, joined([work.sequences for work in works]), labels)

    def split(self, result: ScoreResult, works: Sequence[Scores]) -> list[ScoreResult]:
        samples = [len(work.lengths) for work in works]
        return [
            ScoreResult(*(part.to(work.sequences.values.device) for part in parts))
            for work, *parts in zip(
                works,
                result.loss_sums.split(samples),
                result.token_counts.split(samples),
                result.correct_counts.split(samples),
                strict=True,
            )
        ]

    def merged(
        self, results: Sequence[ScoreResult], samples: Sequence[int], lengths: Sequence[int]
    ) -> ScoreResult:
        back = _inverse(samples)
        return ScoreResult(
            torch.cat([result.loss_sums for result in results])[back],
            torch.cat([result.token_counts for result in results])[back],
            torch.cat([result.correct_counts for result in results])[back],
        )


@dataclass(frozen=True)
class Logits:
    """Forward, where nothing is kept. Positions go across samples, so a request stays whole."""

    compute: Callable[[Sequences, torch.Tensor], ForwardResult]
    sequences: Sequences
    positions: torch.Tensor  # [wanted]
    divisible = False

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.sequences.lengths

    def run(self) -> ForwardResult:
        return self.compute(self.sequences, self.positions)

    def part(self, samples: Sequence[int]) -> Logits:
        raise AssertionError("not divisible, so never asked for")

    @classmethod
    def joined(cls, works: Sequence[Logits]) -> Logits:
        sequences = joined([work.sequences for work in works])
        return cls(works[0].compute, sequences, _positions(works))

    def split(self, result: ForwardResult, works: Sequence[Logits]) -> list[ForwardResult]:
        wanted = [len(work.positions) for work in works]
        return [
            ForwardResult("", logits.to(work.sequences.values.device))
            for work, logits in zip(works, result.logits.split(wanted), strict=True)
        ]

    def merged(
        self, results: Sequence[ForwardResult], samples: Sequence[int], lengths: Sequence[int]
    ) -> ForwardResult:
        raise AssertionError("not divisible, so never asked for")


@dataclass(frozen=True)
class Backwards:
    """Backward that computes forward again. It stays whole, as Logits do."""

    compute: Callable[[Sequences, torch.Tensor, torch.Tensor, bool], torch.Tensor]
    sequences: Sequences
    positions: torch.Tensor  # [wanted]
    above: torch.Tensor  # [wanted, vocabulary], the gradient of the logits there
    several: bool = False  # requests
    divisible = False

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.sequences.lengths

    def run(self) -> torch.Tensor:
        """[tokens, hidden]."""
        return self.compute(self.sequences, self.positions, self.above, self.several)

    def part(self, samples: Sequence[int]) -> Backwards:
        raise AssertionError("not divisible, so never asked for")

    @classmethod
    def joined(cls, works: Sequence[Backwards]) -> Backwards:
        sequences = joined([work.sequences for work in works])
        above = torch.cat([work.above for work in works])
        return cls(works[0].compute, sequences, _positions(works), above, len(works) > 1)

    def split(self, result: torch.Tensor, works: Sequence[Backwards]) -> list[torch.Tensor]:
        parts = result.split([sum(work.lengths) for work in works])
        return [
            part.to(work.sequences.values.device) for work, part in zip(works, parts, strict=True)
        ]

    def merged(
        self, results: Sequence[torch.Tensor], samples: Sequence[int], lengths: Sequence[int]
    ) -> torch.Tensor:
        raise AssertionError("not divisible, so never asked for")


def _positions(works: Sequence[Logits | Backwards]) -> torch.Tensor:
    """Those of all, as indices into the tokens of all."""
    starts = [0, *accumulate(sum(work.lengths) for work in works)]
    return torch.cat([w.positions + start for w, start in zip(works, starts, strict=False)])


def joined(batches: Sequence[Sequences]) -> Sequences:
    """The samples of all, one behind the other; on a GPU where any of them lie there."""
    segments = tuple(sample for batch in batches for sample in batch.segments)
    devices = [batch.values.device for batch in batches]
    device = next((device for device in devices if device.type != "cpu"), devices[0])
    return Sequences(torch.cat([batch.values.to(device) for batch in batches]), segments)


def padded(lengths: Sequence[int]) -> int:
    """Tokens that are computed for samples of these lengths."""
    return max(lengths, default=0) * len(lengths)


def _part(sequences: Sequences, samples: Sequence[int]) -> Sequences:
    values = _rows(sequences.values, sequences.lengths, samples)
    return Sequences(values, tuple(sequences.segments[sample] for sample in samples))


def _rows(values: torch.Tensor, lengths: Sequence[int], samples: Sequence[int]) -> torch.Tensor:
    """values [tokens, ...] of those samples, in that order."""
    parts = values.split(list(lengths))
    return torch.cat([parts[sample] for sample in samples])


def _inverse(order: Sequence[int]) -> list[int]:
    """Where each of 0, 1, ... stands in `order`."""
    places = {sample: place for place, sample in enumerate(order)}
    return [places[sample] for sample in range(len(order))]
