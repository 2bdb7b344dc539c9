"""Weighted means: FedAvg, and Fisher merging.

Sums are kept in float64. The caller iterates in client-id order, so that the bytes don't depend on
who arrived first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
        return _merged(updates, block, (FISHER,), lambda size: _FisherMean(size, self))


class _Sums(Protocol):
    """What is added up of one span."""

    def add(self, update: Readable, name: str, at: slice, *values: Floats) -> None:
        """`values` are elements `at` of the sums: the adapter's, then the auxiliary ones'."""
        ...

    def result(self, samples: int) -> Floats: ...


def _merged(
    updates: Iterable[Readable],
    block: int,
    prefixes: tuple[str, ...],
    sums_of: Callable[[int], _Sums],
) -> Tensors:
    """The adapter, made block by block; `prefixes` name the auxiliary tensors that it takes."""
    shapes: Mapping[str, tuple[int, ...]] = {}
    samples = 0
    for update in updates:
        shapes, samples = update.shapes, samples + update.samples

    def merge(spans: tuple[Span, ...]) -> list[Floats]:
        sums = [sums_of(span.stop - span.start) for span in spans]
        wanted = spans + tuple(s._replace(name=p + s.name) for p in prefixes for s in spans)
        for update in updates:
            read = update.read(wanted)
            for index, span in enumerate(spans):
                _add(sums[index], update, span, read[index :: len(spans)])
        return [total.result(samples) for total in sums]

    return in_blocks(shapes, block, merge)


def _add(sums: _Sums, update: Readable, span: Span, values: Sequence[Floats]) -> None:
    """In pieces that fit into a core's cache."""
    for start in range(0, span.stop - span.start, BLOCK):
        at = slice(start, start + BLOCK)
        sums.add(update, span.name, at, *(each[at] for each in values))


def _nothing(size: int) -> Doubles:
    """What anything may be added to without a change; 0.0 would make 0.0 of -0.0."""
    return np.full(size, -0.0)


class _Mean:
    def __init__(self, size: int) -> None:
        self.total = _nothing(size)
        self._scratch = np.empty(min(size, BLOCK))

    def add(self, update: Readable, name: str, at: slice, *values: Floats) -> None:
        (theta,) = values
        product = self._scratch[: len(theta)]
        np.copyto(product, theta)
        product *= update.samples
        self.total[at] += product

    def result(self, samples: int) -> Floats:
        return (self.total / samples).astype(np.float32)


class _FisherMean:
    def __init__(self, size: int, how: FisherMerging) -> None:
        self._how = how
        self._weighted = _nothing(size)
        self._weights = _nothing(size)
        # With damping no weight is 0, so nobody will ask for the plain mean.
        self._plain = None if how.damping else _Mean(size)
        self._scratch = np.empty((2, min(size, BLOCK)))

    def add(self, update: Readable, name: str, at: slice, *values: Floats) -> None:
        theta, fisher = values
        weight, product = self._scratch[:, : len(theta)]
        np.copyto(weight, fisher)
        if self._how.scaled:
            mean = update.mean(FISHER + name)
            if mean > 0:
                weight /= mean
            else:
                weight.fill(0)
        weight += self._how.damping
        weight *= update.samples
        np.multiply(weight, theta, out=product)
        self._weighted[at] += product
        self._weights[at] += weight
        if self._plain is not None:
            self._plain.add(update, name, at, theta)

    def result(self, samples: int) -> Floats:
        """weighted / weights, and the plain mean where the weights are 0; never NaN."""
        if self._plain is None:
            return (self._weighted / self._weights).astype(np.float32)
        safe = self._weights > 0
        merged = self._weighted / np.where(safe, self._weights, 1)
        return np.where(safe, merged, self._plain.total / samples).astype(np.float32)
