"""Batches as the device runs them, on its own thread: joined, taken apart where memory is short, and
repeated one by one where something fails, so that nobody fails for another's request."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fednano.llm.jobs import Call, Job, Joinable, Kind, Turn, Writing
from fednano.llm.joining import Work, padded
from fednano.models.memory import free_memory, out_of_memory

log = logging.getLogger(__name__)


class Batch(Protocol):
    """Jobs that have a turn together."""

    kind: Kind
    short: int
    """Where memory did not suffice: the smallest size for which it didn't. Else 0."""

    @property
    def jobs(self) -> Sequence[Job[Any]]: ...

    def turns(self) -> list[Turn[Any]]:
        """What each of `jobs` gets. Never raises."""
        ...

    def shares(self) -> list[float]:
        """Each job's part of the time that it took."""
        ...


def run(batch: Batch, wait: Callable[[], None]) -> tuple[list[Turn[Any]], float]:
    """The turns, and how many seconds they took; each job is told its own. `wait` returns when the
    device has done all that it was given: then any thread may use what came of it."""
    begin = time.monotonic()
    for job in batch.jobs:
        job.start(begin)
    turns = batch.turns()
    try:
        wait()
    except Exception as error:  # as a GPU tells of what went wrong some time before
        turns = [Turn(ended=True, error=error) for _ in batch.jobs]
    seconds = time.monotonic() - begin
    for job, share in zip(batch.jobs, batch.shares(), strict=True):
        job.compute_seconds += seconds * share
    return turns, seconds


class Single:
    """One call."""

    def __init__(self, job: Call[Any]) -> None:
        self.kind = job.kind
        self.jobs: Sequence[Job[Any]] = [job]
        self.short = 0
        self._work = job.work

    def turns(self) -> list[Turn[Any]]:
        try:
            return [Turn([self._work()], ended=True)]
        except Exception as error:
            return [Turn(ended=True, error=error)]

    def shares(self) -> list[float]:
        return [1.0]


@dataclass(frozen=True)
class Part:
    """Samples of one request, as they go into a batch."""

    job: Joinable[Any]
    samples: list[int]
    work: Work[Any]

    @property
    def tokens(self) -> int:
        return padded(self.work.lengths)


class Joined:
    """Parts of several requests, one forward pass."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.kind = parts[0].job.kind
        self.jobs: Sequence[Job[Any]] = [part.job for part in parts]
        self.short = 0

    @property
    def padding(self) -> float:
        """The share of what is computed that is no token."""
        lengths = [length for part in self.parts for length in part.work.lengths]
        return 1 - sum(lengths) / padded(lengths)

    def shares(self) -> list[float]:
        tokens = [sum(part.work.lengths) for part in self.parts]
        return [own / sum(tokens) for own in tokens]

    def turns(self) -> list[Turn[Any]]:
        works = [part.work for part in self.parts]
        may_divide = not any(part.job.sender.alone for part in self.parts)
        results = self._computed(works, may_divide)
        return [
            Turn(ended=True, error=result)
            if isinstance(result, Exception)
            else part.job.done(part.samples, result)
            for part, result in zip(self.parts, results, strict=True)
        ]

    def _computed(self, works: Sequence[Work[Any]], may_divide: bool) -> list[Any]:
        """A result or an exception for each of `works`."""
        try:
            if len(works) == 1:
                return [works[0].run()]
            whole = works[0].joined(works)
            return whole.split(whole.run(), works)
        except Exception as caught:
            error = _without_frames(caught)  # they hold what the device has no memory for
        if not out_of_memory(error):
            return (
                [error] if len(works) == 1 else [self._computed([w], may_divide)[0] for w in works]
            )
        self._note_shortage(works)
        if len(works) > 1:
            half = len(works) // 2
            return [
                r for some in (works[:half], works[half:]) for r in self._computed(some, may_divide)
            ]
        return [self._in_halves(works[0], error) if may_divide else error]

    def _in_halves(self, work: Work[Any], error: Exception) -> Any:
        """The shorter samples, then the longer ones."""
        count = len(work.lengths)
        if count < 2 or not work.divisible:
            return error
        order = sorted(range(count), key=work.lengths.__getitem__)
        halves = order[: count // 2], order[count // 2 :]
        results = []
        for samples in halves:
            (result,) = self._computed([work.part(samples)], may_divide=True)
            if isinstance(result, Exception):
                return result
            results.append(result)
        return work.merged(results, order, work.lengths)

    def _note_shortage(self, works: Sequence[Work[Any]]) -> None:
        lengths = [length for work in works for length in work.lengths]
        self.short = min(self.short or padded(lengths), padded(lengths))
        free_memory()
        log.warning("batch taken apart for want of memory", extra={"tokens": padded(lengths)})


class Together:
    """Answers, each of which gets its next token."""

    kind: Kind = "write"

    def __init__(self, jobs: Sequence[Writing]) -> None:
        self.jobs: Sequence[Job[Any]] = jobs
        self.short = 0
        self._writings = jobs

    def shares(self) -> list[float]:
        return [1 / len(self.jobs)] * len(self.jobs)

    def turns(self) -> list[Turn[Any]]:
        return self._written(self._writings)

    def _written(self, jobs: Sequence[Writing]) -> list[Turn[Any]]:
        """Where memory does not suffice for all, the later half waits, without its cache."""
        try:
            answers = [job.answer for job in jobs]
            found = jobs[0].write(answers)
        except Exception as caught:
            error = _without_frames(caught)
        else:
            return [_turn(a.ended, w) for a, w in zip(answers, found, strict=True)]
        if len(jobs) == 1:
            return [Turn(ended=True, error=error)]
        if not out_of_memory(error):
            return [self._written([job])[0] for job in jobs]
        half = len(jobs) // 2
        self.short = len(jobs)
        free_memory()
        log.warning("answers wait for want of memory", extra={"answers": len(jobs) - half})
        return [*self._written(jobs[:half]), *(Turn() for _ in jobs[half:])]


def _turn(ended: bool, written: Any) -> Turn[Any]:
    if isinstance(written, Exception):
        return Turn(ended=True, error=written)
    return Turn([written], ended=ended)


def _without_frames(error: Exception) -> Exception:
    """Its traceback's frames hold tensors. What is no shortage is left as it is, for the log."""
    return error.with_traceback(None) if out_of_memory(error) else error


class Budget:
    """How much a batch may hold: after a shortage half of what was too much, then more by and by."""

    def __init__(
        self, most: int, recovery: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`recovery`: seconds until twice as much is tried again."""
        self._most = most
        self._recovery = recovery
        self._clock = clock
        self._shrunk: tuple[float, int] | None = None  # when, and to what

    @property
    def now(self) -> int:
        if self._shrunk is None:
            return self._most
        since, size = self._shrunk
        grown = size << min(32, int((self._clock() - since) / self._recovery))
        if grown >= self._most:
            self._shrunk = None
        return min(grown, self._most)

    def shrink(self, too_much: int) -> None:
        self._shrunk = self._clock(), max(1, min(too_much // 2, self.now))
