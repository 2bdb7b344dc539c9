"""Weighted means: FedAvg, and Fisher merging.

Sums are kept in float64. Of many updates eight at a time are added up in float32, in less than half the
time: they are off by about as much as the rounding of the result. The caller iterates in client-id
order, so that the bytes don't depend on who came first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fednano.coordinator.records import Tensors
from fednano.coordinator.strategies.state import Merging
from fednano.coordinator.strategies.updates import (
    BLOCK,
    Doubles,
    Floats,
    Readable,
    Span,
    in_blocks,
)

FISHER = "fisher."
_MANY = 64  # updates, from which on ...
_GROUP = 8  # so many are added up in float32
_SMALL = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class FedAvg(Merging):
    """The mean weighted by samples: sum n_k theta_k / sum n_k.

    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    AISTATS 2017, algorithm 1.
    """

    def aggregate(self, updates: Iterable[Readable], block: int = BLOCK) -> Tensors:
        return _merged(updates, block, (), _Mean)


@dataclass(frozen=True)
class FisherMerging(Merging):
    """Elementwise sum n_k (F_k + lambda) theta_k / sum n_k (F_k + lambda).

    FedNano, arXiv 2506.14824, section 3; the merging itself is Matena and Raffel, "Merging Models
    with Fisher-Weighted Averaging", NeurIPS 2022, equation 5. FedNano and FedNano-EF merge alike:
    they differ in how a client gets F_k, in a pass after training or during its last epoch.

    Scaled, each client's F_k is divided by its mean, tensor by tensor, and is 0 where that mean
    is 0, so that one client's steep loss doesn't drown the others. Where the weights' sum is 0 the
    result is the mean weighted by samples.
    """

    damping: float
    scaled: bool

    def auxiliary(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(FISHER + name for name in sorted(names))

    def aggregate(self, updates: Iterable[Readable], block: int = BLOCK) -> Tensors:
        return _merged(
            updates, block, (FISHER,), lambda size, count: _FisherMean(size, count, self)
        )


class _Sums(Protocol):
    """What is added up of one span."""

    def add(self, update: Readable, name: str, *values: Floats) -> None:
        """`values` are the span's elements: the adapter's, then the auxiliary ones'."""
        ...

    def result(self, samples: int) -> Floats: ...


def _merged(
    updates: Iterable[Readable],
    block: int,
    prefixes: tuple[str, ...],
    sums_of: Callable[[int, int], _Sums],
) -> Tensors:
    """The adapter, made block by block; `prefixes` name the auxiliary tensors that it takes.

    `sums_of` takes a span's size and the number of updates.
    """
    shapes: Mapping[str, tuple[int, ...]] = {}
    count, samples = 0, 0
    for update in updates:
        shapes, count, samples = update.shapes, count + 1, samples + update.samples

    def merge(spans: tuple[Span, ...]) -> list[Floats]:
        sums = [sums_of(span.stop - span.start, count) for span in spans]
        wanted = spans + tuple(s._replace(name=p + s.name) for p in prefixes for s in spans)
        for update in updates:
            read = update.read(wanted)
            for index, span in enumerate(spans):
                sums[index].add(update, span.name, *read[index :: len(spans)])
        return [total.result(samples) for total in sums]

    return in_blocks(shapes, block, merge)


def _empty(size: int, narrow: bool) -> Floats | Doubles:
    return np.empty(size, np.float32) if narrow else np.empty(size, np.float64)


class _Sum:
    """Of so many arrays, in float64; `narrow` adds up a group of them in float32 before."""

    def __init__(self, size: int, count: int, narrow: bool) -> None:
        # What anything may be added to without a change; 0.0 would make 0.0 of -0.0.
        self._total: Doubles = np.full(size, -0.0)
        self._group, self._next = _empty(size, narrow), _empty(size, narrow)
        self._at_a_time = _GROUP if narrow else count
        self._grouped = 0

    def room(self) -> Floats | Doubles:
        """Where the next array is to be put, to be `added`."""
        return self._next if self._grouped else self._group

    def added(self) -> None:
        if self._grouped:
            np.add(self._group, self._next, out=self._group)
        self._grouped += 1
        if self._grouped == self._at_a_time:
            self._settle()

    def total(self) -> Doubles:
        self._settle()
        return self._total

    def _settle(self) -> None:
        if self._grouped:
            np.add(self._total, self._group, out=self._total)
        self._grouped = 0


class _Mean:
    """sum n_k theta_k, of so many updates."""

    def __init__(self, size: int, updates: int) -> None:
        self._sum = _Sum(size, updates, updates >= _MANY)

    def add(self, update: Readable, name: str, *values: Floats) -> None:
        (theta,) = values
        room = self._sum.room()
        np.multiply(theta, update.samples, out=room, dtype=room.dtype)
        self._sum.added()

    def result(self, samples: int) -> Floats:
        return self.mean(samples).astype(np.float32)

    def mean(self, samples: int) -> Doubles:
        return self._sum.total() / samples


class _FisherMean:
    """Raw Fisher values may be of any size, so their products are always in float64."""

    def __init__(self, size: int, updates: int, how: FisherMerging) -> None:
        self._how = how
        many = updates >= _MANY and how.scaled
        self._weighted, self._weights = (_Sum(size, updates, many) for _ in range(2))
        # With damping no weight is 0, so nobody will ask for the plain mean.
        self._plain = None if how.damping else _Mean(size, updates)

    def add(self, update: Readable, name: str, *values: Floats) -> None:
        theta, fisher = values
        weight = self._weights.room()
        self._weigh(fisher, update.mean(FISHER + name) if self._how.scaled else 1.0, weight)
        weight *= update.samples
        np.multiply(weight, theta, out=self._weighted.room())
        self._weights.added()
        self._weighted.added()
        if self._plain is not None:
            self._plain.add(update, name, theta)

    def _weigh(self, fisher: Floats, mean: float, weight: Floats | Doubles) -> None:
        """F / mean + lambda. A mean that float32 can't hold well divides in float64: the quotient is
        at most the tensor's size."""
        if mean > 0:
            wide = mean < _SMALL
            np.divide(fisher, mean, out=weight, dtype=np.float64 if wide else weight.dtype)
        else:
            weight.fill(0)
        weight += self._how.damping

    def result(self, samples: int) -> Floats:
        """weighted / weights, and the plain mean where the weights are 0; never NaN."""
        weighted, weights = self._weighted.total(), self._weights.total()
        if self._plain is None:
            return (weighted / weights).astype(np.float32)
        safe = weights > 0
        merged = weighted / np.where(safe, weights, 1)
        return np.where(safe, merged, self._plain.mean(samples)).astype(np.float32)
