"""A coordinator's process that kills itself at a chosen instant: `before` or `after` the nth call
of a method, MODULE:CLASS.METHOD. The product knows nothing of it."""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fednano.coordinator.server import serve
from fednano.coordinator.settings import CoordinatorSettings


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(place: str, when: str, nth: int) -> None:
    """Patches the method."""
    module, _, path = place.partition(":")
    owner_name, _, method_name = path.rpartition(".")
    owner: Any = importlib.import_module(module)
    owner = getattr(owner, owner_name) if owner_name else owner
    method: Callable[..., Any] = getattr(owner, method_name)
    calls = iter(range(1, 1_000_000))
    one_by_one = asyncio.Lock()

    @functools.wraps(method)
    async def later(*args: Any, **kwargs: Any) -> Any:
        async with one_by_one:
            mine = next(calls) == nth
            if mine and when == "before":
                _die()
            result = await method(*args, **kwargs)
            if mine:
                _die()
            return result

    @functools.wraps(method)
    def now(*args: Any, **kwargs: Any) -> Any:
        mine = next(calls) == nth
        if mine and when == "before":
            _die()
        result = method(*args, **kwargs)
        if mine:
            _die()
        return result

    setattr(owner, method_name, later if inspect.iscoroutinefunction(method) else now)


class Process:
    """The launcher, from the test's side. Forked from a server that has everything imported."""

    def __init__(self, settings: dict[str, Any], folder: Path, *kill: str) -> None:
        self._ready = folder / f"ready-{time.monotonic_ns()}.json"
        values = {**settings, "ready_file": str(self._ready)}
        self._process = _SERVER.Process(target=_main, args=(values, kill), daemon=True)
        self._process.start()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 20
        while not self._ready.exists():
            assert self._process.is_alive(), "the coordinator ended before it was ready"
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def wait_killed(self) -> None:
        self._process.join(30)
        assert self._process.exitcode == -signal.SIGKILL

    def stop(self) -> None:
        """SIGTERM, and a clean exit."""
        self._process.terminate()
        self._process.join(20)
        assert self._process.exitcode == 0

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def killed_in_turn(
    settings: dict[str, Any],
    folder: Path,
    kills: Iterable[tuple[str, ...]],
    finish: Callable[[], object],
) -> None:
    """One coordinator after the other, each killed at its instant; during the last, which is left
    alone, `finish` waits for the end of it all."""
    for kill in kills:
        doomed = Process(settings, folder, *kill)
        try:
            doomed.wait_killed()
        finally:
            doomed.kill()
    last = Process(settings, folder)
    try:
        finish()
        last.stop()
    finally:
        last.kill()


def _main(values: dict[str, Any], kill: tuple[str, ...]) -> None:
    if kill:
        place, when, nth = kill
        arm(place, when, int(nth))
    asyncio.run(serve(CoordinatorSettings(**values)))


_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["fednano.coordinator.rest", "fednano.coordinator.server"])
