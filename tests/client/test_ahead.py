"""The next batch is prepared while a step is in flight, and that changes no number."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from fednano.client.ahead import one_ahead
from fednano.client.datasets import DigitsShard
from fednano.client.examples import Example
from fednano.client.heartbeat import TaskGivenUp
from fednano.client.trainer import Trainer, TrainResult
from fednano.models.frozen import FrozenLLM
from fednano.wire.errors import InvalidRequest
from fednano.wire.run_config import DataConfig, TrainingConfig

from tests.tiny import no_adapters

SHARD = DigitsShard.deal(DataConfig(limit=60), seed=0, shard=0, of=4)  # 48 samples, 3 batches
SECONDS = 60


class Watched(Sequence[Example]):
    """Tells which batch is being prepared; the first of the next epoch is batch 3."""

    def __init__(self, examples: Sequence[Example], begun: dict[int, threading.Event], at: int):
        self._examples, self._begun, self._at = examples, begun, at

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        self._begun[self._at + index.start // 16].set()
        return self._examples[index]


class Waiting:
    """The LLM in this process; a step ends when the next batch is being prepared."""

    def __init__(self, llm: FrozenLLM, begun: dict[int, threading.Event]) -> None:
        self._llm, self._begun = llm, begun
        self.steps = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def step(self, *arguments: Any) -> Any:
        self.steps += 1
        if self.steps in self._begun:
            assert self._begun[self.steps].wait(SECONDS)
        return self._llm.step(*arguments)


def train(trainer: Trainer, begun: dict[int, threading.Event]) -> TrainResult:
    return trainer.train(
        no_adapters(),
        lambda epoch: Watched(SHARD.epoch(0, 1, epoch, "c"), begun, 3 * epoch),
        TrainingConfig(epochs=2),
        "last-epoch",
    )


def test_the_next_batch_is_begun_before_a_step_ends_and_the_numbers_are_equal(
    trainer: Trainer, frozen: FrozenLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = {batch: threading.Event() for batch in range(6)}
    waiting = Waiting(frozen, begun)
    found = train(replace(trainer, llm=waiting), begun)  # type: ignore[arg-type]
    assert waiting.steps == 6
    monkeypatch.setattr("fednano.client.trainer.one_ahead", one_by_one)
    wanted = train(trainer, begun)
    assert found.loss == wanted.loss
    assert found.samples == wanted.samples == 48
    for name, tensor in {**wanted.adapter, **wanted.fisher}.items():
        assert ({**found.adapter, **found.fisher}[name] == tensor).all(), name


class OneByOne(Iterator[Any]):
    """Nothing is made before it is asked for."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = iter(items)

    def __next__(self) -> Any:
        return next(self._items)

    def begin(self) -> None: ...


def one_by_one(items: Iterable[Any]) -> AbstractContextManager[OneByOne]:
    return nullcontext(OneByOne(items))


class Gone(list[Example]):
    """Images of which one can't be opened any more."""

    def __getitem__(self, index: Any) -> Any:
        if index.start == 32:
            raise InvalidRequest("gone.png is no image")
        return super().__getitem__(index)


def test_what_preparing_raises_comes_at_its_batch_and_leaves_no_thread(trainer: Trainer) -> None:
    shares: list[float] = []
    data = Gone(SHARD.epoch(0, 1, 0, "c"))
    with pytest.raises(InvalidRequest, match=r"gone\.png"):
        trainer.train(no_adapters(), lambda _: data, TrainingConfig(), progress=shares.append)
    assert len(shares) == 2
    assert not preparing()


@pytest.mark.parametrize("work", ["train", "evaluate"])
def test_giving_up_leaves_no_thread(trainer: Trainer, work: str) -> None:
    def enough(share: float) -> None:
        assert preparing()
        if share > 0.3:
            raise TaskGivenUp("enough")

    examples = SHARD.epoch(0, 1, 0, "c")
    with pytest.raises(TaskGivenUp):
        if work == "train":
            trainer.train(no_adapters(), lambda _: examples, TrainingConfig(), progress=enough)
        else:
            trainer.evaluate(no_adapters(), examples, batch_size=16, progress=enough)
    assert not preparing()


def preparing() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("ahead") and t.is_alive()]


def test_only_one_item_is_made_ahead_on_the_process_s_number_of_threads() -> None:
    made: list[int] = []
    threads: list[int] = []

    def items() -> Iterator[int]:
        for number in range(4):
            made.append(number)
            threads.append(torch.get_num_threads())
            yield number

    with one_ahead(items()) as taken:
        for number in taken:
            assert len(made) == number + 1
            taken.begin()
            taken.begin()
            assert len(made) <= number + 2
    taken.begin()  # a call that was given up may tell of itself later
    assert made == [0, 1, 2, 3]
    assert set(threads) == {torch.get_num_threads()}
