"""What waits for the device: in order of arrival within a client and a kind of work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fednano.llm.jobs import Job, Kind

Line = list[Job[Any]]


class Waiting:
    """Jobs by kind and client. Few enough (the queue is bounded) that a list each will do."""

    def __init__(self) -> None:
        self._lines: dict[tuple[Kind, str], Line] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Job[Any]]:
        for line in self._lines.values():
            yield from line

    def __contains__(self, job: Job[Any]) -> bool:
        return job in self._lines.get(_key(job), ())

    def add(self, job: Job[Any]) -> None:
        self._lines.setdefault(_key(job), []).append(job)

    def remove(self, job: Job[Any]) -> None:
        """Nothing happens where it doesn't wait."""
        line = self._lines.get(_key(job), [])
        if job in line:
            line.remove(job)
        if not line:
            self._lines.pop(_key(job), None)

    def clients(self, kind: Kind) -> list[str]:
        """Who has work of that kind."""
        return [client for found, client in self._lines if found == kind]

    def of(self, kind: Kind, client: str) -> Line:
        """That client's work of that kind, the oldest first."""
        return list(self._lines.get((kind, client), ()))


def _key(job: Job[Any]) -> tuple[Kind, str]:
    return job.kind, job.sender.client
