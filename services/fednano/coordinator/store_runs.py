"""Runs in Redis: created once by name, listed, commanded, moved from state to state."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace

from fednano.coordinator import keys
from fednano.coordinator.database import Commit, Database, Raced
from fednano.coordinator.fields import ROUND, RUN, StoredRound, StoredRun
from fednano.coordinator.records import Event, MemoryUse, RoundState, RunRecord, RunState
from fednano.wire.errors import Busy, Conflict, InvalidRequest, NotFound, Problem
from fednano.wire.run_config import RunConfig

log = logging.getLogger(__name__)

UPDATE_SECONDS = 300  # how long updates outlive their round
_EVENT_ID = re.compile(r"([0-9]{1,20})(?:-([0-9]{1,20}))?")
_EVENT_ID_END = 1 << 63  # Redis counts to 64 bits, and needs room for "after that one"
_TRIES = 20
_MOVES = ("state", "round", "started_at")  # whoever waits for a task wants to know
_FULL = 0.8  # of maxmemory: no new runs beyond
_OPEN_ROUNDS = (RoundState.OPEN, RoundState.COLLECTING, RoundState.MERGING, RoundState.EVALUATING)


class RunStore:
    """Part of the Store."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def get(self, name: str) -> StoredRun:
        """Raises NotFound."""
        found = await self._db.hash(keys.run(checked_name(name)))
        if not found:
            raise NotFound(f"no run is named {name!r}")
        return RUN.load(found)

    async def create(self, config: RunConfig, by: str) -> tuple[RunRecord, bool]:
        """The run and whether it is new. Raises Conflict naming what differs from the one there."""
        existing = await self._db.hash(keys.run(config.name))
        if existing:
            return same_run(RUN.load(existing), config), False
        await self._check_memory()
        run = StoredRun(config.name, config, RunState.CREATED, self._db.clock(), by, version=1)
        order = await self._db.call("INCR", keys.RUN_COUNT)
        commit = (
            Commit()
            .expect(keys.run(run.name), "version", "")
            .set_fields(keys.run(run.name), RUN.dump(run))
            .do("ZADD", keys.RUNS, order, run.name)
            .do("SADD", keys.ACTIVE, run.name)
            .tell(run.name, "run", RUN.public(run))
            .do("PUBLISH", keys.ACTIVE_BELL, "created")
        )
        try:
            await self._db.commit(commit)
        except Raced:
            return same_run(await self.get(run.name), config), False
        return run.public(), True

    async def page(self, cursor: str, limit: int) -> tuple[list[RunRecord], str]:
        """Newest first, and the cursor of the next page or ""."""
        top = f"({checked_cursor(cursor)}" if cursor else "+inf"
        command = ("ZREVRANGEBYSCORE", keys.RUNS, top, "-inf", "WITHSCORES", "LIMIT", 0, limit)
        found = await self._db.call(*command)
        pairs = _scored(found)
        hashes = await self._db.hashes([keys.run(name) for name, _ in pairs])
        runs = [run.public() for fields in hashes if fields and (run := _readable(fields))]
        return runs, str(pairs[-1][1]) if len(pairs) == limit else ""

    async def active(self) -> list[StoredRun]:
        """Runs that have not ended, oldest first."""
        names = [name.decode() for name in await self._db.call("SMEMBERS", keys.ACTIVE)]
        hashes = await self._db.hashes([keys.run(name) for name in names])
        runs = [run for fields in hashes if fields and (run := _readable(fields))]
        return sorted(runs, key=lambda run: (run.created_at, run.name))

    async def count_states(self) -> dict[RunState, int]:
        """How many runs are in each state."""
        names = [name.decode() for name in await self._db.call("ZRANGE", keys.RUNS, 0, -1)]
        found = await self._db.pipeline([("HGET", keys.run(name), "state") for name in names])
        states = [RunState(state.decode()) for state in found if state]
        return {state: states.count(state) for state in RunState}

    async def command(self, name: str, command: str) -> RunRecord:
        """pause, resume or stop. Raises Conflict where the run's state forbids it."""
        changes: dict[str, Callable[[StoredRun], StoredRun]] = {
            "pause": _paused,
            "resume": self._resumed,
            "stop": self._stopped,
        }
        if command not in changes:
            raise InvalidRequest.of("command", "pause, resume or stop", repr(command))
        for _ in range(_TRIES):
            before = await self.get(name)
            after = changes[command](before)
            if after is before:
                return before.public()
            try:
                return (await self._move(before, after)).public()
            except Raced:
                continue
        raise Busy(f"run {name!r} changes too fast; try again")

    async def _move(self, before: StoredRun, after: StoredRun) -> StoredRun:
        commit = Commit()
        written = self.change(commit, before, after)
        if after.state is RunState.STOPPED:
            await self._close_round(commit, before, "the run was stopped")
        await self._db.commit(commit)
        return written

    async def give_up(self, lease: str, before: StoredRun, after: StoredRun) -> None:
        """The leader ends a run that it can't advance. Raises Raced or LeaseLost."""
        commit = Commit(lease)
        self.change(commit, before, after)
        await self._close_round(commit, before, after.failure)
        await self._db.commit(commit)

    async def _close_round(self, commit: Commit, run: StoredRun, reason: str) -> None:
        """A run that is over leaves no round open and keeps no updates."""
        key = keys.round_(run.name, run.round)
        try:
            round_ = ROUND.load(await self._db.hash(key))
        except ValueError:  # there is none, or it is damaged, perhaps why the run is given up
            return
        if run.config.asynchronous is not None:
            await self._expire_next(commit, run.name, round_)
        if round_.state not in _OPEN_ROUNDS:
            return
        await self.expire_updates(commit, run.name, round_.number, round_.attempt)
        closed = replace(
            round_,
            state=RoundState.FAILED,
            failure=reason,
            finished_at=self._db.clock(),
            version=round_.version + 1,
        )
        commit.expect(key, "version", str(round_.version))
        commit.set_fields(key, ROUND.dump(closed)).tell(run.name, "round", ROUND.public(closed))

    async def _expire_next(self, commit: Commit, name: str, round_: StoredRound) -> None:
        """Of an asynchronous run, those that came for what would have been opened next."""
        for place in ((round_.number, round_.attempt + 1), (round_.number + 1, 1)):
            await self.expire_updates(commit, name, *place)

    async def expire_updates(self, commit: Commit, name: str, number: int, attempt: int) -> None:
        """Adds to `commit` that the updates of the round's attempt end soon, and that none has been
        added to them."""
        key = keys.submitted(name, number, attempt)
        parts = [item.decode() for item in await self._db.call("HKEYS", key)]
        commit.expect_size(key, len(parts))
        for part in parts:
            commit.do("EXPIRE", keys.update(name, number, attempt, part), UPDATE_SECONDS)

    def change(self, commit: Commit, before: StoredRun, after: StoredRun) -> StoredRun:
        """Adds to `commit` that the run becomes `after`, if it still is `before`."""
        written = replace(after, version=before.version + 1)
        key = keys.run(before.name)
        old, new = RUN.dump(before), RUN.dump(written)
        commit.expect(key, "version", str(before.version))
        commit.set_fields(key, {name: text for name, text in new.items() if old[name] != text})
        moved = any(getattr(before, name) != getattr(after, name) for name in _MOVES)
        commit.tell(before.name, "run", RUN.public(written), "run" if moved else keys.SEATS)
        if written.state.ended:
            commit.do("SREM", keys.ACTIVE, before.name)
            commit.do("DEL", *keys.passing(before.name, len(before.config.shadows)))
            commit.do("PUBLISH", keys.ACTIVE_BELL, "ended")
        return written

    async def advance(self, lease: str, before: StoredRun, after: StoredRun) -> StoredRun:
        """The leader's change of a run. Raises Raced or LeaseLost."""
        commit = Commit(lease)
        written = self.change(commit, before, after)
        await self._db.commit(commit)
        return written

    def _resumed(self, run: StoredRun) -> StoredRun:
        if run.state is not RunState.PAUSED:
            if run.state.ended:
                raise Conflict(f"run {run.name!r} is {run.state}, so it can't be resumed")
            return run
        enrol_until = run.enrol_until
        if run.resume_to == RunState.ENROLLING:
            enrol_until = self._db.clock() + run.config.enrol_seconds
        return replace(run, state=RunState(run.resume_to), resume_to="", enrol_until=enrol_until)

    def _stopped(self, run: StoredRun) -> StoredRun:
        if run.state is RunState.STOPPED:
            return run
        if run.state.ended:
            raise Conflict(f"run {run.name!r} is {run.state}, so it can't be stopped")
        return replace(run, state=RunState.STOPPED, finished_at=self._db.clock())

    async def events(self, name: str, after: str, block_ms: int, limit: int) -> list[Event]:
        """Events after an id; waits for one up to `block_ms`."""
        await self.get(name)
        now = asyncio.get_running_loop().time
        deadline = now() + block_ms / 1000
        with self._db.bell(name) as bell:
            while True:
                found = await self._db.call(
                    "XRANGE", keys.events(name), f"({checked_event_id(after)}", "+", "COUNT", limit
                )
                left = deadline - now()
                if found or left <= 0:
                    return [_event(item) for item in found]
                await bell.wait(left)

    async def last_event_id(self, name: str) -> str:
        await self.get(name)
        found = await self._db.call("XREVRANGE", keys.events(name), "+", "-", "COUNT", 1)
        return _event(found[0]).id if found else "0-0"

    async def memory(self) -> MemoryUse:
        info = await self._db.call("INFO", "memory")
        return MemoryUse(int(info["used_memory"]), int(info.get("maxmemory", 0)))

    async def _check_memory(self) -> None:
        use = await self.memory()
        if use.max_bytes and use.used_bytes >= _FULL * use.max_bytes:
            share = f"{use.used_bytes / use.max_bytes:.0%} of {use.max_bytes} bytes"
            raise Busy(
                f"no new run: Redis uses {share}",
                Problem("redis.used_memory", f"below {_FULL:.0%} of maxmemory", share),
            )


def _readable(fields: dict[str, str]) -> StoredRun | None:
    """None for a damaged record: the other runs go on."""
    try:
        return RUN.load(fields)
    except ValueError:
        log.warning("a run's record is damaged", extra={"run": fields.get("name")})
        return None


def checked_name(name: str) -> str:
    """Raises NotFound for what can't be a run's name, so that it never becomes part of a key."""
    if not name or ":" in name or len(name) > 63:
        raise NotFound(f"no run is named {name!r}")
    return name


def checked_cursor(cursor: str) -> int:
    if not cursor.isdecimal():
        raise InvalidRequest.of("cursor", "a cursor from an earlier page", repr(cursor))
    return int(cursor)


def checked_event_id(event: str) -> str:
    """Raises InvalidRequest for what Redis would not take for an id."""
    found = _EVENT_ID.fullmatch(event)
    if found is None or any(int(part) >= _EVENT_ID_END for part in found.groups("0")):
        raise InvalidRequest.of("after", "an event id, <milliseconds>-<number>", repr(event))
    return event


def same_run(existing: StoredRun, config: RunConfig) -> RunRecord:
    """The existing run, if it was asked for with the same configuration."""
    old, new = _flat(existing.config.model_dump(mode="json")), _flat(config.model_dump(mode="json"))
    problems = [
        Problem(field, json.dumps(old.get(field)), json.dumps(new.get(field)))
        for field in sorted(old.keys() | new.keys())
        if old.get(field) != new.get(field)
    ]
    if problems:
        fields = "; ".join(map(str, problems))
        raise Conflict(f"a run named {config.name!r} exists with another {fields}", *problems)
    return existing.public()


def _flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _paused(run: StoredRun) -> StoredRun:
    if run.state is RunState.PAUSED:
        return run
    if run.state.ended:
        raise Conflict(f"run {run.name!r} is {run.state}, so it can't be paused")
    return replace(run, state=RunState.PAUSED, resume_to=run.state.value)


def _scored(found: list[object]) -> list[tuple[str, int]]:
    """WITHSCORES, whether redis-py has paired it or not."""
    if found and isinstance(found[0], (tuple, list)):
        return [(item[0].decode(), int(item[1])) for item in found]  # type: ignore[index]
    pairs = zip(found[::2], found[1::2], strict=True)
    return [(name.decode(), int(score)) for name, score in pairs]  # type: ignore[attr-defined,call-overload]


def _event(item: tuple[bytes, dict[bytes, bytes]]) -> Event:
    identity, values = item
    return Event(identity.decode(), values[b"kind"].decode(), json.loads(values[b"data"]))
