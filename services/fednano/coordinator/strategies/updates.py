"""A round's updates as strategies read them: in ranges, block by block.

A block of elements of the first update, the same of the second, and so on, then the next block. So
what is held is the result and a few blocks, however many updates there are and however large they
are. Blocks don't depend on each other: several threads work on one each, and while one waits for
what it reads, another adds up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fednano.coordinator.records import Tensors

BLOCK = 1 << 18  # elements of an update read at a time: 1 MiB, and as much of its Fisher
_THREADS = 4  # at most: the coordinator has others to serve
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


class Span(NamedTuple):
    """Elements `start` to `stop` of one tensor, seen as flat."""

    name: str
    start: int
    stop: int


class Readable(Protocol):
    """One client's update, of which no more is read than is asked for."""

    @property
    def samples(self) -> int: ...

    @property
    def staleness(self) -> int:
        """Merges since the adapter that it started from was the newest."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the adapter's tensors."""
        ...

    def mean(self, name: str) -> float:
        """Of all elements of an auxiliary tensor, in float64."""
        ...

    def read(self, spans: Sequence[Span]) -> Sequence[Floats]:
        """Elements of adapter and auxiliary tensors: one flat array for each span."""
        ...


@dataclass(frozen=True)
class Update:
    """What one client sent: its adapter, its number of samples, and auxiliary tensors."""

    client: str
    samples: int
    adapter: Tensors
    auxiliary: Tensors
    staleness: int = 0

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.adapter.items()}

    @cached_property
    def _means(self) -> dict[str, float]:
        return {name: mean_of(tensor) for name, tensor in self.auxiliary.items()}

    def mean(self, name: str) -> float:
        return self._means[name]

    def read(self, spans: Sequence[Span]) -> Sequence[Floats]:
        return [self._tensor(s.name).reshape(-1)[s.start : s.stop] for s in spans]

    def _tensor(self, name: str) -> Floats:
        return self.adapter[name] if name in self.adapter else self.auxiliary[name]


@dataclass(frozen=True)
class View:
    """An update with another number of samples, or with fewer tensors."""

    of: Readable
    samples: int
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def staleness(self) -> int:
        return self.of.staleness

    def mean(self, name: str) -> float:
        return self.of.mean(name)

    def read(self, spans: Sequence[Span]) -> Sequence[Floats]:
        return self.of.read(spans)


def mean_of(tensor: Floats) -> float:
    """Of all elements, in float64."""
    return float(tensor.astype(np.float64).mean())


def blocks(shapes: Mapping[str, tuple[int, ...]], size: int) -> Iterator[tuple[Span, ...]]:
    """All elements, by name in order, in runs of `size`."""
    spans: list[Span] = []
    room = size
    for name in sorted(shapes):
        count, start = int(np.prod(shapes[name], dtype=np.int64)), 0
        while start < count:
            stop = min(count, start + room)
            spans.append(Span(name, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield tuple(spans)
                spans, room = [], size
    if spans:
        yield tuple(spans)


def in_blocks(
    shapes: Mapping[str, tuple[int, ...]],
    block: int,
    merge: Callable[[tuple[Span, ...]], Iterable[Floats]],
) -> Tensors:
    """Tensors of these shapes, of which `merge` makes any spans: one flat array for each."""
    merged = {name: np.empty(shapes[name], np.float32) for name in shapes}

    def fill(spans: tuple[Span, ...]) -> None:
        for span, values in zip(spans, merge(spans), strict=True):
            merged[span.name].reshape(-1)[span.start : span.stop] = values

    with merging_pool() as threads:
        for _ in threads.map(fill, blocks(shapes, block)):
            pass  # raises what a block raised
    return merged


def merging_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(merging_threads(), "merge")


def merging_threads() -> int:
    """As many as this process may use cores, within bounds."""
    allowed = getattr(os, "sched_getaffinity", None)
    return min(_THREADS, len(allowed(0)) if allowed else os.cpu_count() or 1)
