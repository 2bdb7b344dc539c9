"""Leadership: of several coordinators, the one that holds the lease advances the runs.

The lease is a key with a time to live and a counter that rises with every takeover. It is renewed
in the background; every write that advances a run checks it, so a leader that was asleep while
its lease ran out can't harm anything.
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from contextlib import suppress

from fednano.coordinator.database import LeaseLost
from fednano.coordinator.metrics import Metrics
from fednano.coordinator.rounds import Rounds
from fednano.coordinator.store import Store
from fednano.wire.errors import Busy, Unavailable

log = logging.getLogger(__name__)

_PATIENCE = 3  # times that a run may stumble over something unexpected before it fails
_LOOK_SECONDS = 1.0
_SEARCH = 1 / 8  # of client_seconds: how often those are searched for that were lost


class Leader:
    """Tries to lead, and leads."""

    def __init__(self, store: Store, metrics: Metrics, lease_seconds: float) -> None:
        self._store = store
        self._metrics = metrics
        self._seconds = lease_seconds
        self._owner = uuid.uuid4().hex

    async def serve(self) -> None:
        """Until cancelled; then the lease is given back."""
        while True:
            try:
                await self._try()
            except Unavailable:
                pass  # told where it was noticed
            except Exception as error:  # whatever it is, nobody else may be there to lead
                log.warning("leading failed, trying again", extra={"reason": repr(error)})
            await asyncio.sleep(self._seconds / 4)

    async def _try(self) -> None:
        lease = await self._store.lease.acquire(self._owner, self._seconds)
        if not lease:
            return
        log.info("leading", extra={"lease": lease})
        self._metrics.leader.set(1)
        try:
            await self._lead(lease)
        finally:
            self._metrics.leader.set(0)
            await self._release(lease)

    async def _release(self, lease: str) -> None:
        with suppress(Exception):  # it runs out by itself
            await asyncio.shield(self._store.lease.release(lease))

    async def _lead(self, lease: str) -> None:
        """Returns once the lease is lost."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._renew(lease))
                tasks.create_task(self._advance(lease, tasks))
        except* LeaseLost:
            log.warning("no longer leading", extra={"lease": lease})

    async def _renew(self, lease: str) -> None:
        """Raises LeaseLost when another has it, or when it ran out while Redis was away."""
        loop = asyncio.get_running_loop()
        good_until = loop.time() + self._seconds
        while True:
            await asyncio.sleep(self._seconds / 4)
            asked = loop.time()
            try:
                if not await self._store.lease.renew(lease, self._seconds):
                    raise LeaseLost("the leader's lease is another's")
                good_until = asked + self._seconds
            except LeaseLost:
                raise
            except Exception:
                if loop.time() >= good_until:
                    raise LeaseLost("the leader's lease ran out") from None

    async def _advance(self, lease: str, tasks: asyncio.TaskGroup) -> None:
        """One task for each active run."""
        running: dict[str, asyncio.Task[None]] = {}
        now, searched = asyncio.get_running_loop().time, -math.inf
        with self._store.database.bell("") as bell:
            while True:
                search = now() - searched >= self._store.members.client_seconds * _SEARCH
                searched = now() if search else searched
                try:
                    for run in await self._store.run_store.active():
                        if run.name not in running or running[run.name].done():
                            task = tasks.create_task(self._drive(lease, run.name))
                            running[run.name] = task
                        if search:
                            await self._store.members.mark_lost(lease, run.name)
                except LeaseLost:
                    raise
                except Exception as error:  # Redis is away, or one run's record is damaged
                    log.warning("looking for runs failed", extra={"reason": repr(error)})
                running = {name: task for name, task in running.items() if not task.done()}
                await bell.wait(_LOOK_SECONDS)

    async def _drive(self, lease: str, name: str) -> None:
        """A run to its end. What is wrong with one run stays with it."""
        rounds = Rounds(self._store, lease, name, self._metrics.round_seconds.observe)
        stumbles = 0
        while True:
            try:
                await rounds.drive()
                return
            except LeaseLost:
                raise
            except (Unavailable, Busy):
                await asyncio.sleep(0.2)
            except Exception as error:
                log.exception("a run stumbled", extra={"run": name})
                stumbles += 1
                if stumbles >= _PATIENCE:
                    await self._give_up(rounds, error)
                await asyncio.sleep(0.2 * 2 ** min(stumbles, 5))

    async def _give_up(self, rounds: Rounds, error: Exception) -> None:
        try:
            await rounds.give_up(f"{type(error).__name__}; see the coordinator's log")
        except LeaseLost:
            raise
        except Exception as failure:  # a damaged record, or Redis takes no writes
            log.warning(
                "giving a run up failed", extra={"run": rounds.name, "reason": repr(failure)}
            )
