"""Adapters in Redis: raw tensors under their digest, kept as long as the run's retention says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import accumulate
from typing import Any

import numpy as np

from fednano.coordinator import keys
from fednano.coordinator.database import Commit, Database
from fednano.coordinator.fields import StoredRun
from fednano.coordinator.records import StoredAdapter, Tensors
from fednano.coordinator.strategies import Span
from fednano.wire.errors import NotFound

_DIGITS = set("0123456789abcdef")
ByteRange = tuple[int, int]  # the first byte, and the one after the last


def pack_tensors(tensors: Tensors) -> tuple[list[list[Any]], bytes]:
    """The layout ([name, shape] sorted by name) and the fp32 bytes in that order."""
    names = sorted(tensors)
    layout: list[list[Any]] = [[name, list(tensors[name].shape)] for name in names]
    data = b"".join(np.ascontiguousarray(tensors[name], "<f4").tobytes() for name in names)
    return layout, data


def unpack_tensors(layout: list[list[Any]], data: bytes) -> Tensors:
    """Read-only views of `data`."""
    tensors: Tensors = {}
    start = 0
    for name, shape in layout:
        size = int(np.prod(shape, dtype=np.int64))
        tensors[name] = np.frombuffer(data, "<f4", size, start).reshape(shape)
        start += 4 * size
    return tensors


class Places:
    """Where `pack_tensors` put each tensor."""

    def __init__(self, layout: list[list[Any]]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, shape in layout}
        sizes = [4 * int(np.prod(shape, dtype=np.int64)) for shape in self.shapes.values()]
        self._starts = dict(zip(self.shapes, accumulate(sizes, initial=0), strict=False))

    def ranges(self, spans: Sequence[Span]) -> tuple[tuple[ByteRange, ...], list[tuple[int, int]]]:
        """The ranges of bytes to read for `spans`, neighbours joined; and for each span the index
        of its range and the offset in that."""
        ranges: list[ByteRange] = []
        inside = []
        for span in spans:
            start, stop = (self._starts[span.name] + 4 * at for at in (span.start, span.stop))
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], stop)
            else:
                ranges.append((start, stop))
            inside.append((len(ranges) - 1, start - ranges[-1][0]))
        return tuple(ranges), inside


def make_adapter(tensors: Tensors, scale: float) -> StoredAdapter:
    """Addressed by the SHA-256 of layout, scale and bytes."""
    names = sorted(tensors)
    layout = [[name, list(tensors[name].shape)] for name in names]
    head = json.dumps({"layout": layout, "scale": scale}, separators=(",", ":"))
    digest = hashlib.sha256(head.encode() + b"\n")
    for name in names:
        digest.update(np.ascontiguousarray(tensors[name], "<f4").reshape(-1).data)
    return StoredAdapter(digest.hexdigest(), scale, tensors)


class AdapterStore:
    """Part of the Store."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def get(self, run: StoredRun, digest: str) -> StoredAdapter:
        """Raises NotFound, saying when retention dropped it."""
        meta = await self._meta(run.name, digest)
        if meta is None:
            raise NotFound(f"run {run.name!r} has no adapter with the digest {digest!r}")
        data = await self._db.call("GET", keys.adapter(run.name, digest))
        if data is None:
            raise NotFound(_dropped(run, digest, await self._meta(run.name, digest) or meta))
        return StoredAdapter(digest, meta["scale"], unpack_tensors(meta["layout"], data))

    async def round_of(self, name: str, digest: str) -> int:
        """The newest round that made it."""
        meta = await self._meta(name, digest)
        return int(meta["round"]) if meta else 0

    async def digest_of_round(self, name: str, number: int) -> str:
        """Raises NotFound."""
        digest = await self._db.call("HGET", keys.adapter_rounds(name), number)
        if digest is None:
            raise NotFound(f"round {number} of run {name!r} has no adapter")
        return str(digest.decode())

    async def _meta(self, name: str, digest: str) -> dict[str, Any] | None:
        if len(digest) != 64 or not set(digest) <= _DIGITS:
            return None
        text = await self._db.call("HGET", keys.adapters(name), digest)
        meta: dict[str, Any] | None = json.loads(text) if text else None
        return meta

    def put(self, commit: Commit, name: str, number: int, adapter: StoredAdapter) -> None:
        """Adds the adapter of a round to `commit`."""
        layout, data = pack_tensors(adapter.tensors)
        meta = json.dumps({"round": number, "layout": layout, "scale": adapter.scale})
        commit.do("SET", keys.adapter(name, adapter.digest), data)
        # Equal adapters share a digest; the newest round describes it.
        commit.do("HSET", keys.adapters(name), adapter.digest, meta)
        commit.do("HSET", keys.adapter_rounds(name), number, adapter.digest)
        commit.do("ZADD", keys.kept_rounds(name), number, number)

    async def retain(self, commit: Commit, run: StoredRun, done: int) -> None:
        """Adds to `commit` what retention drops after round `done`; first, best and last stay."""
        held = [int(n) for n in await self._db.call("ZRANGE", keys.kept_rounds(run.name), 0, -1)]
        found = await self._db.pipeline(
            [("HGET", keys.adapter_rounds(run.name), number) for number in held]
        )
        digests = dict(zip(held, (digest.decode() for digest in found), strict=True))
        newest = done - run.config.retention.rounds
        stay = {n for n in held if n in (0, done, run.best_round) or n > newest}
        wanted = {digests[number] for number in stay}
        for number in sorted(set(held) - stay):
            commit.do("ZREM", keys.kept_rounds(run.name), number)
            if digests[number] not in wanted:
                await self._drop(commit, run.name, digests[number])

    async def _drop(self, commit: Commit, name: str, digest: str) -> None:
        meta = {**(await self._meta(name, digest) or {}), "dropped_at": self._db.clock()}
        commit.do("DEL", keys.adapter(name, digest))
        commit.do("HSET", keys.adapters(name), digest, json.dumps(meta))


def _dropped(run: StoredRun, digest: str, meta: dict[str, Any]) -> str:
    when = datetime.fromtimestamp(meta.get("dropped_at", 0), UTC).isoformat(timespec="seconds")
    return (
        f"adapter {digest} of round {meta['round']} was dropped at {when}: run {run.name!r} keeps "
        f"{run.config.retention.rounds} rounds (retention.rounds) besides the first, best and last"
    )
