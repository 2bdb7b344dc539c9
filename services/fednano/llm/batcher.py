"""Which requests share the next batch: fair between clients, within a budget, with little padding."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from fednano.llm.batches import Batch, Budget, Joined, Part, Single, Together
from fednano.llm.jobs import Call, Job, Joinable, Kind, Writing
from fednano.llm.joining import padded
from fednano.llm.shares import Shares
from fednano.llm.waiting import Waiting

WEIGHTS: dict[Kind, float] = {"train": 8, "score": 4, "write": 2}
"""Parts of the device's time, where all three kinds of work wait."""
_PADDING = 1 / 4
"""A request joins only if padding it adds at most so much to what its batch's requests cost apart,"""
_FREE = 16
"""or a sixteenth of the budget: that costs less than another pass."""
_SLICE = 8
"""While others use the service, one client's part of a batch is at least the budget's eighth."""
_RECENT_SECONDS = 2.0
"""For so long a client whose work is done counts as one that uses the service."""


class Batcher:
    """Holds what waits and what is being written, and says what comes next."""

    def __init__(
        self,
        tokens: int,
        answers: int,
        recovery: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`tokens` of a joined batch, padding counted; 0: one request per batch.
        `answers` may be written at the same time."""
        self.waiting = Waiting()
        self.writing: list[Writing] = []
        self._join = tokens > 0
        self._tokens = Budget(tokens or 1 << 62, recovery, clock)
        self._answers = Budget(answers, recovery, clock)
        self._kinds = Shares[Kind](WEIGHTS)
        self._clients = Shares[str]()
        self._turn = 0
        self._clock = clock
        self._seen: dict[str, tuple[float, int]] = {}  # when, and tokens of a request

    def add(self, job: Job[Any]) -> None:
        self.waiting.add(job)
        if isinstance(job, Joinable):
            self._seen[job.sender.client] = self._clock(), job.tokens

    def remove(self, job: Job[Any]) -> None:
        self.waiting.remove(job)
        self.writing = [other for other in self.writing if other is not job]

    def next(self) -> Batch | None:
        """What the device does now, taken from what waits; None where there is nothing to do."""
        kinds: list[Kind] = [kind for kind in WEIGHTS if self.waiting.clients(kind)]
        if self.writing and "write" not in kinds:
            kinds.append("write")
        if not kinds:
            return None
        kind = self._kinds.order(kinds)[0]
        return self._next_to_write() if kind == "write" else self._next_of(kind)

    def ran(self, batch: Batch, seconds: float) -> None:
        """What it cost, and what it told of the memory."""
        self._kinds.charge(batch.kind, seconds)
        if batch.short:
            budget = self._answers if isinstance(batch, Together) else self._tokens
            budget.shrink(batch.short)

    def _next_of(self, kind: Kind) -> Batch:
        clients = self._clients.order(self.waiting.clients(kind))
        jobs = [job for client in clients for job in self.waiting.of(kind, client)]
        first = jobs[0]
        if isinstance(first, Call):
            self._clients.charge(first.sender.client, first.tokens)
            self.waiting.remove(first)
            return Single(first)
        joinable = [job for job in jobs if isinstance(job, Joinable)]
        if not self._joins(first):
            return self._taken([(joinable[0], joinable[0].due)])
        return self._taken(self._company(joinable))

    def _company(self, jobs: Sequence[Joinable[Any]]) -> list[tuple[Joinable[Any], list[int]]]:
        """The first and whoever fits in beside it, those of like length before others."""
        filling = _Filling(self._tokens.now)
        first, *others = jobs
        quotas = {job.sender.client: self._quota(job.sender.client) for job in jobs}
        near = [job for job in others if _may_join(first, job)]
        near.sort(key=lambda job: abs(max(job.lengths) - max(first.lengths)))
        for job in [first, *near]:
            client = job.sender.client
            samples = job.next(quotas[client]) if quotas[client] > 0 else []
            if samples and filling.add(job, samples):
                quotas[client] -= padded([job.lengths[sample] for sample in samples])
        return filling.taken

    def _taken(self, found: Sequence[tuple[Joinable[Any], list[int]]]) -> Joined:
        parts = [Part(job, list(samples), job.take(samples)) for job, samples in found]
        for part in parts:
            self._clients.charge(part.job.sender.client, part.tokens)
            if not part.job.due:
                self.waiting.remove(part.job)
        return Joined(parts)

    def _quota(self, client: str) -> int:
        """Tokens of a batch that may be one client's. Its neighbours wait for no more than that while
        they are away for a moment, with a batch of their own in mind."""
        oldest = self._clock() - _RECENT_SECONDS
        self._seen = {name: seen for name, seen in self._seen.items() if seen[0] >= oldest}
        others = [tokens for name, (_, tokens) in self._seen.items() if name != client]
        most = self._tokens.now
        return min(most, max(most // _SLICE, min(others))) if others else most

    def _next_to_write(self) -> Together:
        """Answers that have been begun go on together; one that wants a batch of its own takes turns
        with them."""
        self._begin_to_write()
        groups = [[job] for job in self.writing if not self._joins(job)]
        together = [job for job in self.writing if self._joins(job)]
        if together:  # the first ones, where memory is short: the others have no cache meanwhile
            groups.append(together[: self._answers.now])
        self._turn += 1
        turn = groups[self._turn % len(groups)]
        for job in turn:
            self._clients.charge(job.sender.client, 1)
        return Together(turn)

    def _joins(self, job: Job[Any]) -> bool:
        return self._join and not job.sender.alone

    def _begin_to_write(self) -> None:
        while len(self.writing) < self._answers.now and self.waiting.clients("write"):
            client = self._clients.order(self.waiting.clients("write"))[0]
            (job, *_) = self.waiting.of("write", client)
            self.waiting.remove(job)
            if isinstance(job, Writing):
                self.writing.append(job)


class _Filling:
    """A batch as far as it is known."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._longest = 0
        self._samples = 0
        self._apart = 0  # tokens, each request padded for itself
        self.taken: list[tuple[Joinable[Any], list[int]]] = []

    def add(self, job: Joinable[Any], samples: list[int]) -> bool:
        """Whether they fit; the first always do."""
        longest = max(job.lengths[sample] for sample in samples)
        together = max(self._longest, longest) * (self._samples + len(samples))
        apart = self._apart + longest * len(samples)
        worth = together - apart <= max(_PADDING * apart, self._room / _FREE)
        if self.taken and (together > self._room or not worth):
            return False
        self._longest = max(self._longest, longest)
        self._samples += len(samples)
        self._apart = apart
        self.taken.append((job, samples))
        return True


def _may_join(first: Joinable[Any], job: Joinable[Any]) -> bool:
    return not job.sender.alone and type(job.work) is type(first.work)
