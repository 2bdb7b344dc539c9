"""Rounds in Redis. Every transition is compare-and-set and fenced by the leader's lease.

Each leader's method raises Raced where the run or the round is no longer what it was given, and
LeaseLost where the lease is gone; nothing is written then.
"""

from __future__ import annotations

from dataclasses import replace

from fednano.coordinator import keys
from fednano.coordinator.database import Commit, Database
from fednano.coordinator.fields import ROUND, StoredRound, StoredRun
from fednano.coordinator.records import (
    Participation,
    RoundRecord,
    RoundState,
    RunState,
    StoredAdapter,
    Tensors,
)
from fednano.coordinator.store_adapters import AdapterStore
from fednano.coordinator.store_members import MemberStore
from fednano.coordinator.store_runs import RunStore, checked_cursor, expire_updates


class RoundStore:
    """Part of the Store."""

    def __init__(
        self, database: Database, runs: RunStore, members: MemberStore, adapters: AdapterStore
    ) -> None:
        self._db = database
        self._runs = runs
        self._members = members
        self._adapters = adapters

    async def get(self, name: str, number: int) -> StoredRound | None:
        found = await self._db.hash(keys.round_(name, number))
        return ROUND.load(found) if found else None

    async def page(self, name: str, cursor: str, limit: int) -> tuple[list[RoundRecord], str]:
        """By number, and the cursor of the next page or ""."""
        start = f"({checked_cursor(cursor)}" if cursor else "-inf"
        found = await self._db.call(
            "ZRANGEBYSCORE", keys.rounds(name), start, "+inf", "LIMIT", 0, limit
        )
        numbers = [int(item) for item in found]
        hashes = await self._db.hashes([keys.round_(name, number) for number in numbers])
        rounds = [await self.record(name, ROUND.load(fields)) for fields in hashes if fields]
        return rounds, str(numbers[-1]) if len(numbers) == limit else ""

    async def record(self, name: str, round_: StoredRound) -> RoundRecord:
        """The round with who took part and what it cost."""
        counted = await self._db.hash(keys.round_bytes(name, round_.number))
        amounts = {kind: int(amount) for kind, amount in sorted(counted.items())}
        with_clients = await self.with_clients(name, round_)
        return replace(with_clients, bytes=amounts).public()

    async def with_clients(self, name: str, round_: StoredRound) -> StoredRound:
        """The round with who took part in its attempt so far."""
        place = (name, round_.number, round_.attempt)
        cohort, done, refused, late = await self._db.pipeline(
            [
                ("SMEMBERS", keys.cohort(*place)),
                ("HKEYS", keys.submitted(*place)),
                ("HKEYS", keys.refused(*place)),
                ("SMEMBERS", keys.late(*place)),
            ]
        )
        missing = {item.decode() for item in set(cohort) - {*done, *refused, *late}}
        if round_.state is RoundState.COLLECTING and missing:
            missing -= (await self._members.presence(name)).alive
        clients = Participation(
            _ids(cohort), _ids(done), _ids(late), _ids(refused), tuple(sorted(missing))
        )
        return replace(round_, clients=clients)

    async def cohort(self, name: str, round_: StoredRound) -> tuple[str, ...]:
        """The clients that are to train, by id."""
        key = keys.cohort(name, round_.number, round_.attempt)
        return _ids(await self._db.call("SMEMBERS", key))

    async def start(
        self, lease: str, run: StoredRun, adapter: StoredAdapter, first: StoredRound
    ) -> None:
        """Round 0: the adapter before any training, straight to its evaluation."""
        commit = Commit(lease).expect(keys.run(run.name), "state", run.state)
        self._adapters.put(commit, run.name, 0, adapter)
        self._write(commit, run, None, first)
        await self._db.commit(commit)

    async def open(
        self, lease: str, run: StoredRun, before: StoredRound, after: StoredRound
    ) -> None:
        """A new round, or a new attempt of one that failed."""
        commit = Commit(lease)
        last = before if before.number == after.number else None
        self._write(commit, run, last, after)
        # The round it follows must still be as it was, too.
        commit.expect(keys.round_(run.name, before.number), "version", str(before.version))
        self._runs.change(commit, run, replace(run, round=after.number))
        await self._db.commit(commit)

    async def enlist(
        self, lease: str, run: StoredRun, round_: StoredRound, cohort: list[str], deadline: float
    ) -> None:
        """Writes the cohort, once, and opens the round for its updates."""
        place = (run.name, round_.number, round_.attempt)
        commit = Commit(lease).expect(keys.run(run.name), "state", run.state)
        after = replace(
            round_,
            state=RoundState.COLLECTING,
            deadline=deadline,
            clients=Participation(selected=tuple(cohort)),
        )
        commit.add_many("SADD", keys.cohort(*place), cohort)
        self._write(commit, run, round_, after)
        await self._db.commit(commit)

    async def freeze(self, lease: str, run: StoredRun, round_: StoredRound) -> None:
        """From now on no update is accepted: what is there will be merged."""
        commit = Commit(lease).expect(keys.run(run.name), "state", run.state)
        seen = await self.with_clients(run.name, round_)
        self._write(commit, run, round_, replace(seen, state=RoundState.MERGING))
        await self._db.commit(commit)

    async def fail(
        self,
        lease: str,
        run: StoredRun,
        round_: StoredRound,
        reason: str,
        *,
        submitted: int,
        last: bool,
    ) -> None:
        """The attempt failed with `submitted` updates; the run too, if it was the last one."""
        now = self._db.clock()
        # One that was acknowledged since may be the one that was missing: then look again.
        place = (run.name, round_.number, round_.attempt)
        commit = Commit(lease).expect_size(keys.submitted(*place), submitted)
        seen = await self.with_clients(run.name, round_)
        after = replace(seen, state=RoundState.FAILED, failure=reason, finished_at=now)
        self._write(commit, run, round_, after)
        expire_updates(commit, run.name, round_, after.clients.submitted)
        failed = replace(run, state=RunState.FAILED, failure=reason, finished_at=now)
        if last:
            self._runs.change(commit, run, failed)
        else:
            commit.expect(keys.run(run.name), "state", run.state)
        await self._db.commit(commit)

    async def publish(
        self,
        lease: str,
        run: StoredRun,
        round_: StoredRound,
        adapter: StoredAdapter,
        moments: Tensors,
        after: StoredRound,
    ) -> None:
        """The merged adapter, what a server optimiser carries on, and who is to evaluate it."""
        commit = Commit(lease).expect(keys.run(run.name), "state", run.state)
        self._adapters.put(commit, run.name, round_.number, adapter)
        self._adapters.put_moments(commit, run.name, round_.number, moments)
        self._write(commit, run, round_, after)
        await self._db.commit(commit)

    async def finish(
        self,
        lease: str,
        run: StoredRun,
        changed: StoredRun,
        round_: StoredRound,
        after: StoredRound,
    ) -> None:
        """The round is done: metrics written, retention applied, updates expire."""
        commit = Commit(lease)
        counted = await self._db.hash(keys.round_bytes(run.name, round_.number))
        amounts = {kind: int(amount) for kind, amount in sorted(counted.items())}
        seen = await self.with_clients(run.name, after)
        self._write(commit, run, round_, replace(seen, bytes=amounts))
        expire_updates(commit, run.name, round_, seen.clients.submitted)
        await self._adapters.retain(commit, changed, round_.number)
        self._runs.change(commit, run, changed)
        await self._db.commit(commit)

    def _write(
        self, commit: Commit, run: StoredRun, before: StoredRound | None, after: StoredRound
    ) -> None:
        key = keys.round_(run.name, after.number)
        written = replace(after, version=before.version + 1 if before else 1)
        commit.expect(key, "version", str(before.version) if before else "")
        commit.set_fields(key, ROUND.dump(written))
        commit.do("ZADD", keys.rounds(run.name), after.number, after.number)
        commit.tell(run.name, "round", ROUND.public(written))


def _ids(found: set[bytes] | list[bytes]) -> tuple[str, ...]:
    return tuple(sorted(item.decode() for item in found))
