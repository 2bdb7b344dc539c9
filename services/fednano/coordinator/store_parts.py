"""Updates of an asynchronous run, in Redis: parts of whichever round is being filled when they come."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass

from fednano.coordinator import keys
from fednano.coordinator.database import Database
from fednano.coordinator.fields import StoredRound
from fednano.coordinator.records import Tensors
from fednano.coordinator.store_members import Spent
from fednano.coordinator.store_updates import (
    Claim,
    Sender,
    UpdateMeta,
    claim_of,
    costs_of,
    packed_update,
)


@dataclass(frozen=True)
class Filling:
    """Where an update of an asynchronous run goes, seen while the run was in `at`."""

    at: StoredRound
    number: int
    attempt: int
    late: str  # why it comes too late; "" if it doesn't


class PartStore:
    """Part of the Store."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def claim(
        self,
        sender: Sender,
        into: Filling,
        delta: Tensors,
        meta: UpdateMeta,
        spent: Spent,
        refusal: str = "",
    ) -> Claim:
        """accepted, duplicate, late, refused, or moved where the run is no longer at `into.at`. All or
        nothing. Raises SessionEnded."""
        run, client, place = sender.run, sender.client, (into.number, into.attempt)
        row, data = asdict(meta), b""
        if not refusal and not into.late:
            complete, data = await asyncio.to_thread(packed_update, delta, meta)
            row = asdict(complete)
        part = keys.part(client, sender.round)
        names = [
            *(keys.run(run), keys.round_(run, into.at.number), keys.client(run, client)),
            keys.update(run, *place, part),
            keys.answered(run, sender.round, sender.attempt),
            *(keys.submitted(run, *place), keys.refused(run, *place), keys.late(run, *place)),
            keys.events(run),
            *keys.ledger(run, sender.round, client),
        ]
        told = {"round": into.number, "attempt": into.attempt, "client": client}
        known = {"samples": meta.samples, "metrics": meta.metrics, "staleness": meta.staleness}
        arguments = [
            *(client, sender.session, part, into.at.number, into.at.state, into.at.attempt),
            *(into.late, refusal, json.dumps(row), data, keys.bell(run)),
            f"{into.number}:{into.attempt}",
            json.dumps({**told, **known, "result": "accepted"}),
            json.dumps({**told, "result": "late", "reason": into.late}),
            json.dumps({**told, "result": "refused", "reason": refusal}),
            *costs_of("update", sender, spent),
        ]
        found = claim_of(await self._db.script("CLAIM_PART", names, arguments))
        return found._replace(reason=into.late) if found.result == "late" else found

    async def has_answered(self, run: str, number: int, attempt: int, client: str) -> bool:
        """Whether an update for that task of an asynchronous run was accepted."""
        key = keys.answered(run, number, attempt)
        return bool(await self._db.small("HEXISTS", key, client))
