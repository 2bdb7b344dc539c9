"""Many clients on one LLM: what they get done together, against one large batch in one process. Here
the tiny model on a CPU; on a GPU a large one (`large_clients`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from fednano.client.batches import Batch
from fednano.client.edge import EdgeHalf
from fednano.client.remote import RemoteLanguageModel
from fednano.lab.bench import large_clients
from fednano.lab.bench.checkpoints import Model, tiny
from fednano.lab.bench.rates import rate
from fednano.lab.bench.rows import Reach, Row, Surroundings
from fednano.lab.bench.served import Service, make_examples, serve, whole
from fednano.models.frozen import FrozenLLM

_BATCH = 4
_CLIENTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Work:
    """What the LLM is given; the same over and over, as its time doesn't depend on the values."""

    batch: Batch

    @classmethod
    def of(cls, edge: EdgeHalf, samples: int, side: int) -> Work:
        return cls(Batch.of([edge.prepare(e) for e in make_examples(samples, side)]))

    def step(self, llm: RemoteLanguageModel | FrozenLLM) -> None:
        weights = torch.full((len(self.batch),), 1 / len(self.batch))
        llm.step(self.batch.sequences(self.batch.base), self.batch.labels, weights)


def measure(around: Surroundings) -> Iterator[Row]:
    """On a CPU the reach is relative to one client alone; on a GPU, to the large batch."""
    model = tiny(around.directory)
    engine = whole(model)
    edge = EdgeHalf(model.halves / "edge", engine)
    counts = _CLIENTS[:3] if around.quick else _CLIENTS
    seconds, turns = (1.0, 2) if around.quick else (4.0, 3)
    with serve(around, model) as service:
        rates: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
        for turn in range(turns):
            around.say(f"turn {turn + 1} of {turns}: {', '.join(map(str, counts))} clients")
            for count in counts:
                large = Work.of(edge, _BATCH * count, model.side)
                small = Work.of(edge, _BATCH, model.side)
                rates[count].append(
                    (_together(service, small, count, seconds), _alone(engine, large, seconds / 2))
                )
    yield from _rows(model, {count: _medians(found) for count, found in rates.items()})
    yield from large_clients.measure(around)


def _rows(model: Model, rates: dict[int, tuple[float, float]]) -> Iterator[Row]:
    single = rates[1][0]
    for count, (together, large) in rates.items():
        yield Row(
            "clients",
            f"{count} clients / 1 client alone",
            together / single,
            "x",
            {
                "model": model.parameters,
                "clients": count,
                "batch": _BATCH,
                "device": "cpu, 1 thread",
                "dtype": "fp32",
                "wire": "dense fp32, loopback",
            },
            {
                "samples/s": together,
                f"samples/s, one batch of {_BATCH * count} in one process": large,
                "of the large batch": together / large,
            },
            Reach("at least", 1.0) if count > 1 else None,
        )


def _together(service: Service, work: Work, count: int, seconds: float) -> float:
    """Samples a second of so many clients."""
    with ExitStack() as stack:
        callers = [stack.enter_context(service.caller(f"c{n}")) for n in range(count)]
        return rate([partial(work.step, caller) for caller in callers], len(work.batch), seconds)


def _alone(engine: FrozenLLM, work: Work, seconds: float) -> float:
    return rate([partial(work.step, engine)], len(work.batch), seconds)


def _medians(found: list[tuple[float, float]]) -> tuple[float, float]:
    return median(rate for rate, _ in found), median(rate for _, rate in found)
