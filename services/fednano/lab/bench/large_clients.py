"""Many clients on one large LLM on a GPU, against the same as one large batch in one process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch

from fednano.client.batches import Batch
from fednano.client.edge import EdgeHalf, NanoEdge
from fednano.client.factored import FactoredLanguageModel
from fednano.client.remote import RemoteLanguageModel
from fednano.lab.bench.checkpoints import Model
from fednano.lab.bench.large import Shape, absent, attempted, fits, llava_7b, made, on_gpu
from fednano.lab.bench.rates import Step, rate
from fednano.lab.bench.rows import BenchFailed, Reach, Row, Surroundings
from fednano.lab.bench.served import (
    Place,
    make_long_examples,
    new_adapters,
    serve,
    taken_bytes,
    whole,
)
from fednano.models.factored import Factored
from fednano.models.frozen import FrozenLLM
from fednano.models.language_model import LanguageModel
from fednano.wire.tensor_pb2 import BF16

_BATCH = 4
_COUNTS = (1, 2, 4, 8, 16)
_REACH = Reach("at least", 0.9)
Rates = dict[int, list[float]]
"""Samples a second in each turn, by the number of clients."""


def measure(around: Surroundings) -> Iterator[Row]:
    """On the GPU of this machine; where it has none, what is not measured, and why."""
    shape = llava_7b()
    why = absent(around, shape)
    in_turns = not why and fits(shape)
    clients = Clients(around, shape, on_gpu(), _COUNTS, seconds=4, turns=2, in_turns=in_turns)
    yield from attempted(clients, why)


@dataclass(frozen=True)
class Clients:
    """Clients that send by the factored wire, each with one step in flight. What they send is the same
    over and over, as its time does not depend on the values."""

    around: Surroundings
    shape: Shape
    place: Place
    counts: tuple[int, ...]
    seconds: float
    turns: int
    in_turns: bool
    """Else one side after the other, as the device has no room for both."""

    def rows(self) -> Iterator[Row]:
        shape, say = self.shape, self.around.say
        say(f"{shape.name}: random weights, {shape.bytes / 1e9:.1f} GB of disk for a while")
        with made(self.around.directory, shape, self.place.device) as model:
            say(f"{self.turns} turns of {', '.join(map(str, self.counts))} clients")
            together, large = self._found(model)
        single = median(together[self.counts[0]])
        for count, row in zip(self.counts, self.blank(), strict=True):
            own, most = median(together[count]), median(large[count])
            parts = {
                "samples/s": own,
                f"samples/s, one batch of {_BATCH * count} in one process": most,
                "of the first row's": own / single,
            }
            yield replace(row, figure=own / most, parts={**parts, **row.parts})

    def blank(self) -> Iterator[Row]:
        """Without their figures."""
        for count in self.counts:
            case = f"{self.shape.name}: {count} clients / one large batch in one process"
            pieces, size = self._pieces(count)
            setting = {
                **self.shape.setting,
                "clients": count,
                "batch": _BATCH,
                "large batch": f"{_BATCH * count}, computed as {pieces} of {size}",
                "device": self.place.name,
                "dtype": self.place.dtype,
                "wire": "factored bf16, loopback",
                "threads": f"{self.place.threads} each",
            }
            sides = "in turns" if self.in_turns else "one after the other"
            parts: dict[str, str | int | float] = {"turns": self.turns, "sides": sides}
            yield Row("clients", case, math.nan, "x", setting, parts, _REACH)

    def _pieces(self, count: int) -> tuple[int, int]:
        """How a large batch is computed where all of its graph would not fit: pieces, and samples of
        each. Those are more than enough to keep the device busy."""
        pieces = math.ceil(_BATCH * count / self.shape.batch)
        return pieces, _BATCH * count // pieces

    def _found(self, model: Model) -> tuple[Rates, Rates]:
        together: Rates = {count: [] for count in self.counts}
        large: Rates = {count: [] for count in self.counts}
        with self._clients(model) as steps:
            beside = self._large(model) if self.in_turns else {}
            for _ in range(self.turns):
                for count in self.counts:
                    together[count].append(rate(steps[:count], _BATCH, self.seconds))
                    if beside:
                        large[count].append(self._rate_of(beside, count))
        if not beside:
            beside = self._large(model)
            for count in self.counts * self.turns:
                large[count].append(self._rate_of(beside, count))
        return together, large

    def _rate_of(self, beside: dict[int, Step], count: int) -> float:
        return rate([beside[count]], _BATCH * count, self.seconds / 2)

    @contextmanager
    def _clients(self, model: Model) -> Iterator[list[Step]]:
        """A step of each; what does not change has been uploaded."""
        torch.set_num_threads(self.place.threads)
        with serve(self.around, model, self.place) as service, ExitStack() as stack:
            callers = [
                stack.enter_context(service.caller(f"c{n}", BF16)) for n in range(max(self.counts))
            ]
            batch = self._batch(model, callers[0], _BATCH)
            sent, digests = _sent(batch, FactoredLanguageModel(callers[0]), self.shape)
            yield [_by_factors(caller, sent, digests, batch) for caller in callers]

    def _large(self, model: Model) -> dict[int, Step]:
        """The same samples in this process; they lie on its device."""
        engine = whole(model, self.place)
        steps: dict[int, Step] = {}
        for count in self.counts:
            pieces, size = self._pieces(count)
            batch = self._batch(model, engine, size)
            steps[count] = partial(_in_pieces, engine, _moved(batch, engine.device), pieces)
        return steps

    def _batch(self, model: Model, llm: LanguageModel, samples: int) -> Batch:
        edge = EdgeHalf(model.halves / "edge", llm)
        examples = make_long_examples(edge, samples, model.side, self.shape.tokens)
        return Batch.of([edge.prepare(example) for example in examples])


def _moved(batch: Batch, device: torch.device) -> Batch:
    return replace(batch, base=batch.base.to(device))


def _in_pieces(engine: FrozenLLM, piece: Batch, pieces: int) -> None:
    for _ in range(pieces):
        found = engine.step(piece.sequences(piece.base), piece.labels, piece.weights)
        found.loss_sums.tolist()  # waits for the device


def _sent(
    batch: Batch, llm: FactoredLanguageModel, shape: Shape
) -> tuple[Factored, tuple[bytes, ...]]:
    """x, U and W, and the digests of x, as a client has them when a step begins."""
    base, digests = llm.held(batch.base.split(batch.pieces))
    nano = NanoEdge(new_adapters(shape.text.hidden_size, shape.rank))
    with torch.no_grad():
        return nano.factored(replace(batch, base=base)), digests


def _by_factors(
    remote: RemoteLanguageModel, sent: Factored, digests: tuple[bytes, ...], batch: Batch
) -> Step:
    """Raises BenchFailed where the service keeps no bases, so that all would be sent every time."""
    llm, weights, meter = FactoredLanguageModel(remote), batch.weights, remote.calls.meter

    def step() -> None:
        llm.step(sent, batch.labels, weights, digests=digests)

    step()
    meter.take()
    step()
    if taken_bytes(meter)[0] > sent.base.numel():  # bf16 takes twice as many
        raise BenchFailed("the service kept no bases: what would be measured is dense")
    return step
