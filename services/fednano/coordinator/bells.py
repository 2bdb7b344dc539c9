"""Bells: whoever waits for a change of a run sleeps until one of a kind that concerns it is told.

Rings come over Redis's pub/sub, which may lose some: a bell also lets go by itself after a while.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

LOOK_AGAIN_SECONDS = 1.0
_ANY = ""
_JITTER = 0.2  # share of the patience: those who began together don't look again together


class Bell:
    """Rings when something about one run changes."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._rung = asyncio.Event()

    def ring(self) -> None:
        self._rung.set()

    async def wait(self, seconds: float) -> bool:
        """True at the next ring; False after `seconds`, or once the bell's patience is over."""
        patience = self._patience * random.uniform(1 - _JITTER, 1)
        try:
            async with asyncio.timeout(max(0.0, min(seconds, patience))):
                await self._rung.wait()
        except TimeoutError:
            return False
        self._rung.clear()
        return True


class Bells:
    """Those of one process, by run and kind: a ring costs nothing to who didn't ask for its kind."""

    def __init__(self) -> None:
        self._hung: dict[tuple[str, str], set[Bell]] = {}
        self._listeners: list[Callable[[str, str], None]] = []

    def tell(self, listener: Callable[[str, str], None]) -> None:
        """`listener` hears of run and kind before anybody is woken; of "" and "" when any may have
        been missed."""
        self._listeners.append(listener)

    @contextmanager
    def hung(self, run: str, kinds: Collection[str], patience: float) -> Iterator[Bell]:
        """A bell that rings for these kinds; for all of them if there are none."""
        bell, places = Bell(patience), [(run, kind) for kind in kinds or (_ANY,)]
        for place in places:
            self._hung.setdefault(place, set()).add(bell)
        try:
            yield bell
        finally:
            for place in places:
                self._hung[place].discard(bell)
                if not self._hung[place]:
                    del self._hung[place]

    def ring(self, run: str, kind: str) -> None:
        for listener in self._listeners:
            listener(run, kind)
        for wanted in (kind, _ANY):
            for bell in self._hung.get((run, wanted), ()):
                bell.ring()

    def ring_all(self) -> None:
        """Wakes everybody who waits for a change."""
        for listener in self._listeners:
            listener("", "")
        for bells in self._hung.values():
            for bell in bells:
                bell.ring()
