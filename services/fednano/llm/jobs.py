"""What waits for the device: one request's work each, and how its caller hears of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Self, TypeVar

from fednano.llm.joining import Work, padded
from fednano.models.generation import Answer, Write
from fednano.models.language_model import NewToken
from fednano.wire.tensor_pb2 import Header

T = TypeVar("T")
Kind = Literal["train", "score", "write"]


@dataclass(frozen=True)
class Sender:
    """Whose work it is, and whether it may share a batch."""

    client: str = ""
    alone: bool = False

    @classmethod
    def of(cls, header: Header) -> Self:
        return cls(header.client, header.alone)


@dataclass(frozen=True)
class Turn(Generic[T]):
    """What one turn on the device gave a job."""

    items: Sequence[T] = ()
    ended: bool = False
    error: Exception | None = None


class Job(Generic[T]):
    """One request's work, and what it has given so far."""

    def __init__(self, sender: Sender, kind: Kind) -> None:
        self.sender = sender
        self.kind = kind
        self.submitted = time.monotonic()
        self._given: asyncio.Queue[Turn[T]] = asyncio.Queue()
        self.started = False
        self.left = False
        """The caller has gone."""
        self.queue_seconds = 0.0
        self.compute_seconds = 0.0

    async def __aiter__(self) -> AsyncIterator[T]:
        """What the work gives, as it comes; raises what it raises."""
        while True:
            turn = await self._given.get()
            for item in turn.items:
                yield item
            if turn.error is not None:
                raise turn.error
            if turn.ended:
                return

    async def result(self) -> T:
        """The one thing that the work gives; raises what it raises."""
        turn = await self._given.get()
        if turn.error is not None:
            raise turn.error
        return turn.items[0]

    def start(self, now: float) -> None:
        """Its first turn begins."""
        if not self.started:
            self.started = True
            self.queue_seconds = now - self.submitted

    def settle(self, turn: Turn[T]) -> None:
        """Hands the caller what a turn gave."""
        if turn.items or turn.ended:
            self._given.put_nowait(turn)

    def fail(self, error: Exception) -> None:
        self.settle(Turn(ended=True, error=error))

    def leave(self) -> None:
        """Nobody waits any more: lets go of what the work holds on the device."""
        self.left = True


class Call(Job[T]):
    """Work that is done by itself, in one turn."""

    def __init__(self, sender: Sender, kind: Kind, work: Callable[[], T], tokens: int) -> None:
        super().__init__(sender, kind)
        self.work = work
        self.tokens = tokens


class Joinable(Job[T]):
    """Work that may share a batch, and be done in several."""

    def __init__(self, sender: Sender, kind: Kind, work: Work[T]) -> None:
        super().__init__(sender, kind)
        self.work = work
        self.lengths = work.lengths
        self._samples: list[int] = []  # done, in that order
        self._results: list[T] = []
        self._due = list(range(len(self.lengths)))

    @property
    def due(self) -> list[int]:
        """Samples that are not in a batch yet, the shortest first once they have been divided."""
        return self._due

    @property
    def tokens(self) -> int:
        """All of it, padding counted."""
        return padded(self.lengths)

    def next(self, room: int) -> list[int]:
        """As many of the due samples as fit into `room` tokens with their padding; at least one."""
        whole = padded([self.lengths[sample] for sample in self._due])
        if whole <= room or not self.work.divisible:
            return self._due
        by_length = sorted(self._due, key=self.lengths.__getitem__)
        fitting = [n for n, sample in enumerate(by_length, 1) if self.lengths[sample] * n <= room]
        return by_length[: max(fitting, default=1)]

    def take(self, samples: Sequence[int]) -> Work[T]:
        """Those are due no more."""
        taken = set(samples)
        self._due = [sample for sample in self._due if sample not in taken]
        return self.work if len(samples) == len(self.lengths) else self.work.part(samples)

    def done(self, samples: Sequence[int], result: T) -> Turn[T]:
        """Ends with the last sample."""
        if len(samples) == len(self.lengths):
            return Turn([result], ended=True)
        self._samples += samples
        self._results.append(result)
        if len(self._samples) < len(self.lengths):
            return Turn()
        merged = self.work.merged(self._results, self._samples, self.lengths)
        return Turn([merged], ended=True)


class Writing(Job[list[NewToken]]):
    """An answer, token by token."""

    def __init__(self, sender: Sender, begin: Callable[[], Answer], write: Write) -> None:
        """`begin` and `write` are the engine's, and called on the device's thread only."""
        super().__init__(sender, "write")
        self._begin = begin
        self.write = write
        self._answer: Answer | None = None

    @property
    def answer(self) -> Answer:
        if self._answer is None:
            self._answer = self._begin()
        return self._answer

    def leave(self) -> None:
        super().leave()
        self._answer = None
