"""The split step of a large model on a GPU, by either wire, against the same step in one process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median

import torch

from fednano.client.cache import FeatureCache
from fednano.client.edge import EdgeHalf
from fednano.client.examples import Example
from fednano.client.factored import FactoredLanguageModel
from fednano.client.remote import RemoteLanguageModel
from fednano.client.trainer import Trainer
from fednano.lab.bench.checkpoints import Model
from fednano.lab.bench.large import Shape, absent, attempted, fits, llava_7b, made, on_gpu
from fednano.lab.bench.rows import BenchFailed, Reach, Row, Surroundings
from fednano.lab.bench.served import (
    Place,
    make_long_examples,
    new_adapters,
    serve,
    taken_bytes,
    whole,
)
from fednano.models.devices import DeviceName
from fednano.models.language_model import LanguageModel
from fednano.wire.run_config import TrainingConfig
from fednano.wire.tensor_pb2 import BF16

_ON_CPU = "factored, client on a CPU"
_REACHES = {"factored": Reach("at most", 1.05), _ON_CPU: None, "dense": None}
Turn = Callable[[], float]
"""So many steps; seconds of one."""


def measure(around: Surroundings) -> Iterator[Row]:
    """On the GPU of this machine; where it has none, what is not measured, and why."""
    shape = llava_7b()
    why = absent(around, shape)
    in_turns = not why and fits(shape)
    sides = Sides(around, shape, on_gpu(), steps=8, turns=2, in_turns=in_turns)
    yield from attempted(sides, why)


@dataclass(frozen=True)
class Sides:
    """Split by either wire, and whole, in one process: the same batch over and over, as a step's time
    does not depend on the values. Features are cached on all sides."""

    around: Surroundings
    shape: Shape
    place: Place
    steps: int  # in a turn
    turns: int
    in_turns: bool
    """Else one side after the other, as the device has no room for both."""

    def rows(self) -> Iterator[Row]:
        shape, say = self.shape, self.around.say
        say(f"{shape.name}: random weights, {shape.bytes / 1e9:.1f} GB of disk for a while")
        sent: dict[str, float] = {}
        with made(self.around.directory, shape, self.place.device) as model:
            say(f"{self.turns} turns of {self.steps} steps, split and whole")
            found = self._found(model, sent)
        if sent["factored"] > sent["dense"] / 2:
            raise BenchFailed("the service kept no bases: what was measured is dense twice")
        for way, row in zip(_REACHES, self.blank(), strict=True):
            yield _filled(row, found, found[way], sent[way])

    def blank(self) -> Iterator[Row]:
        """Without their figures."""
        for way, reach in _REACHES.items():
            case = f"{self.shape.name}: split, {way} / whole"
            place = {
                "device": f"{self.place.name} for the LLM and the whole model's adapters",
                "client's adapters": self._client(way),
                "dtype": f"{self.place.dtype} in the LLM, fp32 in the adapters",
                "wire": f"{_wire(way)} bf16, loopback",
                "threads": f"{self.place.threads} each",
            }
            sides = "in turns" if self.in_turns else "one after the other"
            parts: dict[str, str | int | float] = {"turns": self.turns, "sides": sides}
            yield Row("step", case, math.nan, "x", {**self.shape.setting, **place}, parts, reach)

    def _found(self, model: Model, sent: dict[str, float]) -> dict[str, list[float]]:
        """Seconds of a step in each turn, by side."""
        if self.in_turns:
            with self._split(model, sent) as split:
                return self._taken({**split, **self._whole(model)})
        with self._split(model, sent) as split:
            found = self._taken(split)
        return found | self._taken(self._whole(model))

    def _taken(self, sides: Mapping[str, Turn]) -> dict[str, list[float]]:
        """The first turn of each only warms up: it uploads, and fills caches."""
        turns = [{name: turn() for name, turn in sides.items()} for _ in range(1 + self.turns)]
        return {name: [seconds[name] for seconds in turns[1:]] for name in sides}

    @cached_property
    def _features(self) -> FeatureCache:
        return FeatureCache("")

    @contextmanager
    def _split(self, model: Model, sent: dict[str, float]) -> Iterator[dict[str, Turn]]:
        """`sent` is told the bytes of a step, both directions."""
        torch.set_num_threads(self.place.threads)
        with serve(self.around, model, self.place) as service, ExitStack() as stack:
            callers = {
                way: stack.enter_context(service.caller(f"c{number}", BF16))
                for number, way in enumerate(_REACHES)
            }
            yield {way: self._by(way, model, callers[way], sent) for way in callers}

    def _by(
        self, way: str, model: Model, remote: RemoteLanguageModel, sent: dict[str, float]
    ) -> Turn:
        factored = FactoredLanguageModel(remote) if _wire(way) == "factored" else None
        train = self._trained(model, remote, factored, self._client(way))

        def turn() -> float:
            remote.calls.meter.take()
            seconds = train()
            sent[way] = sum(taken_bytes(remote.calls.meter)) / self.steps
            return seconds

        return turn

    def _whole(self, model: Model) -> dict[str, Turn]:
        engine = whole(model, self.place)
        return {"whole": self._trained(model, engine, None, self.place.device)}

    def _client(self, way: str) -> DeviceName:
        return "cpu" if way == _ON_CPU else self.place.device

    def _trained(
        self,
        model: Model,
        llm: LanguageModel,
        factored: FactoredLanguageModel | None,
        device: DeviceName,
    ) -> Turn:
        """Everything that a client on `device` does in a local epoch."""
        edge, examples = self._examples(model, llm, device)
        trainer = Trainer(edge, llm, factored)
        settings = TrainingConfig(batch_size=self.shape.batch)

        def turn() -> float:
            adapters = new_adapters(llm.hidden_size, self.shape.rank)
            start = time.perf_counter()
            trainer.train(adapters, lambda epoch: examples * self.steps, settings)
            return (time.perf_counter() - start) / self.steps

        return turn

    def _examples(
        self, model: Model, llm: LanguageModel, device: DeviceName
    ) -> tuple[EdgeHalf, list[Example]]:
        edge = EdgeHalf(model.halves / "edge", llm, self._features, device)
        return edge, make_long_examples(edge, self.shape.batch, model.side, self.shape.tokens)


def _wire(way: str) -> str:
    return way.partition(",")[0]


def _filled(row: Row, found: Mapping[str, list[float]], split: list[float], sent: float) -> Row:
    ratios = [own / full for own, full in zip(split, found["whole"], strict=True)]
    parts = {
        "split ms a step": median(split) * 1000,
        "whole ms a step": median(found["whole"]) * 1000,
        "smallest of the turns' ratios": min(ratios),
        "largest": max(ratios),
        "MB a step, both directions": sent / 1e6,
    }
    return replace(row, figure=median(split) / median(found["whole"]), parts={**parts, **row.parts})
