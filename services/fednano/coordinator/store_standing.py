"""Where a run stands: one look at it for everybody who waits."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property

from fednano.coordinator import keys
from fednano.coordinator.database import Database, text_pairs
from fednano.coordinator.fields import ROUND, RUN, StoredRound, StoredRun
from fednano.coordinator.records import RoundState
from fednano.coordinator.store_runs import checked_name
from fednano.wire.errors import NotFound

_RUNS = 64  # that are remembered


@dataclass(frozen=True)
class Standing:
    """A run and the round it is in, as they were at one instant."""

    run: StoredRun
    round: StoredRound | None

    @cached_property
    def members(self) -> frozenset[str]:
        return frozenset(self.run.members)

    @cached_property
    def cohort(self) -> frozenset[str]:
        """The clients whose updates are wanted now."""
        if self.round is None or self.round.state is not RoundState.COLLECTING:
            return frozenset()
        return frozenset(self.round.clients.selected)

    @cached_property
    def evaluators(self) -> frozenset[str]:
        return frozenset(self.round.evaluators if self.round else ())

    @cached_property
    def seen(self) -> tuple[str, str, str]:
        """What tells it from any later one, as Redis has it."""
        run, round_ = self.run, self.round
        version = str(round_.version) if round_ else ""
        return str(run.version), json.dumps(run.created_at), version

    @cached_property
    def guards(self) -> tuple[str, ...]:
        """(hash, field, value)*: they hold as long as what a client is told by it is right. Until
        a run starts that is its state alone, however many join."""
        key = keys.run(self.run.name)
        version, created, round_version = self.seen
        born = (key, "created_at", created)
        if self.run.started_at is None:
            return (*born, key, "state", self.run.state.value, key, "started_at", "null")
        round_key = keys.round_(self.run.name, self.run.round)
        return (*born, key, "version", version, round_key, "version", round_version)


class _Kept:
    """What is remembered of one run. `standing` is up to date while no ring has come since."""

    def __init__(self) -> None:
        self.standing: Standing | None = None
        self.rings = 0
        self.read_at = -1  # so many rings had come before it was read
        self.look: asyncio.Task[Standing] | None = None

    def ring(self) -> None:
        self.rings += 1
        self.look = None  # it may have read what was there before

    def keep(self, standing: Standing, rings: int) -> Standing:
        self.standing, self.read_at = standing, rings
        return standing


class StandingStore:
    """Part of the Store."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        database.bells.tell(self._heard)

    def _heard(self, run: str, kind: str) -> None:
        if not run and not kind:
            for kept in self._kept.values():
                kept.ring()
        elif kind in ("run", "round", keys.SEATS) and run in self._kept:
            self._kept[run].ring()

    def _of(self, name: str) -> _Kept:
        kept = self._kept.setdefault(checked_name(name), _Kept())
        self._kept.move_to_end(name)
        if len(self._kept) > _RUNS:
            self._kept.popitem(last=False)
        return kept

    async def current(self, name: str) -> Standing:
        """As it is now. Raises NotFound."""
        kept = self._of(name)
        known, rings = kept.standing, kept.rings
        arguments = [keys.round_prefix(name), *(known.seen if known else ("", "", ""))]
        found = await self._db.small_script("STANDING", [keys.run(name)], arguments)
        if found == 0:
            raise NotFound(f"no run is named {name!r}")
        if found == 1 and known is not None:
            return kept.keep(known, rings)
        run, round_ = map(text_pairs, found)
        if kept.standing is None or kept.standing.seen != _seen(run, round_):
            kept.standing = Standing(RUN.load(run), ROUND.load(round_) if round_ else None)
        return kept.keep(kept.standing, rings)

    async def shared(self, name: str) -> Standing:
        """As it was when last heard of: what is told by it must check its `guards`. However many
        ask, it is read once. Raises NotFound."""
        kept = self._of(name)
        if kept.standing is not None and kept.read_at == kept.rings:
            return kept.standing
        if kept.look is None:
            kept.look = look = asyncio.create_task(self.current(name))
            look.add_done_callback(lambda task: _looked(kept, task))
        return await asyncio.shield(kept.look)  # one who hangs up doesn't take it from the others

    def forget(self, standing: Standing) -> None:
        """It was found to be out of date."""
        kept = self._of(standing.run.name)
        if kept.standing is standing:
            kept.read_at = -1


def _looked(kept: _Kept, look: asyncio.Task[Standing]) -> None:
    if kept.look is look:
        kept.look = None
    if not look.cancelled():
        look.exception()  # whoever still waits gets it


def _seen(run: dict[str, str], round_: dict[str, str]) -> tuple[str, str, str]:
    return run.get("version", ""), run.get("created_at", ""), round_.get("version", "")
