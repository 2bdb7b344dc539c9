"""Tells the coordinator, from a thread of its own, that this client lives and how far it is."""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType

from fednano.client.coordination import CoordinatorClient, Membership
from fednano.wire.errors import RETRYABLE, FedNanoError

log = logging.getLogger(__name__)


class TaskGivenUp(Exception):
    """The coordinator no longer wants the result of the current task."""


@dataclass
class Work:
    """What is being done now; a new one for every task, so that a late reply hits no other."""

    task: object = None
    doing: str = "waiting"
    share: float = 0.0
    given_up: str = ""


class Heartbeat:
    """A context manager around the work on a run.

    The work reports through `progress` and learns there that it should stop.
    """

    def __init__(self, coordinator: CoordinatorClient, member: Membership, seconds: float) -> None:
        self._coordinator = coordinator
        self._member = member
        self._seconds = seconds
        self._over = threading.Event()
        self._work = Work()
        self._failure: FedNanoError | None = None
        context = contextvars.copy_context()  # this thread's lines, too, tell run and client
        self._thread = threading.Thread(
            target=context.run, args=(self._beat,), name="heartbeat", daemon=True
        )

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if error is None:  # the last word: nothing is done any more, what was spent
            with suppress(FedNanoError):
                self._coordinator.heartbeat(self._member, None, 0.0, "waiting", report=True)

    @contextmanager
    def on(self, task: object, doing: str) -> Iterator[None]:
        """For the length of a task; `doing` is a word or two for people."""
        self._work = Work(task, doing)
        try:
            yield
        finally:
            self._work = Work()

    def progress(self, share: float) -> None:
        """Raises TaskGivenUp, or the error that ended the session."""
        self._work.share = share
        self.check()

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._work.given_up:
            raise TaskGivenUp(self._work.given_up)

    def _beat(self) -> None:
        while not self._over.wait(self._seconds):
            work = self._work
            try:
                reply = self._coordinator.heartbeat(self._member, work.task, work.share, work.doing)
            except RETRYABLE as error:
                log.warning("heartbeat not delivered", extra={"reason": str(error)})
                continue
            except FedNanoError as error:
                self._failure = error
                return
            if reply.stop and work.task is not None:
                work.given_up = reply.reason or "the coordinator said stop"
