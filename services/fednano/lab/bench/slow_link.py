"""A step over an ordinary uplink: what it takes beyond loopback is its bytes and one round trip."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from math import inf
from statistics import median

from fednano.client.edge import EdgeHalf
from fednano.client.examples import Example
from fednano.client.factored import FactoredLanguageModel
from fednano.client.remote import RemoteLanguageModel
from fednano.client.trainer import Trainer
from fednano.lab.bench.cable import NoCable, cable
from fednano.lab.bench.checkpoints import Model, hundred, tiny
from fednano.lab.bench.rows import Reach, Row, Surroundings
from fednano.lab.bench.served import (
    RANK,
    Service,
    make_examples,
    new_adapters,
    serve,
    taken_bytes,
)
from fednano.wire.run_config import TrainingConfig

_RATES = (20, 100, 1000)  # Mbit/s
_ROUND_TRIP = 0.040  # seconds
_LOOPBACK = 0
_WIRES = ("dense", "factored")


@dataclass(frozen=True)
class Size:
    model: Model
    batch: int
    steps: int  # in a turn
    turns: int


@dataclass
class Side:
    """One wire over one link, measured turn by turn."""

    remote: RemoteLanguageModel
    trainer: Trainer
    examples: list[Example]
    batch: int
    link: str  # what makes it
    seconds: list[float] = field(default_factory=list)  # a step
    bytes: list[tuple[float, float]] = field(default_factory=list)  # a step, sent and received

    def turn(self) -> None:
        adapters = new_adapters(self.remote.hidden_size)
        settings = TrainingConfig(batch_size=self.batch)
        steps = len(self.examples) / self.batch
        start = time.perf_counter()
        self.trainer.train(adapters, lambda epoch: self.examples, settings)
        self.seconds.append((time.perf_counter() - start) / steps)
        sent, received = taken_bytes(self.remote.calls.meter)
        self.bytes.append((sent / steps, received / steps))

    def warm_up(self) -> None:
        """Uploads, fills caches, and lets the connection's window grow."""
        self.turn()
        self.seconds.clear()
        self.bytes.clear()


def measure(around: Surroundings) -> Iterator[Row]:
    """Every side has its turn before any has the next, so that all see the same machine; of its
    turns each keeps the fastest."""
    around.say("a model, cut in two")
    size = _size(around)
    with serve(around, size.model) as service, ExitStack() as stack:
        sides: dict[tuple[str, int], Side] = {}
        for rate in (_LOOPBACK, *_RATES):
            near = Far(service, "loopback")
            far = near if rate == _LOOPBACK else stack.enter_context(link(around, service, rate))
            for wire in _WIRES:
                sides[wire, rate] = _side(stack, far, size, wire, f"{wire}-{rate}")
        around.say("first steps, with uploads")
        for side in sides.values():
            side.warm_up()
        for turn in range(size.turns):
            around.say(f"turn {turn + 1} of {size.turns}: both wires over loopback and the links")
            for side in sides.values():
                side.turn()
    for rate in _RATES:
        yield from (_row(size, sides, wire, rate) for wire in _WIRES)


def _size(around: Surroundings) -> Size:
    if around.quick:
        return Size(tiny(around.directory), batch=16, steps=2, turns=3)
    return Size(hundred(around.directory), batch=4, steps=1, turns=6)


@dataclass(frozen=True)
class Far:
    """The same service behind a link, and what makes the link."""

    service: Service
    made_by: str


@contextmanager
def link(around: Surroundings, service: Service, rate: int) -> Iterator[Far]:
    """One of `rate` Mbit/s: a cable with that rate and a relay for the delay, or, where there can be no
    cable, a relay for both."""
    made_by, own_rate, end = "tc tbf, delay by a TCP relay", inf, list[str]()
    with ExitStack() as stack:
        try:
            laid = stack.enter_context(cable(_RATES.index(rate), rate))
            end = [laid.namespace, laid.host]
        except NoCable as why:
            around.say(f"rate and delay of {rate} Mbit/s by a TCP relay: {why}")
            made_by, own_rate = "a TCP relay", rate * 1e6 / 8
        address = stack.enter_context(_relay(around, service, f"link-{rate}", own_rate, end))
        yield Far(replace(service, address=address), made_by)


@contextmanager
def _relay(
    around: Surroundings, service: Service, name: str, rate: float, end: Sequence[str]
) -> Iterator[str]:
    """The address of one in front of the service, `rate` in bytes/s."""
    ready, port = around.directory / f"{name}.address", service.address.rpartition(":")[2]
    command = [sys.executable, "-m", "fednano.lab.bench.relay", port, str(rate)]
    around.processes.start(name, [*command, str(_ROUND_TRIP / 2), str(ready), *end])
    around.processes.wait_until(ready.exists, f"the start of {name}")
    try:
        yield ready.read_text()
    finally:
        around.processes.kill(name)


def _side(stack: ExitStack, far: Far, size: Size, wire: str, client: str) -> Side:
    remote = stack.enter_context(far.service.caller(client))
    factored = FactoredLanguageModel(remote) if wire == "factored" else None
    trainer = Trainer(EdgeHalf(size.model.halves / "edge", remote), remote, factored)
    examples = make_examples(size.batch * size.steps, size.model.side)
    return Side(remote, trainer, examples, size.batch, far.made_by)


def _row(size: Size, sides: dict[tuple[str, int], Side], wire: str, rate: int) -> Row:
    side, near = sides[wire, rate], sides[wire, _LOOPBACK]
    sent, received = (median(found) for found in zip(*side.bytes, strict=True))
    crossing = (sent + received) * 8 / (rate * 1e6)
    loopback, took = min(near.seconds), min(side.seconds)  # what else runs here only adds
    return Row(
        "slow-link",
        f"{wire} at {rate} Mbit/s / loopback + bytes/rate + round trip",
        took / (loopback + crossing + _ROUND_TRIP),
        "x",
        {
            "model": size.model.parameters,
            "batch": size.batch,
            "tokens a step": _tokens(side) // size.steps,
            "rank": RANK,
            "dtype": "fp32",
            "wire": f"{wire} fp32",
            "link": f"{rate} Mbit/s each way, {_ROUND_TRIP * 1000:.0f} ms round trip, by {side.link}",
            "threads": "1 each",
        },
        {
            "s a step": took,
            "over loopback s": loopback,
            "bytes/rate s": crossing,
            "sent bytes": round(sent),
            "received bytes": round(received),
            "of dense's s a step": took / min(sides["dense", rate].seconds),
            "medians, s a step": f"{median(side.seconds):.3f}; loopback {median(near.seconds):.3f}",
            "turns": size.turns,
        },
        Reach("at most", 1.10),
    )


def _tokens(side: Side) -> int:
    return sum(len(side.trainer.edge.prepare(example).base) for example in side.examples)
