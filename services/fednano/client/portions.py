"""Batches cut into portions that the LLM service takes in one request each, by the limits on its card.

The loss is a weighted sum over samples, so that portions are exact: what belongs to a sample or to a
token is put end to end again, and what is a sum over samples is added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol, runtime_checkable

import torch

from fednano.models.language_model import Sequences
from fednano.wire.errors import InvalidRequest, Problem
from fednano.wire.llm_pb2 import Limits


class TooLong(InvalidRequest):
    """A sample that fits into no request."""

    place = 0  # in its batch


@dataclass(frozen=True)
class Portion:
    """Neighbouring samples of a batch, and the packed tokens that are theirs."""

    samples: slice
    tokens: slice

    def of(self, sequences: Sequences) -> Sequences:
        return Sequences(sequences.values[self.tokens], sequences.segments[self.samples])


@runtime_checkable
class Limited(Protocol):
    """An LLM that takes no more than so much at once."""

    def portions(self, sequences: Sequences, labels: torch.Tensor) -> list[Portion]:
        """As they fit into `forward` and `backward` at the labels."""
        ...


WHOLE = Portion(slice(None), slice(None))


def cut(
    lengths: Sequence[int], sizes: Sequence[int], limits: Limits, beside: int = 0
) -> list[Portion]:
    """The samples in their order; a batch that fits stays whole.

    `lengths` are the samples' tokens, `sizes` their bytes, `beside` the bytes of every request that
    belong to no sample. Raises TooLong for a sample that fits into no request.
    """
    borders, longest, held = [0], 0, beside
    for place, (length, size) in enumerate(zip(lengths, sizes, strict=True)):
        _check_alone(place, length, beside + size, limits)
        longest, held, count = max(longest, length), held + size, place - borders[-1] + 1
        # A service counts every sample of a request as long as the longest.
        if (
            count > limits.samples_per_request
            or count * longest > limits.tokens_per_request
            or held > limits.message_bytes
        ):
            borders.append(place)
            longest, held = length, beside + size
    if len(borders) == 1:
        return [WHOLE]
    ends = [0, *accumulate(lengths)]
    spans = pairwise([*borders, len(lengths)])
    return [Portion(slice(a, b), slice(ends[a], ends[b])) for a, b in spans]


def _check_alone(place: int, length: int, size: int, limits: Limits) -> None:
    most = min(limits.tokens_per_sample, limits.tokens_per_request)
    if length > most:
        raise _too_long(place, f"1 to {most} tokens", length)
    if size > limits.message_bytes:
        raise _too_long(place, f"at most {limits.message_bytes} bytes", size)


def _too_long(place: int, expected: str, got: int) -> TooLong:
    problem = Problem(f"embeddings.samples[{place}]", expected, str(got))
    error = TooLong(str(problem), problem)
    error.place = place
    return error


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of each portion its rows, end to end; a batch that was not cut is not copied either."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
