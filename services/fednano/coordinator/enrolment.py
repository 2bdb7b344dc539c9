"""Joining: which run wants a client, and on which seat.

A run has as many seats as it has members. Whoever has one may come back to it under a new session;
a newcomer gets a free one while enrolment is open, later one whose holder was lost, or waits. With
`late_joiners` a run that has begun has a seat for everybody, and none changes its holder.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from fednano.coordinator.database import Raced
from fednano.coordinator.fields import StoredClient, StoredRun
from fednano.coordinator.records import RunState
from fednano.coordinator.store import Store
from fednano.coordinator.store_tokens import BOOTSTRAP
from fednano.wire.errors import (
    Busy,
    Conflict,
    FedNanoError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    Problem,
    WrongModel,
)
from fednano.wire.participation import MOST_CLIENTS
from fednano.wire.placements import LACKING, Shapes, difference, exchanged, total, trained_by
from fednano.wire.sessions import Identity

_TRIES = 50


@dataclass(frozen=True)
class Applicant:
    """Who wants to join."""

    client: str
    role: str  # trainer or evaluator
    samples: int
    fingerprint: str
    hidden_size: int
    version: str
    token: Identity
    weights: Shapes = ()  # that it could train


@dataclass(frozen=True)
class Admission:
    run: StoredRun
    member: StoredClient


class Enrolment:
    """Admits clients, one after the other within this process."""

    def __init__(self, store: Store, limit: int = 1 << 30) -> None:
        """`limit` is the bytes that an update may have."""
        self._store = store
        self._limit = limit
        self._lock = asyncio.Lock()

    async def join(self, run: str, applicant: Applicant) -> Admission | str:
        """The admission, or why to wait. `run` may be empty: whichever wants the client.

        Raises WrongModel, Conflict, PermissionDenied.
        """
        async with self._lock:
            for _ in range(_TRIES):
                try:
                    return await self._join(run, applicant)
                except Raced:
                    continue
        raise Busy("the run changes too fast; try again")

    async def _join(self, name: str, applicant: Applicant) -> Admission | str:
        if name:
            try:
                return await self._enter(await self._store.run_store.get(name), applicant)
            except NotFound:
                return f"no run is named {name!r} yet"
        refusal: FedNanoError | None = None
        reason = "no run wants clients now"
        for run in await self._candidates(applicant):
            try:
                outcome = await self._enter(run, applicant)
            except (WrongModel, Conflict, PermissionDenied) as error:
                refusal = refusal or error
                continue
            if isinstance(outcome, Admission):
                return outcome
            reason = outcome
        if refusal is not None:
            raise refusal
        return reason

    async def _candidates(self, applicant: Applicant) -> list[StoredRun]:
        """Active runs, those where the client has a seat first; no second evaluator by itself."""
        mine, others = [], []
        for run in await self._store.run_store.active():
            if await self._store.members.get(run.name, applicant.client) is not None:
                mine.append(run)
            elif applicant.role == "trainer" or not await self._has_evaluator(run):
                others.append(run)
        return mine + others

    async def _has_evaluator(self, run: StoredRun) -> bool:
        members = await self._store.members.glance(run.name)
        return any(member.role == "evaluator" and member.alive for member in members)

    async def _enter(self, run: StoredRun, applicant: Applicant) -> Admission | str:
        known = await self._store.members.get(run.name, applicant.client)
        if known is not None:
            if known.role != applicant.role:
                raise Conflict(f"client {known.id!r} is a member as {known.role}")
            await self._check_owner(known.id, known.token_id, known.token_name, applicant.token)
        weights = trained_by(run.config.placement, applicant.weights)
        if run.config.placement != "nano-adapters" and not weights and not run.state.ended:
            return f"run {run.name!r} {LACKING[run.config.placement]}"
        model = self._with_weights(self._with_model(run, applicant), weights)
        if known is not None and (known.role == "evaluator" or known.id in run.members):
            return await self._admit(run, model, applicant, known.shard, known=known)
        if run.state.ended:
            raise Conflict(f"run {run.name!r} is {run.state}")
        if applicant.role == "evaluator":
            return await self._admit(run, model, applicant, None)
        if run.state is RunState.ENROLLING and len(run.members) < run.config.clients:
            members = tuple(sorted({*run.members, applicant.client}))
            return await self._admit(run, replace(model, members=members), applicant, None)
        if run.config.late_joiners and run.started_at is not None:
            return await self._add(run, model, applicant)
        return await self._take_over(run, model, applicant)

    async def _add(self, run: StoredRun, model: StoredRun, applicant: Applicant) -> Admission | str:
        """A member more, with the index after those there were: it takes part from the next cohort
        on."""
        if not applicant.samples:
            return f"run {run.name!r} takes clients with data of their own: give --data FILE"
        if len(run.members) >= MOST_CLIENTS:
            return f"run {run.name!r} has {MOST_CLIENTS} clients, and room for no more"
        index = len(run.members)
        after = replace(model, members=tuple(sorted({*run.members, applicant.client})))
        return await self._admit(run, after, applicant, index)

    async def _take_over(
        self, run: StoredRun, model: StoredRun, applicant: Applicant
    ) -> Admission | str:
        """The seat and shard of a member that was lost."""
        if run.state in (RunState.CREATED, RunState.PAUSED) and run.started_at is None:
            return f"run {run.name!r} is {run.state}: enrolment is not open"
        lost = [
            member
            for member in await self._store.members.all(run.name)
            if member.id in run.members and member.state == "lost"
        ]
        if not lost or not self._store.members.settled:
            return f"run {run.name!r} has all its {len(run.members)} clients"
        old = lost[0]
        members = tuple(applicant.client if name == old.id else name for name in run.members)
        after = replace(model, members=members)
        return await self._admit(run, after, applicant, old.shard, replaced=old)

    async def _admit(
        self,
        before: StoredRun,
        after: StoredRun,
        applicant: Applicant,
        shard: int | None,
        known: StoredClient | None = None,
        replaced: StoredClient | None = None,
    ) -> Admission:
        now = self._store.database.clock()
        client = StoredClient(
            id=applicant.client,
            role=applicant.role,
            state="alive",
            doing="joined",
            progress=0.0,
            last_seen=now,
            samples=applicant.samples,
            shard=shard,
            joined_at=now if known is None else known.joined_at,
            joined_round=before.round if known is None else known.joined_round,
            version=applicant.version,
            token_id=applicant.token.token_id,
            token_name=applicant.token.name,
        )
        return Admission(after, await self._store.members.admit(before, after, client, replaced))

    async def check_login(self, client: str, token: Identity) -> None:
        """Outside a run a client may bear no name that is another token's in any run.

        Raises PermissionDenied.
        """
        if token.role == "admin":
            return
        for token_id, name in await self._store.members.holders(client):
            await self._check_owner(client, token_id, name, token)

    async def _check_owner(self, client: str, token_id: str, name: str, token: Identity) -> None:
        """A client id stays with its token, with one of the same name, or with a revoked one's heir."""
        if token.role == "admin" or name == token.name:
            return
        old = await self._store.token_store.get(token_id)
        revoked = old is None or old.revoked
        if token_id == BOOTSTRAP.token_id or not revoked:
            raise PermissionDenied(f"client id {client!r} belongs to another token")

    def _with_model(self, run: StoredRun, applicant: Applicant) -> StoredRun:
        """The run with its model fixed by the first member. Raises WrongModel for another one."""
        wanted = run.fingerprint or run.config.fingerprint or applicant.fingerprint
        hidden = run.hidden_size or applicant.hidden_size
        problems = [
            Problem(field, str(expected), str(got))
            for field, expected, got in (
                ("fingerprint", wanted, applicant.fingerprint),
                ("hidden_size", hidden, applicant.hidden_size),
            )
            if expected != got
        ]
        if problems:
            detail = "; ".join(map(str, problems))
            raise WrongModel(f"run {run.name!r} tunes another model: {detail}", *problems)
        if run.fingerprint == wanted and run.hidden_size == hidden:
            return run
        return replace(run, fingerprint=wanted, hidden_size=hidden)

    def _with_weights(self, run: StoredRun, weights: Shapes) -> StoredRun:
        """The run with the weights that it trains fixed by the first member. Raises WrongModel for
        others, InvalidRequest where they are more than an update may have."""
        if run.weights == weights or run.state.ended:
            return run
        if run.weights:
            expected, got = difference(run.weights, weights) or ("", "")
            problem = Problem("weights", expected, got)
            raise WrongModel(f"run {run.name!r} trains other weights: {problem}", problem)
        size = 4 * total(exchanged(run.config.placement, weights, run.config.adapter.rank))
        if size > self._limit:
            raise InvalidRequest.of("weights", f"at most {self._limit} bytes in fp32", size)
        return replace(run, weights=weights)
