"""Strategies that a few bad updates can't steer: median, trimmed mean, Krum.

They look at how updates lie to each other and not at sample counts, which are each client's own
word. So every update counts alike, and one that claims a million samples has no more to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from fednano.coordinator.records import Tensors
from fednano.coordinator.strategies.means import FedAvg
from fednano.coordinator.strategies.state import Merging
from fednano.coordinator.strategies.updates import (
    BLOCK,
    Doubles,
    Floats,
    Readable,
    Span,
    View,
    blocks,
    in_blocks,
    merging_pool,
    merging_threads,
)
from fednano.wire.errors import InvalidRequest

_HELD = 1 << 23  # elements of all updates together that a thread holds: 32 MiB


@dataclass(frozen=True)
class Median(Merging):
    """The median of each element; of an even number of updates, the mean of the middle two.

    Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML
    2018, definition 1.
    """

    def aggregate(self, updates: Iterable[Readable], block: int = BLOCK) -> Tensors:
        return _elementwise(list(updates), block, lambda count: (count - 1) // 2)


@dataclass(frozen=True)
class TrimmedMean(Merging):
    """The mean of each element without the share `trim` at either end, rounded down to updates.

    Yin et al., ICML 2018, definition 2; `trim` is their beta, which must be at least the share of
    bad updates.
    """

    trim: float

    def aggregate(self, updates: Iterable[Readable], block: int = BLOCK) -> Tensors:
        return _elementwise(list(updates), block, lambda count: trimmed(self.trim, count))


@dataclass(frozen=True)
class Krum(Merging):
    """The mean of the `selected` updates that lie closest to their neighbours; 0: of all but
    `byzantine`. The score of an update is the sum of its squared distances to the n - f - 2
    nearest others, with f = `byzantine`; of equal scores the first in the updates' order wins.

    Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
    NeurIPS 2017, section 4; with more than one selected it is their Multi-Krum. It takes at least
    2 f + 3 updates. Raises InvalidRequest where there are fewer.
    """

    byzantine: int
    selected: int = 1

    def aggregate(self, updates: Iterable[Readable], block: int = BLOCK) -> Tensors:
        found = list(updates)
        least = max(2 * self.byzantine + 3, self.selected + self.byzantine)
        if len(found) < least:
            told = f"at least {least} for krum with byzantine {self.byzantine}"
            raise InvalidRequest.of("updates", told, len(found))
        scores = _scores(squared_distances(found), self.byzantine)
        count = self.selected or len(found) - self.byzantine
        best = sorted(np.argsort(scores, kind="stable")[:count])
        chosen = [found[index] for index in best]
        return FedAvg().aggregate([View(u, 1, u.shapes) for u in chosen], block)


def trimmed(trim: float, count: int) -> int:
    """How many of `count` updates are left out at either end; 0.29 of 100 is 29."""
    return math.floor(trim * count + 1e-9)


def _elementwise(found: list[Readable], block: int, cut: Callable[[int], int]) -> Tensors:
    """The mean of what is left of each element's sorted values, without `cut` at either end."""
    left_out = cut(len(found))
    kept = slice(left_out, len(found) - left_out)

    def merge(spans: tuple[Span, ...]) -> Iterator[Floats]:
        held = _side_by_side(found, spans)
        held.sort(axis=0)
        total = np.zeros(held.shape[1])
        for row in held[kept]:  # one by one: numpy's sum adds in an order that hangs on the shape
            total += row
        return _cut((total / len(held[kept])).astype(np.float32), spans)

    return in_blocks(found[0].shapes, _bounded(block, len(found)), merge)


def _side_by_side(found: Sequence[Readable], spans: tuple[Span, ...]) -> Floats:
    """[updates, elements]"""
    held = np.empty((len(found), sum(span.stop - span.start for span in spans)), np.float32)
    for row, update in zip(held, found, strict=True):
        np.concatenate(update.read(spans), out=row)
    return held


def _cut(values: Floats, spans: tuple[Span, ...]) -> Iterator[Floats]:
    """One array for each span."""
    start = 0
    for span in spans:
        stop = start + span.stop - span.start
        yield values[start:stop]
        start = stop


def _bounded(block: int, updates: int) -> int:
    """So that memory does not grow with the number of updates."""
    return max(1, min(block, _HELD // updates))


def squared_distances(found: Sequence[Readable]) -> Doubles:
    """Between any two updates [n, n], from a Gram matrix that is added up block by block.

    The blocks' size hangs on the number of updates alone, and they are added in order: the same
    updates give the same bits, and so the same choice.
    """
    gram = np.zeros((len(found), len(found)))
    spans = blocks(found[0].shapes, _bounded(BLOCK, len(found)))

    def of_block(some: tuple[Span, ...]) -> Doubles:
        held = _side_by_side(found, some).astype(np.float64)
        product: Doubles = held @ held.T
        return product

    with merging_pool() as threads:
        # A few at a time: results of all blocks would be far more than the updates themselves.
        while some := list(islice(spans, merging_threads())):
            for part in threads.map(of_block, some):
                gram += part
    squares = np.diag(gram)
    return np.maximum(squares[:, None] + squares[None, :] - 2 * gram, 0)


def _scores(distances: Doubles, byzantine: int) -> Doubles:
    """[n], by the n - f - 2 nearest others of each."""
    count = len(distances)
    others = distances + np.diag(np.full(count, np.inf))
    scores: Doubles = np.sort(others, axis=1)[:, : count - byzantine - 2].sum(axis=1)
    return scores
