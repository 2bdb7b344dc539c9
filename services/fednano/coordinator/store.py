"""The coordinator's state, in Redis: one object that REST, gRPC and the leader hold.

Its parts each keep one kind of thing; here are what REST asks for and the life of the whole.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from fednano.coordinator import keys
from fednano.coordinator.database import Database
from fednano.coordinator.records import (
    ClientRecord,
    Event,
    LedgerRow,
    LedgerTotals,
    MemoryUse,
    RoundRecord,
    RunRecord,
    StoredAdapter,
    TokenRecord,
)
from fednano.coordinator.store_adapters import AdapterStore
from fednano.coordinator.store_lease import LeaseStore
from fednano.coordinator.store_members import MemberStore
from fednano.coordinator.store_parts import PartStore
from fednano.coordinator.store_rounds import RoundStore
from fednano.coordinator.store_runs import RunStore
from fednano.coordinator.store_standing import StandingStore
from fednano.coordinator.store_tokens import TokenStore
from fednano.coordinator.store_updates import UpdateStore
from fednano.wire.errors import Conflict, NotFound, Problem
from fednano.wire.run_config import RunConfig
from fednano.wire.sessions import Identity

log = logging.getLogger(__name__)

SCHEMA = 1


class Store:
    """Methods speak the domain and are safe to repeat. Raises Unavailable while Redis is away."""

    def __init__(self, database: Database, client_seconds: float, admin_token: str) -> None:
        self.database = database
        self.lease = LeaseStore(database)
        self.run_store = RunStore(database)
        self.standings = StandingStore(database)
        self.members = MemberStore(database, self.run_store, client_seconds)
        self.adapters = AdapterStore(database)
        self.updates = UpdateStore(database)
        self.parts = PartStore(database)
        self.round_store = RoundStore(database, self.run_store, self.members, self.adapters)
        self.token_store = TokenStore(database, admin_token)

    @classmethod
    def connect(
        cls,
        url: str,
        clock: Callable[[], float] = time.time,
        *,
        client_seconds: float = 15.0,
        admin_token: str = "",
    ) -> Store:
        """A store that connects when first used."""
        return cls(Database(url, clock), client_seconds, admin_token)

    async def prepare(self) -> None:
        """Checks the schema and how Redis keeps its promises. Raises Conflict for a newer schema."""
        await self._check_schema()
        for setting, wanted in (("appendfsync", "always"), ("maxmemory-policy", "noeviction")):
            found = await self.database.setting(setting)
            if found not in ("", wanted):
                log.warning(
                    "redis may lose what was acknowledged",
                    extra={"setting": setting, "expected": wanted, "got": found},
                )
        if await self.database.setting("appendonly") == "no":
            log.warning("redis keeps nothing", extra={"setting": "appendonly", "got": "no"})

    async def _check_schema(self) -> None:
        await self.database.call("SET", keys.SCHEMA, SCHEMA, "NX")
        found = int(await self.database.call("GET", keys.SCHEMA))
        if found > SCHEMA:
            problem = Problem("redis schema", f"at most {SCHEMA}", str(found))
            raise Conflict(
                f"this Redis was written by a newer FedNano: {problem}. Upgrade the coordinator.",
                problem,
            )
        if found < SCHEMA:
            await self._migrate(found)

    async def _migrate(self, found: int) -> None:
        """Schema 0 is an empty one: nothing to carry over."""
        log.info("schema migrated", extra={"from": found, "to": SCHEMA})
        await self.database.call("SET", keys.SCHEMA, SCHEMA)

    def listening(self) -> AbstractAsyncContextManager[None]:
        """Meanwhile, waits end as soon as something changes rather than when they look again."""
        return self.database.listening()

    async def close(self) -> None:
        await self.database.close()

    async def ping(self) -> None:
        await self.database.call("PING")

    async def memory(self) -> MemoryUse:
        return await self.run_store.memory()

    async def create_run(self, config: RunConfig, by: str) -> tuple[RunRecord, bool]:
        """The run and whether it is new; the same name with the same configuration is the same run.

        Raises Conflict naming what differs, Busy when Redis is nearly full.
        """
        run, created = await self.run_store.create(config, by)
        if created:
            log.info("run created", extra={"run": run.name, "by": by})
        return run, created

    async def run(self, name: str) -> RunRecord:
        """Raises NotFound."""
        return (await self.run_store.get(name)).public()

    async def runs(self, cursor: str = "", limit: int = 50) -> tuple[list[RunRecord], str]:
        """Newest first, and the cursor of the next page or ""."""
        return await self.run_store.page(cursor, limit)

    async def command(self, name: str, command: str, by: str) -> RunRecord:
        """pause, resume or stop; harmless to repeat. Raises NotFound, Conflict."""
        run = await self.run_store.command(name, command)
        log.info("run commanded", extra={"run": name, "command": command, "by": by})
        return run

    async def rounds(
        self, name: str, cursor: str = "", limit: int = 100
    ) -> tuple[list[RoundRecord], str]:
        """By number, each in its newest attempt, and the cursor of the next page or ""."""
        await self.run_store.get(name)
        return await self.round_store.page(name, cursor, limit)

    async def round(self, name: str, number: int) -> RoundRecord:
        """Raises NotFound."""
        await self.run_store.get(name)
        found = await self.round_store.get(name, number)
        if found is None:
            raise NotFound(f"run {name!r} has no round {number}")
        return await self.round_store.record(name, found)

    async def clients(self, name: str) -> list[ClientRecord]:
        await self.run_store.get(name)
        return await self.members.records(name)

    async def ledger(
        self, name: str, cursor: str = "", limit: int = 1000, number: int | None = None
    ) -> tuple[list[LedgerRow], str]:
        """By round and client, of one round or of all; and the cursor of the next page or ""."""
        await self.run_store.get(name)
        return await self.updates.ledger(name, cursor, limit, number)

    async def ledger_totals(self, name: str) -> LedgerTotals:
        """Over the whole run."""
        await self.run_store.get(name)
        return await self.updates.ledger_totals(name)

    async def events(
        self, name: str, after: str = "0-0", block_ms: int = 0, limit: int = 500
    ) -> list[Event]:
        """Events after an id; waits up to `block_ms` for the first."""
        return await self.run_store.events(name, after, block_ms, limit)

    async def last_event_id(self, name: str) -> str:
        return await self.run_store.last_event_id(name)

    async def adapter(self, name: str, digest: str) -> StoredAdapter:
        """Raises NotFound, saying when retention dropped it."""
        return await self.adapters.get(await self.run_store.get(name), digest)

    async def adapter_of_round(self, name: str, number: int) -> StoredAdapter:
        """Raises NotFound, saying when retention dropped it."""
        run = await self.run_store.get(name)
        return await self.adapters.get(run, await self.adapters.digest_of_round(name, number))

    async def create_token(self, name: str, role: str) -> tuple[TokenRecord, str]:
        """The record and the secret, which can't be read again."""
        return await self.token_store.create(name, role)

    async def tokens(self) -> list[TokenRecord]:
        return await self.token_store.all()

    async def revoke_token(self, token_id: str) -> TokenRecord:
        """Raises NotFound."""
        return await self.token_store.revoke(token_id)

    async def identify(self, secret: str) -> Identity:
        """Raises Unauthenticated."""
        return await self.token_store.identify(secret)
