"""Rounds in Redis. Every transition is compare-and-set and fenced by the leader's lease.

Each leader's method raises Raced where the run or the round is no longer what it was given, and
LeaseLost where the lease is gone; nothing is written then.
"""

from __future__ import annotations

from collections.abc import Sequence
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
)
from fednano.coordinator.store_adapters import AdapterStore, Made
from fednano.coordinator.store_members import MemberStore
from fednano.coordinator.store_runs import RunStore, checked_cursor


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
            _ids(cohort), _senders(done), _ids(late), _ids(refused), tuple(sorted(missing))
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
        self,
        lease: str,
        run: StoredRun,
        round_: StoredRound,
        cohort: list[str],
        wanted: int,
        deadline: float,
    ) -> None:
        """Writes the cohort, once, and opens the round for so many of its updates."""
        place = (run.name, round_.number, round_.attempt)
        commit = Commit(lease).expect(keys.run(run.name), "state", run.state)
        after = replace(
            round_,
            state=RoundState.COLLECTING,
            deadline=deadline,
            clients=Participation(selected=tuple(cohort)),
            wanted=wanted,
        )
        commit.add_many("SADD", keys.cohort(*place), cohort)
        self._write(commit, run, round_, after)
        await self._db.commit(commit)

    async def freeze(self, lease: str, run: StoredRun, round_: StoredRound) -> None:
        """From now on no update is accepted: what is there will be merged."""
        commit = Commit(lease).expect(keys.run(run.name), "state", run.state)
        seen = await self.with_clients(run.name, round_)
        late = _still_at_work(seen)
        if late:
            key = keys.late(run.name, round_.number, round_.attempt)
            commit.add_many("SADD", key, late)
            clients = replace(seen.clients, late=tuple(sorted({*seen.clients.late, *late})))
            seen = replace(seen, clients=clients)
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
        await self._runs.expire_updates(commit, run.name, round_.number, round_.attempt)
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
        made: Sequence[Made],
        after: StoredRound,
    ) -> None:
        """What the strategy that leads made of the updates, what its shadows did, and who is to
        evaluate it."""
        leader, *shadows = made
        commit = Commit(lease).expect(keys.run(run.name), "state", run.state)
        self._adapters.put(commit, run.name, round_.number, leader.adapter)
        self._adapters.put_moments(commit, run.name, round_.number, leader.moments, after.handed)
        if shadows:
            self._adapters.put_shadows(commit, run.name, round_.number, shadows)
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
        await self._runs.expire_updates(commit, run.name, round_.number, round_.attempt)
        await self._adapters.retain(commit, changed, round_.number)
        if after.shadows:
            self._adapters.drop_shadows(commit, run.name)
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


def _still_at_work(round_: StoredRound) -> list[str]:
    """Who was overtaken by the updates that a round wanted: too late, but neither lost nor refused.
    Nobody, where it is the deadline that ends it."""
    clients = round_.clients
    if not 0 < round_.wanted <= len(clients.submitted):
        return []
    others = {*clients.submitted, *clients.late, *clients.refused, *clients.lost}
    return sorted(set(clients.selected) - others)


def _senders(parts: list[bytes]) -> tuple[str, ...]:
    """Clients of updates; one may have two that are part of an asynchronous round."""
    return tuple(sorted({item.decode().partition("@")[0] for item in parts}))


def _ids(found: set[bytes] | list[bytes]) -> tuple[str, ...]:
    return tuple(sorted(item.decode() for item in found))
