"""Adapters in Redis: raw tensors under their digest, kept as long as the run's retention says."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from fednano.coordinator import keys
from fednano.coordinator.database import Commit, Database, Raced
from fednano.coordinator.fields import StoredRun
from fednano.coordinator.records import StoredAdapter, Tensors
from fednano.coordinator.store_ranges import ByteRange
from fednano.coordinator.strategies import Span, State
from fednano.wire.errors import NotFound

_DIGITS = set("0123456789abcdef")
_HELD = 3  # in memory: what is trained from, what goes with it, and one that is asked for


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


class Made(NamedTuple):
    """What a strategy made of a round: the adapter, and the moments that it carries on."""

    adapter: StoredAdapter
    moments: Tensors


def handed_digest(state: State) -> str:
    """Of what clients get with the adapter; "" for nothing."""
    return make_adapter(state.handed, 1.0).digest if state.handed else ""


class AdapterStore:
    """Part of the Store."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._newest: OrderedDict[str, StoredAdapter] = OrderedDict()  # by key, newest last
        self._shadows_of = "", 0  # run and round
        self._shadows: dict[str, StoredAdapter] = {}  # of those, by digest
        self._reading = asyncio.Lock()

    async def get(self, run: StoredRun, digest: str) -> StoredAdapter:
        """Raises NotFound, saying when retention dropped it."""
        return (await self.find(run, digest))[1]

    async def find(self, run: StoredRun, digest: str) -> tuple[int, StoredAdapter]:
        """The newest round that made it, and the adapter. Raises NotFound, saying when retention
        dropped it."""
        meta = await self._meta(run.name, digest)
        if meta is None and (handed := await self._handed(run.name, digest)) is not None:
            return handed
        adapter = await self._read(keys.adapter(run.name, digest), digest, meta) if meta else None
        if meta is not None and adapter is not None:
            return int(meta["round"]), adapter
        if run.config.shadows and (shadow := await self._shadow(run.name, digest)) is not None:
            return shadow
        if meta is None:
            raise NotFound(_unknown(run, digest))
        raise NotFound(_dropped(run, digest, await self._meta(run.name, digest) or meta))

    async def _shadow(self, name: str, digest: str) -> tuple[int, StoredAdapter] | None:
        """The round that is being evaluated, and what one of its shadows made of it."""
        if not _is_digest(digest):
            return None
        text = await self._db.small("HGET", keys.shadows(name), keys.shadow_meta(digest))
        if text is None:
            return None
        meta = json.loads(text)
        place = name, int(meta["round"])
        async with self._reading:  # as whoever evaluates asks for the same ones
            if self._shadows_of != place:
                self._shadows_of, self._shadows = place, {}
            if digest not in self._shadows:
                data = await self._db.call("HGET", keys.shadows(name), digest)
                if data is None:
                    return None
                tensors = unpack_tensors(meta["layout"], data)
                self._shadows[digest] = StoredAdapter(digest, meta["scale"], tensors)
            return place[1], self._shadows[digest]

    async def _read(self, key: str, digest: str, meta: dict[str, Any]) -> StoredAdapter | None:
        """None where Redis no longer has it. A round's whole cohort asks for the same one, which
        its digest says can't change: it is read once."""
        if not await self._db.small("EXISTS", key):
            return None
        async with self._reading:
            if key in self._newest:
                self._newest.move_to_end(key)
                return self._newest[key]
            data = await self._db.call("GET", key)
            if data is None:
                return None
            tensors = unpack_tensors(meta["layout"], data)
            self._hold(key, StoredAdapter(digest, meta["scale"], tensors))
            return self._newest[key]

    async def _handed(self, name: str, digest: str) -> tuple[int, StoredAdapter] | None:
        """The newest round and what its strategy hands out, if that has this digest."""
        key = keys.moments(name)
        number, held = await self._db.small("HMGET", key, "round", "handed")
        if not held or held.decode() != digest:
            return None
        async with self._reading:
            if digest not in self._newest:
                found = await self._db.call("HMGET", key, "handed", "layout", "data")
                if found[0] != held:
                    return None
                moments = unpack_tensors(json.loads(found[1]), found[2])
                self._hold(digest, StoredAdapter(digest, 1.0, State({}, moments).handed))
            self._newest.move_to_end(digest)
            return int(number), self._newest[digest]

    def _hold(self, key: str, adapter: StoredAdapter) -> None:
        self._newest[key] = adapter
        if len(self._newest) > _HELD:
            self._newest.popitem(last=False)

    async def digest_of_round(self, name: str, number: int) -> str:
        """Raises NotFound."""
        digest = await self._db.call("HGET", keys.adapter_rounds(name), number)
        if digest is None:
            raise NotFound(f"round {number} of run {name!r} has no adapter")
        return str(digest.decode())

    async def _meta(self, name: str, digest: str) -> dict[str, Any] | None:
        if not _is_digest(digest):
            return None
        text = await self._db.small("HGET", keys.adapters(name), digest)
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

    def put_shadows(self, commit: Commit, name: str, number: int, made: Sequence[Made]) -> None:
        """Adds to `commit` what each shadow made of round `number`, in the place of what they made
        of the one before."""
        self.drop_shadows(commit, name)
        for index, (adapter, moments) in enumerate(made):
            layout, data = pack_tensors(adapter.tensors)
            meta = json.dumps({"round": number, "layout": layout, "scale": adapter.scale})
            fields = (adapter.digest, data, keys.shadow_meta(adapter.digest), meta)
            commit.do("HSET", keys.shadows(name), *fields)
            self._put_moments(commit, keys.shadow_moments(name, index), number, moments)

    def drop_shadows(self, commit: Commit, name: str) -> None:
        """Adds to `commit` that the shadows' adapters go; their moments stay."""
        commit.do("DEL", keys.shadows(name))

    def put_moments(
        self, commit: Commit, name: str, number: int, moments: Tensors, handed: str = ""
    ) -> None:
        """Adds to `commit` what a strategy carries out of round `number`; `handed` is the digest of
        what it hands out of that."""
        self._put_moments(commit, keys.moments(name), number, moments, handed)

    def _put_moments(
        self, commit: Commit, key: str, number: int, moments: Tensors, handed: str = ""
    ) -> None:
        if moments:
            layout, data = pack_tensors(moments)
            fields = ("round", number, "layout", json.dumps(layout), "data", data)
            commit.do("HSET", key, *fields, "handed", handed)

    async def shadow_moments(self, name: str, number: int, index: int) -> Tensors:
        """As `moments`, of the shadow of this index."""
        return await self._moments(keys.shadow_moments(name, index), number)

    async def moments(self, name: str, number: int) -> Tensors:
        """What a strategy carried out of round `number`; nothing where there is none, or
        where nothing came before. Raises Raced where a later round has been published."""
        return await self._moments(keys.moments(name), number)

    async def _moments(self, key: str, number: int) -> Tensors:
        found = await self._db.call("HMGET", key, "round", "layout", "data")
        if found[0] is None:
            return {}
        if int(found[0]) > number:
            raise Raced("another coordinator has merged this round")
        assert int(found[0]) == number, f"moments of round {found[0]!r}, not of {number}"
        return unpack_tensors(json.loads(found[1]), found[2])

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


def _is_digest(text: str) -> bool:
    return len(text) == 64 and set(text) <= _DIGITS


def _unknown(run: StoredRun, digest: str) -> str:
    why = "; a shadow's is dropped once its round was evaluated" if run.config.shadows else ""
    return f"run {run.name!r} has no adapter with the digest {digest!r}{why}"


def _dropped(run: StoredRun, digest: str, meta: dict[str, Any]) -> str:
    when = datetime.fromtimestamp(meta.get("dropped_at", 0), UTC).isoformat(timespec="seconds")
    return (
        f"adapter {digest} of round {meta['round']} was dropped at {when}: run {run.name!r} keeps "
        f"{run.config.retention.rounds} rounds (retention.rounds) besides the first, best and last"
    )
