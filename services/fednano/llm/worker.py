"""One bounded queue and one worker, because there is one device.

What waits when the device is free is joined into batches (`batcher`), which run on the device's own
thread (`batches`). Writing an answer takes a turn per token, so that training goes on between them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from fednano.llm.batcher import Batcher
from fednano.llm.batches import Batch, run
from fednano.llm.jobs import Call, Job, Joinable, Kind, Sender, Turn, Writing
from fednano.llm.joining import Work
from fednano.models.generation import Answer, Write
from fednano.models.language_model import NewToken
from fednano.wire.errors import Busy, Unavailable

T = TypeVar("T")
J = TypeVar("J", bound=Job[Any])
NOBODY = Sender()


class Worker:
    """Runs jobs in batches. All methods belong to the event loop's thread."""

    def __init__(
        self,
        limit: int,
        batcher: Batcher,
        told: Callable[[Batch], None] = lambda _: None,
        wait: Callable[[], None] = lambda: None,
    ) -> None:
        """`limit` jobs may wait; `told` hears of each batch that was run, `wait` is for the device."""
        self.limit = limit
        self._batcher = batcher
        self._told = told
        self._wait = wait
        self._running: Sequence[Job[Any]] = ()
        self._arrived = asyncio.Event()
        self._closed = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")
        self._task: asyncio.Task[None] | None = None

    @property
    def depth(self) -> int:
        """Jobs that wait; answers that have been begun don't."""
        return len(self._batcher.waiting)

    @property
    def busy(self) -> bool:
        return bool(self._running or self._batcher.writing)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Fails what still waits and gives the thread back, once its turn is over."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        left = {*self._running, *self._batcher.writing, *self._batcher.waiting}
        for job in left:
            job.fail(Unavailable("the service is shutting down"))
            self._batcher.remove(job)
        await asyncio.to_thread(self._thread.shutdown)

    def check_room(self) -> None:
        """Raises Busy where the queue is full: asked before a large request is received."""
        if self._closed:
            raise Unavailable("the service is shutting down")
        if self.depth >= self.limit:
            raise Busy(f"the queue is full ({self.limit} requests wait); try again later")

    def submit(
        self, work: Callable[[], T], sender: Sender = NOBODY, kind: Kind = "train", tokens: int = 0
    ) -> Job[T]:
        """One computation, by itself. Raises Busy."""
        return self._add(Call(sender, kind, work, tokens))

    def join(self, work: Work[T], sender: Sender = NOBODY, kind: Kind = "train") -> Job[T]:
        """One that may share its batch. Raises Busy."""
        return self._add(Joinable(sender, kind, work))

    def write(
        self, begin: Callable[[], Answer], write: Write, sender: Sender = NOBODY
    ) -> Job[list[NewToken]]:
        """An answer, with a turn for each token. Raises Busy."""
        return self._add(Writing(sender, begin, write))

    def leave(self, job: Job[Any]) -> None:
        """The caller is gone or served: the job gets no further turn."""
        job.leave()
        self._batcher.remove(job)

    def _add(self, job: J) -> J:
        self.check_room()
        self._batcher.add(job)
        self._arrived.set()
        return job

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._gather()
            self._running = batch.jobs
            turns, seconds = await loop.run_in_executor(self._thread, run, batch, self._wait)
            self._batcher.ran(batch, seconds)
            self._told(batch)
            self._settle(turns)

    def _settle(self, turns: Sequence[Turn[Any]]) -> None:
        for job, turn in zip(self._running, turns, strict=True):
            job.settle(turn)
            if turn.ended:
                self._batcher.remove(job)
        self._running = ()

    async def _gather(self) -> Batch:
        """What waits when the device is free."""
        while (batch := self._batcher.next()) is None:
            self._arrived.clear()
            await self._arrived.wait()
        return batch
