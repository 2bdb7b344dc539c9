"""Asynchronous runs: which round an update becomes part of, and what may start next.

A task is named by the round that would merge it if it came at once: (round, attempt), from the
adapter of the round before. By the time its update comes the run may be further on. It becomes part
of the round that is being filled then, and its staleness is the number of merges in between. Each
task is answered once by each client, so an update that is sent again is known as such however far
the run has gone.

While a round is merged and evaluated the next one is being filled already.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import NamedTuple

from fednano.coordinator.fields import StoredRound, StoredRun
from fednano.coordinator.records import RoundState, RunState, Tensors
from fednano.coordinator.store import Store
from fednano.coordinator.store_members import Spent
from fednano.coordinator.store_parts import Filling
from fednano.coordinator.store_standing import Standing
from fednano.coordinator.store_updates import Claim, Sender, UpdateMeta
from fednano.coordinator.submission import Refused
from fednano.wire.errors import Busy

_TRIES = 20


class Start(NamedTuple):
    """A task: its round and attempt, and the digest of the adapter that it starts from."""

    number: int
    attempt: int
    base: str


def filled(round_: StoredRound) -> tuple[int, int]:
    """Round and attempt that an update becomes part of which comes now."""
    if round_.state in (RoundState.OPEN, RoundState.COLLECTING):
        return round_.number, round_.attempt
    if round_.state is RoundState.FAILED:
        return round_.number, round_.attempt + 1
    return round_.number + 1, 1


def newest(run: StoredRun, round_: StoredRound) -> Start | None:
    """What a client may start now; nothing while a better adapter is about to come."""
    if round_.state in (RoundState.OPEN, RoundState.COLLECTING):
        return Start(round_.number, round_.attempt, round_.base)
    later = round_.state in (RoundState.EVALUATING, RoundState.DONE)
    if not later or run.state is RunState.PAUSED or round_.number >= run.config.rounds:
        return None
    return Start(round_.number + 1, 1, round_.adapter_digest)


def staleness(round_: StoredRound, number: int) -> int:
    """Of an update that started as one of round `number`, if it came now."""
    return filled(round_)[0] - number


def too_stale(run: StoredRun, round_: StoredRound, number: int) -> str:
    """Why an update that started as one of round `number` comes too late; "" if it doesn't."""
    how, stale = run.config.asynchronous, staleness(round_, number)
    if how is None or stale <= how.max_staleness:
        return ""
    return f"it started {stale} merges ago; the run takes {how.max_staleness} at most"


async def too_late(store: Store, standing: Standing, sender: Sender) -> str:
    """Why nothing of the sender's task can be used any more; "" if something can."""
    run, round_, number = standing.run, standing.round, sender.round
    if run.state.ended or round_ is None or filled(round_)[0] > run.config.rounds:
        return "the run is over"
    if number <= round_.number:
        task = await store.round_store.get(run.name, number)
        failed = task is not None and task.state is RoundState.FAILED
        if task is None or failed or task.attempt != sender.attempt:
            return "that attempt of the round has failed"
    return too_stale(run, round_, number)


async def started(store: Store, standing: Standing, sender: Sender) -> str:
    """Digest of the adapter that the sender's task started from. Raises Refused where there was no
    such task, or where nothing is wanted of it any more: the store says late or duplicate then."""
    run, round_, number = standing.run.name, standing.round, sender.round
    if sender.client not in standing.members or round_ is None:
        raise Refused("this client is not a member that trains")
    if reason := await too_late(store, standing, sender):
        raise Refused(reason)
    ahead = round_.adapter_digest and (number, sender.attempt) == filled(round_)
    if not 1 <= number <= round_.number and not ahead:
        raise Refused(f"header.round: expected 1 to {round_.number}, got {number}")
    if await store.parts.has_answered(run, number, sender.attempt, sender.client):
        raise Refused("it was accepted before")
    return await store.adapters.digest_of_round(run, number - 1)


def added(tensors: Tensors, base: Tensors) -> Tensors:
    """What training added to its adapter."""
    return {name: tensor - base[name] for name, tensor in tensors.items()}


async def claim(
    store: Store, sender: Sender, delta: Tensors, meta: UpdateMeta, spent: Spent, refusal: str = ""
) -> Claim:
    """Makes an update part of the round that is being filled. Raises SessionEnded."""
    for _ in range(_TRIES):
        standing = await store.standings.current(sender.run)
        round_ = standing.round
        if round_ is None or sender.client not in standing.members:
            return Claim("stranger", False)
        last = round_.number + 1 if standing.run.state.ended else filled(round_)[0]
        if not 1 <= sender.round <= last:
            return Claim("stranger", False)  # nothing is spent on a round to come
        into = Filling(round_, *filled(round_), await too_late(store, standing, sender))
        aged = replace(meta, staleness=max(0, staleness(round_, sender.round)))
        found = await store.parts.claim(sender, into, delta, aged, spent, refusal)
        if found.result != "moved":
            return found
        await asyncio.sleep(0)
    raise Busy("the run changes too fast; try again")
