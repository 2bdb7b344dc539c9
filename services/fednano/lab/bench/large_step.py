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

from fednano.client.batches import Batch
from fednano.client.cache import FeatureCache
from fednano.client.edge import EdgeHalf, NanoEdge
from fednano.client.examples import Example
from fednano.client.factored import FactoredLanguageModel
from fednano.client.remote import RemoteLanguageModel
from fednano.client.trainer import Learning, Trainer
from fednano.client.wires import DenseWire
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
from fednano.models.frozen import FrozenLLM
from fednano.models.language_model import LanguageModel
from fednano.wire.run_config import TrainingConfig
from fednano.wire.tensor_pb2 import BF16

_REACHES = {"factored": Reach("at most", 1.05), "dense": None}
_ON_CPU = "whole, adapters on the CPU"
Turn = Callable[[], float]
"""So many steps; seconds of one."""


def measure(around: Surroundings) -> Iterator[Row]:
    """On the GPU of this machine; where it has none, what is not measured, and why."""
    shape = llava_7b()
    why = absent(around, shape)
    in_turns = not why and fits(shape)
    sides = Sides(around, shape, on_gpu(), steps=8, turns=5, in_turns=in_turns)
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
        for row in self.blank():
            wire = str(row.setting["wire"]).partition(" ")[0]
            yield _filled(row, found, found[wire], sent[wire])

    def blank(self) -> Iterator[Row]:
        """Without their figures."""
        for wire, reach in _REACHES.items():
            case = f"{self.shape.name}: split, {wire} / whole"
            place = {
                "device": f"{self.place.name}; the client's adapters on its CPU, the whole model's"
                " with the LLM",
                "dtype": f"{self.place.dtype} in the LLM, fp32 in the adapters",
                "wire": f"{wire} bf16, loopback",
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
            callers = {w: stack.enter_context(service.caller(w, BF16)) for w in _REACHES}
            yield {wire: self._by(wire, model, callers[wire], sent) for wire in callers}

    def _by(
        self, wire: str, model: Model, remote: RemoteLanguageModel, sent: dict[str, float]
    ) -> Turn:
        factored = FactoredLanguageModel(remote) if wire == "factored" else None
        train = self._trained(model, remote, factored)

        def turn() -> float:
            remote.calls.meter.take()
            seconds = train()
            sent[wire] = sum(taken_bytes(remote.calls.meter)) / self.steps
            return seconds

        return turn

    def _whole(self, model: Model) -> dict[str, Turn]:
        engine = whole(model, self.place)
        return {"whole": self._beside(model, engine), _ON_CPU: self._trained(model, engine)}

    def _trained(
        self, model: Model, llm: LanguageModel, factored: FactoredLanguageModel | None = None
    ) -> Turn:
        """Everything that a client does in a local epoch; its adapters lie on the CPU."""
        edge, examples = self._examples(model, llm)
        trainer = Trainer(edge, llm, factored)
        settings = TrainingConfig(batch_size=self.shape.batch)

        def turn() -> float:
            adapters = new_adapters(llm.hidden_size, self.shape.rank)
            start = time.perf_counter()
            trainer.train(adapters, lambda epoch: examples * self.steps, settings)
            return (time.perf_counter() - start) / self.steps

        return turn

    def _beside(self, model: Model, engine: FrozenLLM) -> Turn:
        """All on one device, x and adapters too, and nothing to prepare: the hardest to come up to."""
        edge, examples = self._examples(model, engine)
        batch = _moved(Batch.of([edge.prepare(e) for e in examples]), engine.device)
        wire = DenseWire(engine)

        def turn() -> float:
            adapters = new_adapters(engine.hidden_size, self.shape.rank).to(engine.device)
            nano = NanoEdge(adapters)
            learning = Learning.begin(adapters.parameters(), TrainingConfig(), mu=0.0)
            start = time.perf_counter()
            with engine.device:  # indices are made where the vectors lie
                for _ in range(self.steps):
                    weights = batch.weights
                    crossed = wire.step(nano, batch, weights, None)
                    learning.step(crossed)
                    crossed.loss_sums.tolist()  # as a training loop looks at it; waits for the device
            return (time.perf_counter() - start) / self.steps

        return turn

    def _examples(self, model: Model, llm: LanguageModel) -> tuple[EdgeHalf, list[Example]]:
        edge = EdgeHalf(model.halves / "edge", llm, self._features)
        return edge, make_long_examples(edge, self.shape.batch, model.side, self.shape.tokens)


def _moved(batch: Batch, device: torch.device) -> Batch:
    return replace(batch, base=batch.base.to(device), labels=batch.labels.to(device))


def _filled(row: Row, found: Mapping[str, list[float]], split: list[float], sent: float) -> Row:
    ratios = [own / full for own, full in zip(split, found["whole"], strict=True)]
    parts = {
        "split ms a step": median(split) * 1000,
        "whole ms a step": median(found["whole"]) * 1000,
        f"{_ON_CPU}, ms a step": median(found[_ON_CPU]) * 1000,
        "smallest of the turns' ratios": min(ratios),
        "largest": max(ratios),
        "MB a step, both directions": sent / 1e6,
    }
    return replace(row, figure=median(split) / median(found["whole"]), parts={**parts, **row.parts})
