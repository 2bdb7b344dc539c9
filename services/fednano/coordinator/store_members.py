"""Members of a run in Redis: who joined, under which session, and when each was last heard."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fednano.coordinator import keys
from fednano.coordinator.database import Commit, Database, text_pairs
from fednano.coordinator.fields import CLIENT, StoredClient, StoredRun
from fednano.coordinator.records import ClientRecord
from fednano.coordinator.store_runs import RunStore
from fednano.coordinator.store_standing import Standing
from fednano.wire.errors import SessionEnded

_GONE = "this session has ended: another process joined under the same client id, or nobody did"
_ENDED, _MOVED = 0, 1  # of the script ATTEND
_COUNTED = 2  # of the script BEAT


@dataclass(frozen=True)
class Spent:
    """What a client spent: bytes by kind, seconds."""

    sent_bytes: Mapping[str, int] = field(default_factory=dict)
    received_bytes: Mapping[str, int] = field(default_factory=dict)
    client_seconds: float = 0.0
    server_seconds: float = 0.0

    def pairs(self) -> list[str | int]:
        """sent:<kind> or received:<kind>, bytes."""
        both = [*_named("sent", self.sent_bytes), *_named("received", self.received_bytes)]
        return [part for pair in both for part in pair]

    def arguments(self) -> list[str | int]:
        """For a script: seconds, and bytes by kind."""
        return [repr(self.client_seconds), repr(self.server_seconds), *self.pairs()]

    def __bool__(self) -> bool:
        return bool(self.pairs() or self.client_seconds or self.server_seconds)


@dataclass(frozen=True)
class Presence:
    """Who was heard lately; not `settled` while signs of life may have been missed."""

    alive: frozenset[str]
    settled: bool


@dataclass(frozen=True)
class Glance:
    """The little of a member that is looked at for all of them at once."""

    id: str
    role: str
    told: str  # the state that was last told of it
    last_seen: float
    joined_at: float
    session: str
    alive: bool


@dataclass(frozen=True)
class Visitor:
    """Who asks for a task, as the call's header and token say."""

    run: str
    client: str
    session: str
    token_id: str


@dataclass(frozen=True)
class Offer:
    """A task for whoever of `role` ("" for both) has no field in the hash `done`."""

    label: str = ""  # "" offers nothing
    role: str = ""
    done: str = ""


@dataclass(frozen=True)
class Seat:
    """A member as it asks for a task; `task` is the label of the offer where that is for it."""

    client: str
    role: str
    shard: int | None
    task: str


class MemberStore:
    """Part of the Store."""

    def __init__(self, database: Database, runs: RunStore, client_seconds: float) -> None:
        self._db = database
        self._runs = runs
        self.client_seconds = client_seconds

    async def all(self, name: str) -> list[StoredClient]:
        """By client id."""
        found = await self._db.call("SMEMBERS", keys.clients(name))
        ids = sorted(item.decode() for item in found)
        hashes = await self._db.hashes([keys.client(name, client) for client in ids])
        return [self._seen(CLIENT.load(fields)) for fields in hashes if fields]

    async def glance(self, name: str) -> list[Glance]:
        """All of them, by id: one command, and far cheaper than `all`."""
        wanted = ("role", "state", "last_seen", "joined_at", "session")
        arguments = [keys.client_prefix(name), *wanted]
        found = await self._db.script("GLANCE", [keys.clients(name)], arguments)
        since = self._db.clock() - self.client_seconds
        return sorted((_glance(item, since) for item in found), key=lambda member: member.id)

    async def get(self, name: str, client: str) -> StoredClient | None:
        found = text_pairs(await self._db.small("HGETALL", keys.client(name, client)))
        return self._seen(CLIENT.load(found)) if found else None

    async def holders(self, client: str) -> set[tuple[str, str]]:
        """Id and name of every token under which this client id is a member of some run."""
        runs = [name.decode() for name in await self._db.call("ZRANGE", keys.RUNS, 0, -1)]
        found = await self._db.pipeline(
            [("HMGET", keys.client(run, client), "token_id", "token_name") for run in runs]
        )
        return {(token.decode(), name.decode()) for token, name in found if token is not None}

    def _seen(self, client: StoredClient) -> StoredClient:
        alive = client.last_seen >= self._db.clock() - self.client_seconds
        return replace(client, state="alive" if alive else "lost")

    @property
    def settled(self) -> bool:
        """Whether everybody who lives has had the time to say so."""
        return self._db.clock() - self._db.reachable_since >= self.client_seconds

    async def presence(self, name: str) -> Presence:
        found = await self.glance(name)
        return Presence(frozenset(member.id for member in found if member.alive), self.settled)

    async def current(self, name: str, client: str, session: str, token_id: str) -> StoredClient:
        """The client, if this session and token are its present ones. Raises SessionEnded."""
        found = await self.get(name, client)
        if found is None or found.session != session or found.token_id != token_id:
            raise SessionEnded(_GONE)
        return found

    async def admit(
        self,
        before: StoredRun,
        after: StoredRun,
        client: StoredClient,
        replaced: StoredClient | None = None,
    ) -> StoredClient:
        """Writes a member under a new session, and the run where joining changes it.

        `replaced` loses its shard and its session. Raises Raced where something has changed.
        """
        now = self._db.clock()
        member = replace(client, session=uuid.uuid4().hex, last_seen=now, state="alive", task="")
        commit = Commit()
        if after is before:
            commit.expect(keys.run(before.name), "version", str(before.version))
        else:
            self._runs.change(commit, before, after)
        if replaced is not None:
            self._unseat(commit, before.name, replaced)
        commit.do("SADD", keys.clients(before.name), member.id)
        commit.set_fields(keys.client(before.name, member.id), CLIENT.dump(member))
        commit.tell(before.name, "client", CLIENT.public(member))
        commit.ring(before.name, keys.session(member.id))  # its last process must notice
        await self._db.commit(commit)
        return member

    def _unseat(self, commit: Commit, name: str, client: StoredClient) -> None:
        key = keys.client(name, client.id)
        commit.expect(key, "session", client.session)
        commit.expect(key, "last_seen", json.dumps(client.last_seen))
        gone = replace(client, shard=None, session=f"ended-{client.session}", doing="replaced")
        commit.set_fields(key, CLIENT.dump(gone)).tell(name, "client", CLIENT.public(gone))
        commit.ring(name, keys.session(client.id))

    async def close_enrolment(self, lease: str, before: StoredRun, after: StoredRun) -> StoredRun:
        """Fixes the members and deals the shards: the index of a member among `after.members`."""
        commit = Commit(lease)
        written = self._runs.change(commit, before, after)
        for shard, client in enumerate(after.members):
            commit.do("HSET", keys.client(before.name, client), "shard", json.dumps(shard))
        await self._db.commit(commit)
        return written

    async def mark_lost(self, lease: str, name: str) -> None:
        """Tells once of every member that was lost. Raises LeaseLost."""
        found = await self.glance(name)
        silent = [member.id for member in found if not member.alive and member.told != "lost"]
        if not silent or not self.settled:
            return
        for fields in await self._db.hashes([keys.client(name, client) for client in silent]):
            stored = CLIENT.load(fields)
            if self._seen(stored).state == "alive":
                continue
            key = keys.client(name, stored.id)
            commit = Commit(lease).expect(key, "last_seen", fields["last_seen"])
            commit.do("HSET", key, "state", "lost")
            commit.tell(name, "client", CLIENT.public(replace(stored, state="lost")))
            await self._db.commit(commit)

    async def attend(self, visitor: Visitor, standing: Standing, offer: Offer) -> Seat | None:
        """Hears a client out that asks for a task; None where the run stands otherwise by now.

        Raises SessionEnded.
        """
        run, client = visitor.run, visitor.client
        names = [keys.client(run, client), offer.done]
        who = [client, visitor.session, visitor.token_id, json.dumps(self._db.clock())]
        guards = standing.guards
        arguments = [*who, offer.label, offer.role, len(guards) // 3, *guards]
        verdict, *rest = await self._db.small_script("ATTEND", names, arguments)
        if verdict == _ENDED:
            raise SessionEnded(_GONE)
        if verdict == _MOVED:
            return None
        label, role, shard = (item.decode() for item in rest)
        return Seat(client, role, json.loads(shard), label)

    async def beat(
        self, name: str, client: StoredClient, number: int, spent: Spent, request: str = ""
    ) -> bool:
        """Writes what a heartbeat told (`client` carries it) and counts what was spent on the round
        of that number: whether it was, which one `request` is only once. Raises SessionEnded."""
        now = self._db.clock()
        told = replace(client, last_seen=now, state="alive")
        member = keys.ledger_member(number, client.id)
        ledger = keys.ledger(name, number, client.id)
        names = [keys.client(name, client.id), keys.events(name), *ledger]
        arguments = [
            client.session,
            json.dumps(now),
            json.dumps(client.progress),
            client.doing,
            client.token_expires_ms,
            keys.bell(name),
            CLIENT.public(told),
            member if spent else "",
            *(f"heartbeat/{client.id}", request),
            *spent.arguments(),
        ]
        answer = await self._db.script("BEAT", names, arguments)
        if not answer:
            raise SessionEnded(_GONE)
        return bool(answer == _COUNTED)

    async def records(self, name: str) -> list[ClientRecord]:
        """After a run has ended nobody is lost: who isn't heard any more has left."""
        run = await self._runs.get(name)
        found = [client.public() for client in await self.all(name)]
        if not run.state.ended:
            return found
        return [replace(c, state="left") if c.state == "lost" else c for c in found]


def _glance(found: list[bytes], since: float) -> Glance:
    client, role, told, last_seen, joined_at, session = (item.decode() for item in found)
    seen = float(last_seen)
    return Glance(client, role, told, seen, float(joined_at), session, seen >= since)


def _named(direction: str, amounts: Mapping[str, int]) -> list[tuple[str, int]]:
    return [(f"{direction}:{kind}", amount) for kind, amount in sorted(amounts.items())]
