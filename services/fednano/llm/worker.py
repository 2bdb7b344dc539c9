"""One bounded queue and one worker, because there is one device.

Jobs are iterators that are advanced on the device's own thread. Most are done in one turn; writing
an answer takes one turn per token, so that training goes on between its tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fednano.wire.errors import Busy, Unavailable

T = TypeVar("T")


@dataclass(frozen=True)
class _Turn(Generic[T]):
    """What one turn on the device gave."""

    items: list[T]
    ended: bool
    error: Exception | None = None


class Job(Generic[T]):
    """One request's work, and what it has given so far."""

    def __init__(self, work: Iterator[T], in_turns: bool) -> None:
        self._work = work
        self._in_turns = in_turns
        self._submitted = time.monotonic()
        self._given: asyncio.Queue[_Turn[T]] = asyncio.Queue()
        self.started = False
        self.left = False
        """The caller has gone."""
        self.queue_seconds = 0.0
        self.compute_seconds = 0.0

    @property
    def fresh_stream(self) -> bool:
        """An answer of which nothing has been written yet."""
        return self._in_turns and not self.started

    @property
    def open_stream(self) -> bool:
        return self._in_turns and self.started

    async def __aiter__(self) -> AsyncIterator[T]:
        """What the work yields, as it comes; raises what it raises."""
        while True:
            turn = await self._given.get()
            for item in turn.items:
                yield item
            if turn.error is not None:
                raise turn.error
            if turn.ended:
                return

    async def result(self) -> T:
        """The one thing that the work yields; raises what it raises."""
        turn = await self._given.get()
        if turn.error is not None:
            raise turn.error
        return turn.items[0]

    def advance(self) -> _Turn[T]:
        """One turn, on the device's thread. Never raises."""
        begin = time.monotonic()
        if not self.started:
            self.started = True
            self.queue_seconds = begin - self._submitted
        try:
            if self._in_turns:
                return _Turn([next(self._work)], ended=False)
            return _Turn(list(self._work), ended=True)
        except StopIteration:
            return _Turn([], ended=True)
        except Exception as error:
            return _Turn([], ended=True, error=error)
        finally:
            self.compute_seconds += time.monotonic() - begin

    def settle(self, turn: _Turn[T]) -> None:
        """Hands the caller what a turn gave."""
        self._given.put_nowait(turn)

    def fail(self, error: Exception) -> None:
        self.settle(_Turn([], ended=True, error=error))

    def leave(self) -> None:
        """Nobody waits any more: lets go of what the work holds on the device."""
        self.left = True
        self._work = iter(())


class Worker:
    """Runs jobs one after the other. All methods belong to the event loop's thread."""

    def __init__(self, limit: int, streams: int) -> None:
        """`limit` jobs may wait; `streams` answers may be written at the same time."""
        self.limit = limit
        self._streams = streams
        self._waiting: deque[Job[Any]] = deque()
        self._running: list[Job[Any]] = []
        self._arrived = asyncio.Event()
        self._closed = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")
        self._task: asyncio.Task[None] | None = None

    @property
    def depth(self) -> int:
        """Jobs that wait."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Fails what still waits and gives the thread back, once its turn is over."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        for job in [*self._running, *self._waiting]:
            job.fail(Unavailable("the service is shutting down"))
        self._waiting.clear()
        await asyncio.to_thread(self._thread.shutdown)

    def check_room(self) -> None:
        """Raises Busy where the queue is full: asked before a large request is received."""
        if self._closed:
            raise Unavailable("the service is shutting down")
        if len(self._waiting) >= self.limit:
            raise Busy(f"the queue is full ({self.limit} requests wait); try again later")

    def submit(self, work: Callable[[], T]) -> Job[T]:
        """One computation. Raises Busy."""
        return self._add(Job((do() for do in (work,)), in_turns=False))

    def stream(self, work: Callable[[], Iterator[T]]) -> Job[T]:
        """A computation in turns, one for each item. Raises Busy."""
        return self._add(Job((item for make in (work,) for item in make()), in_turns=True))

    def leave(self, job: Job[Any]) -> None:
        """The caller is gone or served: the job gets no further turn."""
        job.leave()
        if job in self._waiting:
            self._waiting.remove(job)
            self._arrived.set()

    def _add(self, job: Job[T]) -> Job[T]:
        self.check_room()
        self._waiting.append(job)
        self._arrived.set()
        return job

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._running = await self._gather()
            self._settle(await loop.run_in_executor(self._thread, _advance, self._running))

    def _settle(self, turns: list[_Turn[Any]]) -> None:
        for job, turn in zip(self._running, turns, strict=True):
            job.settle(turn)
            if not (turn.ended or job.left):
                self._waiting.append(job)
        self._running = []

    async def _gather(self) -> list[Job[Any]]:
        """The first job whose turn it is. Whatever may share its batch will be joined here."""
        while (job := self._next()) is None:
            self._arrived.clear()
            await self._arrived.wait()
        return [job]

    def _next(self) -> Job[Any] | None:
        full = sum(job.open_stream for job in self._waiting) >= self._streams
        for job in self._waiting:
            if not (full and job.fresh_stream):
                self._waiting.remove(job)
                return job
        return None


def _advance(jobs: list[Job[Any]]) -> list[_Turn[Any]]:
    return [job.advance() for job in jobs]
