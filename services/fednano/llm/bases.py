"""Uploaded bases: what the factored wire need not send again. A base is a piece of a sample's vectors
before any adapter; it is addressed by the digest of its content, within the caller's own namespace.

Everything here can be lost: a caller who finds a base gone uploads it again. So memory is bounded,
what does not fit goes to disk where there is a directory for it, and the rest is dropped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fednano.llm.base_files import BaseFiles
from fednano.wire import codec, torch_codec
from fednano.wire.errors import Problem, UnknownBase
from fednano.wire.tensor_pb2 import DType

log = logging.getLogger(__name__)

Owner = tuple[str, str]
"""Run and client, as in the caller's token: nobody reaches what another has uploaded."""
_MOST_NAMED = 1000
"""Characters that name the missing ones; gRPC allows 8 KiB of trailing metadata."""


@dataclass(frozen=True)
class Base:
    """A piece of x, as it came."""

    dtype: DType
    shape: tuple[int, int]  # [tokens, hidden]
    data: codec.Buffer

    def tensor(self) -> torch.Tensor:
        return torch_codec.to_torch(self.dtype, self.shape, self.data, "base")


@dataclass
class _Kept:
    """A base in memory, or the path of its bytes."""

    dtype: DType
    shape: tuple[int, int]
    size: int
    used_at: float
    data: codec.Buffer | None
    path: Path | None = None

    def read(self) -> Base:
        """Raises OSError."""
        data = self.path.read_bytes() if self.path is not None else self.data
        assert data is not None
        return Base(self.dtype, self.shape, data)


@dataclass
class _Shelf:
    """One tier, memory or disk: what each owner has there, longest unused first."""

    limit: int
    total: int = 0  # bytes
    kept: dict[Owner, OrderedDict[bytes, _Kept]] = field(default_factory=dict)
    shares: Counter[Owner] = field(default_factory=Counter)  # bytes of each owner

    def add(self, owner: Owner, digest: bytes, entry: _Kept) -> None:
        self.kept.setdefault(owner, OrderedDict())[digest] = entry
        self.total += entry.size
        self.shares[owner] += entry.size

    def find(self, owner: Owner, digest: bytes) -> _Kept | None:
        return self.kept.get(owner, OrderedDict()).get(digest)

    def use(self, owner: Owner, digest: bytes, now: float) -> None:
        self.kept[owner].move_to_end(digest)
        self.kept[owner][digest].used_at = now

    def take(self, owner: Owner, digest: bytes) -> _Kept:
        entry = self.kept[owner].pop(digest)
        self.total -= entry.size
        self.shares[owner] -= entry.size
        if not self.kept[owner]:
            del self.kept[owner], self.shares[owner]
        return entry

    def surplus(self) -> tuple[Owner, bytes] | None:
        """What has to go while there is too much: of the owner with the most bytes, the longest
        unused. So one with much data does not push out the others'."""
        if self.total <= self.limit:
            return None
        owner = max(self.kept, key=lambda own: self.shares[own])
        return owner, next(iter(self.kept[owner]))

    def stale(self, before: float) -> list[tuple[Owner, bytes]]:
        return [
            (owner, digest)
            for owner, entries in self.kept.items()
            for digest, entry in entries.items()
            if entry.used_at < before
        ]

    def __len__(self) -> int:
        return sum(len(entries) for entries in self.kept.values())


class BaseStore:
    """Bases of all callers: memory first, then disk, least recently used out, with a time to live.

    Methods may be called from any thread; they may read and write files.
    """

    def __init__(
        self,
        memory_bytes: int,
        seconds: float,
        files: BaseFiles | None = None,
        clock: Callable[[], float] = time.monotonic,
        looked_up: Callable[[int, int], None] = lambda hits, misses: None,
        placed: Callable[[codec.Buffer], codec.Buffer] = lambda data: data,
    ) -> None:
        """`seconds` without use end a base; `looked_up` is told of every `get`. What `placed` returns
        is kept in memory instead."""
        self._seconds = seconds
        self._clock = clock
        self._files = files
        self._memory = _Shelf(memory_bytes)
        self._disk = _Shelf(files.limit if files else 0)
        self._lock = threading.Lock()
        self._looked_up = looked_up
        self._placed = placed

    def __len__(self) -> int:
        return len(self._memory) + len(self._disk)

    @property
    def memory_bytes(self) -> int:
        return self._memory.total

    @property
    def disk_bytes(self) -> int:
        return self._disk.total

    def put(self, owner: Owner, digest: bytes, base: Base) -> None:
        """Keeps a base whose content has been held against its digest, if there is room at all."""
        data = self._placed(base.data)
        with self._lock:
            if self._shelf_of(owner, digest) is not None:
                return
            entry = _Kept(base.dtype, base.shape, len(data), self._clock(), data)
            self._memory.add(owner, digest, entry)
            self._fit()

    def holds(self, owner: Owner, digest: bytes) -> bool:
        """Whether it is there; one that is counts as used."""
        with self._lock:
            return self._find(owner, digest) is not None

    def get(
        self,
        owner: Owner,
        digests: Sequence[bytes],
        check: Callable[[list[int]], None] = lambda tokens: None,
    ) -> list[Base]:
        """All of them, equal ones once; `check` is given their tokens before any is read. Raises what
        that raises, or UnknownBase, which names the places of those that are not there, of equal ones
        the first."""
        places = {digest: place for place, digest in reversed(list(enumerate(digests)))}
        found: dict[bytes, Base | None] = {}
        with self._lock:
            entries = {digest: self._find(owner, digest) for digest in places}
            tokens = [entry.shape[0] for d in digests if (entry := entries[d]) is not None]
            if len(tokens) == len(digests):
                check(tokens)
                found = {digest: self._read(owner, digest) for digest in places}
            lacking = [d for d in places if entries[d] is None or (found and found[d] is None)]
        self._looked_up(len(places) - len(lacking), len(lacking))
        if lacking:
            named = ranges(sorted(places[digest] for digest in lacking))
            problem = Problem("embeddings.bases", "bases that were uploaded", named)
            raise UnknownBase(str(problem), problem)
        return [base for digest in digests if (base := found[digest]) is not None]

    def delete(self, owner: Owner, digests: Sequence[bytes] = ()) -> int:
        """How many were there; without `digests` all of the owner's go."""
        wanted = set(digests)
        with self._lock:
            mine = [
                (shelf, digest)
                for shelf in (self._memory, self._disk)
                for digest in shelf.kept.get(owner, ())
                if not wanted or digest in wanted
            ]
            for shelf, digest in mine:
                self._drop(shelf, owner, digest)
        return len(mine)

    def expire(self) -> None:
        """Drops what has not been used for too long."""
        with self._lock:
            for shelf in (self._memory, self._disk):
                for owner, digest in shelf.stale(self._clock() - self._seconds):
                    self._drop(shelf, owner, digest)

    def close(self) -> None:
        """Forgets everything, on disk too."""
        with self._lock:
            self._memory, self._disk = _Shelf(0), _Shelf(0)
            files, self._files = self._files, None
            if files is not None:
                files.close()

    def _shelf_of(self, owner: Owner, digest: bytes) -> _Shelf | None:
        now = self._clock()
        for shelf in (self._memory, self._disk):
            entry = shelf.find(owner, digest)
            if entry is not None and now - entry.used_at <= self._seconds:
                return shelf
            if entry is not None:
                self._drop(shelf, owner, digest)
        return None

    def _find(self, owner: Owner, digest: bytes) -> _Kept | None:
        """Counts as used."""
        shelf = self._shelf_of(owner, digest)
        if shelf is None:
            return None
        shelf.use(owner, digest, self._clock())
        return shelf.kept[owner][digest]

    def _read(self, owner: Owner, digest: bytes) -> Base | None:
        shelf = self._shelf_of(owner, digest)
        if shelf is None:
            return None
        try:
            return shelf.kept[owner][digest].read()
        except OSError as error:
            log.warning("base lost", extra={"reason": str(error)})
            self._drop(shelf, owner, digest)
            return None

    def _drop(self, shelf: _Shelf, owner: Owner, digest: bytes) -> None:
        entry = shelf.take(owner, digest)
        if entry.path is not None:
            entry.path.unlink(missing_ok=True)

    def _fit(self) -> None:
        while (last := self._memory.surplus()) is not None:
            entry = self._memory.take(*last)
            if self._moved(last, entry):
                self._disk.add(*last, entry)
        while (last := self._disk.surplus()) is not None:
            self._drop(self._disk, *last)

    def _moved(self, name: tuple[Owner, bytes], entry: _Kept) -> bool:
        """Whether an entry's bytes now lie on disk instead of in memory."""
        if self._files is None or entry.data is None or entry.size > self._disk.limit:
            return False
        (run, client), digest = name
        try:
            entry.path = self._files.write(f"{run}\n{client}\n{digest.hex()}", entry.data)
        except OSError as error:  # a full disk loses a base, not a request
            log.warning("base not kept on disk", extra={"reason": str(error)})
            return False
        entry.data = None
        return True


def ranges(places: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"; cut short where that is long."""
    spans: list[list[int]] = []
    for place in places:
        if spans and place == spans[-1][1] + 1:
            spans[-1][1] = place
        else:
            spans.append([place, place])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return text if len(text) <= _MOST_NAMED else text[:_MOST_NAMED].rpartition(",")[0]
