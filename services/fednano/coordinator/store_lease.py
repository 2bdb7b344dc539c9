"""The leader's lease in Redis: who may advance rounds, fenced by a counter."""

from __future__ import annotations

from fednano.coordinator import keys
from fednano.coordinator.database import Database


class LeaseStore:
    """Part of the Store. A lease is "<owner>:<fence>"; every takeover has a higher fence."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def acquire(self, owner: str, seconds: float) -> str:
        """The lease, or "" where another holds it."""
        arguments = [owner, int(seconds * 1000)]
        found = await self._db.script("ACQUIRE", [keys.LEADER, keys.FENCE], arguments)
        return found.decode() if found else ""

    async def renew(self, lease: str, seconds: float) -> bool:
        """False where the lease is another's by now."""
        arguments = [lease, int(seconds * 1000)]
        return bool(await self._db.script("RENEW", [keys.LEADER], arguments))

    async def release(self, lease: str) -> None:
        await self._db.script("RELEASE", [keys.LEADER], [lease])
