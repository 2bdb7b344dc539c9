"""How updates become the next adapter: pure functions of the updates, in numpy.

Updates are read in ranges, one behind the other: a block of elements of the first update, the same
of the second, and so on, then the next block. So what is held is the result and a few blocks, however
many updates there are and however large they are. Sums are kept in float64. The caller iterates in
client-id order, so that the bytes don't depend on who arrived first. Blocks don't depend on each
other: several threads work on one each, and while one waits for what it reads, another adds up.
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
from fednano.wire.run_config import StrategyConfig

FISHER = "fisher."
BLOCK = 1 << 16  # elements; its sums stay in a cache while all updates are added to them
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


class Strategy(Protocol):
    """Merges one round's updates."""

    def auxiliary(self, names: Iterable[str]) -> tuple[str, ...]:
        """Names of the tensors that must come with an adapter of these names."""
        ...

    def aggregate(self, updates: Iterable[Readable], block: int = BLOCK) -> Tensors:
        """The next adapter. There must be at least one update; they are iterated again for every
        `block` elements, of which larger ones suit updates that are far away."""
        ...


class FedAvg:
    """The mean weighted by samples: sum n_k theta_k / sum n_k.

    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    AISTATS 2017, algorithm 1.
    """

    def auxiliary(self, names: Iterable[str]) -> tuple[str, ...]:
        return ()

    def aggregate(self, updates: Iterable[Readable], block: int = BLOCK) -> Tensors:
        return _merged(updates, block, (), _Mean)


@dataclass(frozen=True)
class FisherMerging:
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


def strategy_of(config: StrategyConfig) -> Strategy:
    """The strategy that a run is configured with."""
    if config.name == "fedavg":
        return FedAvg()
    return FisherMerging(config.damping, config.fisher == "scaled")


def initial_adapter(modalities: Iterable[str], rank: int, hidden_size: int, seed: int) -> Tensors:
    """Per modality A [rank, hidden] uniform in +-1/sqrt(hidden), named `<modality>.down`, and
    B [hidden, rank] zero, named `<modality>.up`: the adapter changes nothing yet."""
    tensors: Tensors = {}
    bound = 1 / np.sqrt(hidden_size)
    for modality in modalities:
        rng = np.random.default_rng([seed, *modality.encode()])
        down = rng.uniform(-bound, bound, (rank, hidden_size))
        tensors[f"{modality}.down"] = down.astype(np.float32)
        tensors[f"{modality}.up"] = np.zeros((hidden_size, rank), np.float32)
    return tensors


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
    merged = {name: np.empty(shapes[name], np.float32) for name in shapes}

    def merge(spans: tuple[Span, ...]) -> None:
        sums = [sums_of(span.stop - span.start) for span in spans]
        wanted = spans + tuple(s._replace(name=p + s.name) for p in prefixes for s in spans)
        for update in updates:
            read = update.read(wanted)
            for index, span in enumerate(spans):
                _add(sums[index], update, span, read[index :: len(spans)])
        for span, total in zip(spans, sums, strict=True):
            merged[span.name].reshape(-1)[span.start : span.stop] = total.result(samples)

    with ThreadPoolExecutor(merging_threads(), "merge") as threads:
        for _ in threads.map(merge, blocks(shapes, block)):
            pass  # raises what a block raised
    return merged


def merging_threads() -> int:
    """As many as this process may use cores, within bounds."""
    allowed = getattr(os, "sched_getaffinity", None)
    return min(_THREADS, len(allowed(0)) if allowed else os.cpu_count() or 1)


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
