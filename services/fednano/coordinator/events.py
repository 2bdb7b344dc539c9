"""A run's events as server-sent events, resumable by id.

A server that is about to stop calls `close` first, since an HTTP server waits for its open
responses; every stream looks at that twice a second.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from fednano.coordinator.records import Event
from fednano.coordinator.store import Store
from fednano.wire.errors import Busy, FedNanoError

log = logging.getLogger(__name__)

_WAIT_MS = 500

Recheck = Callable[[], Awaitable[object]]
"""Raises when the reader may no longer read."""


class EventStreams:
    """The open streams of this process."""

    def __init__(
        self,
        store: Store,
        heartbeat_seconds: float = 15.0,
        limit: int = 500,
    ) -> None:
        self._store = store
        self._heartbeat = heartbeat_seconds
        self._limit = limit
        self._closing = False
        self.open = 0

    def close(self) -> None:
        """Ends every stream at its next step; later ones end at once."""
        self._closing = True

    def check_room(self) -> None:
        """Raises Busy when as many streams are open as one process should serve."""
        if self.open >= self._limit:
            raise Busy(f"{self.open} event streams are open here; try again later")

    async def follow(self, run: str, after: str, recheck: Recheck) -> AsyncIterator[str]:
        """Frames of events after the id `after`, with a comment every so often when nothing happens.

        Ends when the reader leaves or loses its right to read, when Redis goes away, and on close.
        """
        self.open += 1
        try:
            yield "retry: 2000\n\n: open\n\n"
            async for text in self._frames(run, after, recheck):
                yield text
        except FedNanoError as error:
            log.info("event stream ended", extra={"run": run, "reason": error.detail})
        finally:
            self.open -= 1

    async def _frames(self, run: str, after: str, recheck: Recheck) -> AsyncIterator[str]:
        heard = time.monotonic()
        while not self._closing:
            events = await self._store.events(run, after, _WAIT_MS)
            for event in events:
                yield frame(event)
                after = event.id
            if time.monotonic() - heard >= self._heartbeat:
                await recheck()
                heard = time.monotonic()
                yield ": heartbeat\n\n"


def frame(event: Event) -> str:
    """One event as it goes over the wire; JSON keeps `data` on one line."""
    data = json.dumps(event.data, separators=(",", ":"))
    return f"id: {event.id}\nevent: {event.kind}\ndata: {data}\n\n"
