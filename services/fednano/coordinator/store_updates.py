"""What clients send for a round, in Redis: updates, evaluations, and what they spent."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from fednano.coordinator import keys
from fednano.coordinator.database import Database
from fednano.coordinator.records import LedgerRow, LedgerTotals, Tensors
from fednano.coordinator.store_adapters import Places, pack_tensors
from fednano.coordinator.store_members import Spent
from fednano.coordinator.store_ranges import ByteRange, Bytes, RangeReader
from fednano.coordinator.strategies import Floats, Span, mean_of
from fednano.wire.errors import InvalidRequest, SessionEnded, Unavailable

_SECONDS = ("client_seconds", "server_seconds")


@dataclass(frozen=True)
class Sender:
    """Who sends something for which attempt of which round."""

    run: str
    client: str
    session: str
    round: int
    attempt: int
    request: str = ""  # the call's name: what it cost counts once, however often it is repeated


class Claim(NamedTuple):
    """What became of an update or an evaluation, whether its costs were counted, and why it was late
    where that isn't told by the word."""

    result: str
    counted: bool
    reason: str = ""


@dataclass(frozen=True)
class UpdateMeta:
    """What is known of an accepted update besides its tensors."""

    samples: int
    metrics: dict[str, float] = field(default_factory=dict)
    auxiliary: list[str] = field(default_factory=list)  # names of those that aren't the adapter
    layout: list[list[Any]] = field(default_factory=list)
    means: dict[str, float] = field(default_factory=dict)  # of the auxiliary tensors
    staleness: int = 0  # merges since it started, in an asynchronous run


@dataclass(frozen=True)
class EvaluationMeta:
    """A client's evaluation of a round: metrics and samples by adapter digest."""

    role: str
    samples: dict[str, int]
    metrics: dict[str, dict[str, float]]


class UpdateStore:
    """Part of the Store."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def claim(
        self,
        sender: Sender,
        tensors: Tensors,
        meta: UpdateMeta,
        spent: Spent,
        refusal: str = "",
    ) -> Claim:
        """accepted, duplicate, late, refused, or stranger (not of the cohort; its costs don't count).
        All or nothing.

        Raises SessionEnded.
        """
        run, number, attempt = sender.run, sender.round, sender.attempt
        row, data = asdict(meta), b""
        if not refusal:
            complete, data = await asyncio.to_thread(packed_update, tensors, meta)
            row = asdict(complete)
        names = [
            keys.run(run),
            keys.round_(run, number),
            keys.client(run, sender.client),
            keys.update(run, number, attempt, sender.client),
            keys.cohort(run, number, attempt),
            keys.submitted(run, number, attempt),
            keys.refused(run, number, attempt),
            keys.late(run, number, attempt),
            keys.events(run),
            *keys.ledger(run, number, sender.client),
        ]
        told = {"round": number, "attempt": attempt, "client": sender.client}
        known = {"samples": meta.samples, "metrics": meta.metrics}
        arguments = [
            *(sender.client, sender.session, number, attempt),
            *(refusal, json.dumps(row), data, keys.bell(run)),
            json.dumps({**told, **known, "result": "accepted"}),
            json.dumps({**told, "result": "late"}),
            json.dumps({**told, "result": "refused", "reason": refusal}),
            *costs_of("update", sender, spent),
        ]
        return claim_of(await self._db.script("CLAIM_UPDATE", names, arguments))

    async def claim_evaluation(
        self, sender: Sender, evaluation: EvaluationMeta, spent: Spent, refusal: str = ""
    ) -> Claim:
        """accepted, duplicate, late or refused. Raises SessionEnded."""
        run, number = sender.run, sender.round
        names = [
            keys.run(run),
            keys.round_(run, number),
            keys.client(run, sender.client),
            keys.evaluations(run, number),
            keys.events(run),
            *keys.ledger(run, number, sender.client),
        ]
        body = {
            "role": evaluation.role,
            "samples": evaluation.samples,
            "metrics": evaluation.metrics,
        }
        arguments = [
            *(sender.client, sender.session, number, sender.attempt),
            *(refusal, json.dumps(body), keys.bell(run)),
            json.dumps({"round": number, "client": sender.client, **body}),
            *costs_of("evaluation", sender, spent),
        ]
        return claim_of(await self._db.script("CLAIM_EVALUATION", names, arguments))

    async def accepted(self, run: str, number: int, attempt: int) -> dict[str, UpdateMeta]:
        """Metadata of the accepted updates, by client id in order (in an asynchronous run, by part)."""
        found = await self._db.hash(keys.submitted(run, number, attempt))
        return {client: UpdateMeta(**json.loads(found[client])) for client in sorted(found)}

    async def has_submitted(self, run: str, number: int, attempt: int, client: str) -> bool:
        key = keys.submitted(run, number, attempt)
        return bool(await self._db.small("HEXISTS", key, client))

    async def progress(self, run: str, number: int, attempt: int) -> tuple[int, int]:
        """How many updates were accepted, and how many clients are to train."""
        done, cohort = await self._db.pipeline(
            [
                ("HLEN", keys.submitted(run, number, attempt)),
                ("SCARD", keys.cohort(run, number, attempt)),
            ]
        )
        return int(done), int(cohort)

    async def evaluated(self, run: str, number: int) -> set[str]:
        """Who has evaluated the round."""
        found = await self._db.call("HKEYS", keys.evaluations(run, number))
        return {client.decode() for client in found}

    def reading(
        self, run: str, number: int, attempt: int, accepted: dict[str, UpdateMeta]
    ) -> StoredUpdates:
        """The accepted updates, for a strategy."""
        names = {client: keys.update(run, number, attempt, client) for client in accepted}
        return StoredUpdates(self._db, accepted, names)

    async def evaluations(self, run: str, number: int) -> dict[str, EvaluationMeta]:
        """By client id in order."""
        found = await self._db.hash(keys.evaluations(run, number))
        return {client: EvaluationMeta(**json.loads(found[client])) for client in sorted(found)}

    async def ledger(
        self, run: str, cursor: str, limit: int, number: int | None = None
    ) -> tuple[list[LedgerRow], str]:
        """By round and client, of one round or of all; and the cursor of the next page or ""."""
        start, end = "-", "+"
        if number is not None:
            start, end = (f"({keys.ledger_member(n, '')}" for n in (number, number + 1))
        if cursor:
            start = f"({checked_row(cursor)}"
        found = await self._db.call(
            "ZRANGEBYLEX", keys.ledger_index(run), start, end, "LIMIT", 0, limit
        )
        members = [item.decode() for item in found]
        hashes = await self._db.hashes([keys.ledger_row(run, member) for member in members])
        rows = [_row(member, fields) for member, fields in zip(members, hashes, strict=True)]
        return rows, members[-1] if len(members) == limit else ""

    async def ledger_totals(self, run: str) -> LedgerTotals:
        found = await self._db.hash(keys.ledger_totals(run))
        return LedgerTotals(_kinds(found, "sent"), _kinds(found, "received"), *_seconds(found))


class StoredUpdates:
    """A frozen round's updates, by client id in order: a context manager within which threads may
    read them in ranges.

    They come over blocking connections of their own, and not through the event loop, which serves
    clients meanwhile.
    """

    def __init__(
        self, database: Database, accepted: dict[str, UpdateMeta], names: dict[str, str]
    ) -> None:
        self._db = database
        self._reader = RangeReader(database.redis)
        self._stopped = threading.Event()
        self._updates = [
            StoredUpdate(client, meta, names[client], self.fetch)
            for client, meta in accepted.items()
        ]

    def __enter__(self) -> StoredUpdates:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._reader.close()

    def __iter__(self) -> Iterator[StoredUpdate]:
        return iter(self._updates)

    def stop(self) -> None:
        """Whoever still reads gets Unavailable: nobody waits for the result any more."""
        self._stopped.set()

    def fetch(self, update: StoredUpdate, ranges: Sequence[ByteRange]) -> list[Bytes]:
        """Those bytes of it. Raises Unavailable, or InvalidRequest for one that is gone."""
        if self._stopped.is_set():
            raise Unavailable("the merge was given up")
        with self._db.translated():
            found = self._reader.read(update.key, ranges)
        if [len(data) for data in found] != [stop - start for start, stop in ranges]:
            raise InvalidRequest(f"the update of {update.client!r} for this round has expired")
        return found


class StoredUpdate:
    """One of StoredUpdates, as strategies read it."""

    def __init__(
        self,
        client: str,
        meta: UpdateMeta,
        key: str,
        fetch: Callable[[StoredUpdate, Sequence[ByteRange]], list[Bytes]],
    ) -> None:
        self.client = client
        self.samples = meta.samples
        self.staleness = meta.staleness
        self.key = key
        self._meta = meta
        self._places = Places(meta.layout)
        self._fetch = fetch

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        shapes, auxiliary = self._places.shapes, self._meta.auxiliary
        return {name: shape for name, shape in shapes.items() if name not in auxiliary}

    def mean(self, name: str) -> float:
        """As it was when the update came; one that an earlier version stored is read for it."""
        if name not in self._meta.means:
            shape = self._places.shapes[name]
            (whole,) = self.read([Span(name, 0, int(np.prod(shape, dtype=np.int64)))])
            self._meta.means[name] = mean_of(whole)
        return self._meta.means[name]

    def read(self, spans: Sequence[Span]) -> Sequence[Floats]:
        ranges, inside = self._places.ranges(tuple(spans))
        found = self._fetch(self, ranges)
        return [
            np.frombuffer(found[index], "<f4", span.stop - span.start, offset)
            for span, (index, offset) in zip(spans, inside, strict=True)
        ]


def packed_update(tensors: Tensors, meta: UpdateMeta) -> tuple[UpdateMeta, bytes]:
    """What is kept of an update: its metadata, complete, and its bytes."""
    layout, data = pack_tensors(tensors)
    means = {name: mean_of(tensors[name]) for name in meta.auxiliary}
    return replace(meta, layout=layout, means=means), data


def checked_row(cursor: str) -> str:
    number, slash, client = cursor.partition("/")
    if not (number.isdecimal() and slash and keys.CLIENT_ID.fullmatch(client)):
        raise InvalidRequest.of("cursor", "a cursor from an earlier page", repr(cursor))
    return cursor


def costs_of(rpc: str, sender: Sender, spent: Spent) -> list[str | int]:
    """As a script counts them."""
    member = keys.ledger_member(sender.round, sender.client)
    return [member, f"{rpc}/{sender.client}", sender.request, *spent.arguments()]


def claim_of(found: tuple[bytes, int]) -> Claim:
    result = found[0].decode()
    if result == "session":
        raise SessionEnded("this session has ended: another process joined under the client id")
    return Claim(result, bool(found[1]))


def _kinds(fields: dict[str, str], direction: str) -> dict[str, int]:
    prefix = f"{direction}:"
    return {
        name.removeprefix(prefix): int(value)
        for name, value in sorted(fields.items())
        if name.startswith(prefix)
    }


def _seconds(fields: dict[str, str]) -> Iterator[float]:
    return (float(fields.get(name, 0)) for name in _SECONDS)


def _row(member: str, fields: dict[str, str]) -> LedgerRow:
    number, _, client = member.partition("/")
    return LedgerRow(
        int(number), client, _kinds(fields, "sent"), _kinds(fields, "received"), *_seconds(fields)
    )
