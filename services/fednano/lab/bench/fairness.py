"""What a client with huge batches costs its neighbours: their slow steps beside it, and alone."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import Event

import numpy as np

from fednano.client.batches import Batch
from fednano.client.edge import EdgeHalf, NanoEdge
from fednano.client.remote import RemoteLanguageModel
from fednano.client.wires import DenseWire
from fednano.lab.bench.checkpoints import Model, tiny
from fednano.lab.bench.rows import Reach, Row, Surroundings
from fednano.lab.bench.served import RANK, Service, make_examples, new_adapters, serve, whole

_SMALL = (2, 3, 4)
_HUGE = 256
_IN_FLIGHT = 2
"""Steps that the huge client has under way, so that it always has one waiting."""


@dataclass(frozen=True)
class Client:
    """Steps of one size through a connection of its own, one after the other."""

    llm: RemoteLanguageModel
    batch: Batch
    nano: NanoEdge

    @classmethod
    def of(cls, llm: RemoteLanguageModel, edge: EdgeHalf, samples: int, side: int) -> Client:
        batch = Batch.of([edge.prepare(example) for example in make_examples(samples, side)])
        return cls(llm, batch, NanoEdge(new_adapters(llm.hidden_size)))

    def step(self) -> float:
        """Seconds from the adapters to their gradients."""
        start = time.perf_counter()
        DenseWire(self.llm).step(self.nano, self.batch, None).backward()
        return time.perf_counter() - start

    def until(self, deadline: float) -> list[float]:
        seconds = []
        while time.perf_counter() < deadline:
            seconds.append(self.step())
        return seconds


@dataclass
class Found:
    """Seconds of the small clients' steps."""

    alone: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    huge: list[float] = field(default_factory=list)


def measure(around: Surroundings) -> Iterator[Row]:
    """In turns on one service, so that both see the same machine."""
    model = tiny(around.directory)
    edge = EdgeHalf(model.halves / "edge", whole(model))
    seconds, turns = (4.0, 2) if around.quick else (8.0, 6)
    found = Found()
    with serve(around, model) as service, ExitStack() as stack:
        small = [_client(stack, service, edge, model, size) for size in _SMALL]
        huge = _client(stack, service, edge, model, _HUGE)
        for client in (*small, huge):
            client.step()
        for turn in range(turns):
            around.say(f"turn {turn + 1} of {turns}: small clients alone, and beside a huge one")
            found.alone += _together(small, seconds)
            with _busy(huge) as steps:
                found.beside += _together(small, seconds)
            found.huge += steps
    yield _row(model, len(huge.batch.base) // _HUGE, found)


def _client(
    stack: ExitStack, service: Service, edge: EdgeHalf, model: Model, samples: int
) -> Client:
    llm = stack.enter_context(service.caller(f"batch-{samples}"))
    return Client.of(llm, edge, samples, model.side)


def _together(clients: Sequence[Client], seconds: float) -> list[float]:
    deadline = time.perf_counter() + seconds
    with ThreadPoolExecutor(len(clients)) as threads:
        return [
            step for steps in threads.map(lambda c: c.until(deadline), clients) for step in steps
        ]


@contextmanager
def _busy(client: Client) -> Iterator[list[float]]:
    """Keeps the service busy; the list is filled when it ends."""
    over, steps = Event(), list[float]()

    def work() -> list[float]:
        seconds = []
        while not over.is_set():
            seconds.append(client.step())
        return seconds

    with ThreadPoolExecutor(_IN_FLIGHT) as threads:
        running: list[Future[list[float]]] = [threads.submit(work) for _ in range(_IN_FLIGHT)]
        try:
            yield steps
        finally:
            over.set()
        steps += [step for future in running for step in future.result()]


def _row(model: Model, tokens: int, found: Found) -> Row:
    alone, beside = (np.percentile(steps, 95) for steps in (found.alone, found.beside))
    return Row(
        "fairness",
        "p95 of small clients' steps beside a huge one / alone",
        float(beside / alone),
        "x",
        {
            "model": model.parameters,
            "batch": f"{', '.join(map(str, _SMALL))}; the huge one {_HUGE}, {_IN_FLIGHT} in flight",
            "tokens a sample": tokens,
            "rank": RANK,
            "device": "cpu, 1 thread",
            "dtype": "fp32",
            "wire": "dense fp32, loopback",
        },
        {
            "p95 alone ms": float(alone * 1000),
            "p95 beside ms": float(beside * 1000),
            "median alone ms": float(np.median(found.alone) * 1000),
            "median beside ms": float(np.median(found.beside) * 1000),
            "steps alone": len(found.alone),
            "steps beside": len(found.beside),
            "the huge one's median step ms": float(np.median(found.huge) * 1000),
        },
        Reach("at most", 3.0),
    )
