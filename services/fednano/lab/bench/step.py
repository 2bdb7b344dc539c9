"""The split step over loopback against the same step with the whole model in one process: small models
on a CPU, and on a GPU a large one (`large_step`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from fednano.client.edge import EdgeHalf
from fednano.client.examples import Example
from fednano.client.trainer import Trainer
from fednano.lab.bench import large_step
from fednano.lab.bench.checkpoints import Model, hundred, tiny
from fednano.lab.bench.rows import Reach, Row, Surroundings
from fednano.lab.bench.served import RANK, EncodedNow, make_examples, new_adapters, serve, whole
from fednano.models.frozen import FrozenLLM
from fednano.wire.run_config import TrainingConfig


@dataclass(frozen=True)
class Size:
    """One model's measurement: steps in a turn, and turns of each side."""

    model: Callable[..., Model]
    batch: int
    steps: int
    turns: int
    reach: float
    reach_cached: float = 0.95


def sizes(quick: bool) -> tuple[Size, ...]:
    small = Size(tiny, batch=16, steps=8, turns=3 if quick else 25, reach=1.15)
    if quick:
        return (small,)
    return (small, Size(hundred, batch=4, steps=2, turns=5, reach=1.10))


def measure(around: Surroundings) -> Iterator[Row]:
    """Both sides have their features cached, so the ratio is what the split costs."""
    for size in sizes(around.quick):
        yield Sides(around, size, "step", encodes=False).row(Reach("at most", size.reach))
    yield from large_step.measure(around)


def measure_cached(around: Surroundings) -> Iterator[Row]:
    """The split step with cached features; the whole model encodes its images in every step."""
    for size in sizes(around.quick):
        reach = Reach("at most", size.reach_cached)
        yield Sides(around, size, "step-cached", encodes=True).row(reach)


@dataclass(frozen=True)
class Sides:
    """Split and whole, turn by turn on the same batches, from the same adapters."""

    around: Surroundings
    size: Size
    bench: str
    encodes: bool

    def row(self, reach: Reach) -> Row:
        size, around = self.size, self.around
        model = size.model(around.directory)
        examples = make_examples(size.batch * size.steps, model.side)
        engine = whole(model)
        with serve(around, model) as service, service.caller("bench") as remote:
            split = Trainer(EdgeHalf(model.halves / "edge", remote), remote)
            step_whole = self._whole(model, engine, examples)
            tokens = sum(len(split.edge.prepare(example).base) for example in examples)
            around.say(f"{model.name}: {size.turns} turns of {size.steps} steps, split and whole")
            pairs = [
                (self._seconds(split, examples), step_whole())
                for _ in range(1 + size.turns)  # the first of each only warms up
            ][1:]
        return Row(
            self.bench,
            f"{model.name}: split / whole" + (" that encodes" if self.encodes else ""),
            median(split for split, _ in pairs) / median(full for _, full in pairs),
            "x",
            {
                "model": model.parameters,
                "batch": size.batch,
                "tokens a step": tokens // size.steps,
                "rank": RANK,
                "dtype": "fp32",
                "wire": "dense fp32, loopback",
                "threads": "1 each",
            },
            {
                "split ms a step": median(split for split, _ in pairs) * 1000,
                "whole ms a step": median(full for _, full in pairs) * 1000,
                "smallest of the turns' ratios": min(split / full for split, full in pairs),
                "largest": max(split / full for split, full in pairs),
                "turns": size.turns,
            },
            reach,
        )

    def _whole(
        self, model: Model, engine: FrozenLLM, examples: Sequence[Example]
    ) -> Callable[[], float]:
        """One turn of the whole model in this process: seconds a step."""
        folder = model.halves / "edge"
        if not self.encodes:
            cached = Trainer(EdgeHalf(folder, engine), engine)
            return lambda: self._seconds(cached, examples)
        encoder = EncodedNow(folder)
        encoder.edge = EdgeHalf(folder, engine, encoder)
        fresh = Trainer(encoder.edge, engine)
        return lambda: self._seconds_encoding(fresh, encoder, examples)

    def _seconds(self, trainer: Trainer, examples: Sequence[Example]) -> float:
        """A step's share of a local epoch, everything that a client does included."""
        adapters = new_adapters(trainer.llm.hidden_size)
        settings = TrainingConfig(batch_size=self.size.batch)
        start = time.perf_counter()
        trainer.train(adapters, lambda epoch: examples, settings)
        return (time.perf_counter() - start) / self.size.steps

    def _seconds_encoding(
        self, trainer: Trainer, encoder: EncodedNow, examples: Sequence[Example]
    ) -> float:
        """The same, each batch encoded before its step."""
        batch, seconds = self.size.batch, 0.0
        adapters = new_adapters(trainer.llm.hidden_size)
        settings = TrainingConfig(batch_size=batch)
        for first in range(0, len(examples), batch):
            chosen = examples[first : first + batch]
            start = time.perf_counter()
            encoder.encode(chosen)
            trainer.train(adapters, partial(_whatever_epoch, chosen), settings)
            seconds += time.perf_counter() - start
        return seconds / self.size.steps


def _whatever_epoch(examples: Sequence[Example], epoch: int) -> Sequence[Example]:
    return examples
