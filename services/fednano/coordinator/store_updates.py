"""What clients send for a round, in Redis: updates, evaluations, and what they spent."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fednano.coordinator import keys
from fednano.coordinator.database import Database
from fednano.coordinator.records import LedgerRow, Tensors
from fednano.coordinator.store_adapters import pack_tensors, unpack_tensors
from fednano.coordinator.store_members import Spent
from fednano.wire.errors import InvalidRequest, SessionEnded

_CLIENT_FIELDS = ("client_seconds", "server_seconds")


@dataclass(frozen=True)
class Sender:
    """Who sends something for which attempt of which round."""

    run: str
    client: str
    session: str
    round: int
    attempt: int


@dataclass(frozen=True)
class UpdateMeta:
    """What is known of an accepted update besides its tensors."""

    samples: int
    metrics: dict[str, float] = field(default_factory=dict)
    auxiliary: list[str] = field(default_factory=list)  # names of those that aren't the adapter
    layout: list[list[Any]] = field(default_factory=list)


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
    ) -> str:
        """accepted, duplicate, late, refused, or stranger (not of the cohort). All or nothing.

        Raises SessionEnded.
        """
        run, number, attempt = sender.run, sender.round, sender.attempt
        layout, data = ([], b"") if refusal else pack_tensors(tensors)
        row = asdict(replace(meta, layout=layout))
        member = keys.ledger_member(number, sender.client)
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
            *_ledger_keys(run, number, member),
        ]
        told = {"round": number, "attempt": attempt, "client": sender.client}
        known = {"samples": meta.samples, "metrics": meta.metrics}
        arguments = [
            *(sender.client, sender.session, number, attempt),
            *(refusal, json.dumps(row), data, keys.bell(run), member),
            *(repr(spent.client_seconds), repr(spent.server_seconds)),
            json.dumps({**told, **known, "result": "accepted"}),
            json.dumps({**told, "result": "late"}),
            json.dumps({**told, "result": "refused", "reason": refusal}),
            *spent.pairs(),
        ]
        return _result(await self._db.script("CLAIM_UPDATE", names, arguments))

    async def claim_evaluation(
        self, sender: Sender, evaluation: EvaluationMeta, spent: Spent
    ) -> str:
        """accepted, duplicate or late. Raises SessionEnded."""
        run, number = sender.run, sender.round
        member = keys.ledger_member(number, sender.client)
        names = [
            keys.run(run),
            keys.round_(run, number),
            keys.client(run, sender.client),
            keys.evaluations(run, number),
            keys.events(run),
            *_ledger_keys(run, number, member),
        ]
        body = {
            "role": evaluation.role,
            "samples": evaluation.samples,
            "metrics": evaluation.metrics,
        }
        arguments = [
            *(sender.client, sender.session, number, sender.attempt),
            *(json.dumps(body), keys.bell(run), member),
            *(repr(spent.client_seconds), repr(spent.server_seconds)),
            json.dumps({"round": number, "client": sender.client, **body}),
            *spent.pairs(),
        ]
        return _result(await self._db.script("CLAIM_EVALUATION", names, arguments))

    async def accepted(self, run: str, number: int, attempt: int) -> dict[str, UpdateMeta]:
        """Metadata of the accepted updates, by client id in order."""
        found = await self._db.hash(keys.submitted(run, number, attempt))
        return {client: UpdateMeta(**json.loads(found[client])) for client in sorted(found)}

    async def has_submitted(self, run: str, number: int, attempt: int, client: str) -> bool:
        key = keys.submitted(run, number, attempt)
        return bool(await self._db.call("HEXISTS", key, client))

    async def tensors(
        self, run: str, number: int, attempt: int, client: str, meta: UpdateMeta
    ) -> Tensors:
        """An accepted update's tensors, adapter and auxiliary together."""
        data = await self._db.call("GET", keys.update(run, number, attempt, client))
        if data is None:
            raise InvalidRequest(f"the update of {client!r} for round {number} has expired")
        return unpack_tensors(meta.layout, data)

    async def evaluations(self, run: str, number: int) -> dict[str, EvaluationMeta]:
        """By client id in order."""
        found = await self._db.hash(keys.evaluations(run, number))
        return {client: EvaluationMeta(**json.loads(found[client])) for client in sorted(found)}

    async def ledger(self, run: str, cursor: str, limit: int) -> tuple[list[LedgerRow], str]:
        """By round and client, and the cursor of the next page or ""."""
        start = f"({checked_row(cursor)}" if cursor else "-"
        found = await self._db.call(
            "ZRANGEBYLEX", keys.ledger_index(run), start, "+", "LIMIT", 0, limit
        )
        members = [item.decode() for item in found]
        hashes = await self._db.hashes([keys.ledger_row(run, member) for member in members])
        rows = [_row(member, fields) for member, fields in zip(members, hashes, strict=True)]
        return rows, members[-1] if len(members) == limit else ""

    async def ledger_totals(self, run: str) -> dict[str, dict[str, int]]:
        found = await self._db.hash(keys.ledger_totals(run))
        return {"sent": _kinds(found, "sent"), "received": _kinds(found, "received")}


def checked_row(cursor: str) -> str:
    number, slash, client = cursor.partition("/")
    if not (number.isdecimal() and slash and keys.CLIENT_ID.fullmatch(client)):
        raise InvalidRequest.of("cursor", "a cursor from an earlier page", repr(cursor))
    return cursor


def _ledger_keys(run: str, number: int, member: str) -> tuple[str, str, str, str]:
    return (
        keys.ledger_index(run),
        keys.ledger_row(run, member),
        keys.ledger_totals(run),
        keys.round_bytes(run, number),
    )


def _result(found: bytes) -> str:
    result = found.decode()
    if result == "session":
        raise SessionEnded("this session has ended: another process joined under the client id")
    return result


def _kinds(fields: dict[str, str], direction: str) -> dict[str, int]:
    prefix = f"{direction}:"
    return {
        name.removeprefix(prefix): int(value)
        for name, value in sorted(fields.items())
        if name.startswith(prefix)
    }


def _row(member: str, fields: dict[str, str]) -> LedgerRow:
    number, _, client = member.partition("/")
    seconds = (float(fields.get(name, 0)) for name in _CLIENT_FIELDS)
    return LedgerRow(
        int(number), client, _kinds(fields, "sent"), _kinds(fields, "received"), *seconds
    )
