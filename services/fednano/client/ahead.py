"""The next batch is prepared while the one before is being computed with.

Only what does not depend on the adapters may be prepared so: then the numbers are those of doing one
after the other.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final, TypeVar

import torch

T = TypeVar("T")


class _End:
    """What comes after the last item; a StopIteration can't pass through a future."""


_END: Final = _End()


class Ahead(Iterator[T]):
    """Items that are made by another thread: the next one from `begin` on, at the latest when it is
    asked for."""

    def __init__(self, pool: ThreadPoolExecutor, items: Iterator[T]) -> None:
        self._pool = pool
        self._items = items
        self._coming: Future[T | _End] | None = None
        self._lock = threading.Lock()
        self._context = contextvars.copy_context()  # lines of that thread, too, tell the run
        self.begin()

    def begin(self) -> None:
        """May be called from any thread, and again."""
        with self._lock:
            if self._coming is None:
                self._coming = self._pool.submit(self._context.run, self._make)

    def end(self) -> None:
        """From now on `begin` begins nothing."""
        with self._lock:
            if self._coming is None:
                self._coming = Future()
                self._coming.cancel()

    def _make(self) -> T | _End:
        return next(self._items, _END)

    def __next__(self) -> T:
        self.begin()
        assert self._coming is not None, "just begun"
        item = self._coming.result()
        if isinstance(item, _End):
            raise StopIteration
        self._coming = None
        return item


@contextmanager
def one_ahead(items: Iterable[T]) -> Iterator[Ahead[T]]:
    """`items`, each made by one thread of their own, the first at once.

    What making an item raises is raised where that item would have come. On leaving, the thread ends
    with what it is at.
    """
    # Each thread has a number of its own for OpenMP, which is not the process's until it is set.
    pool = ThreadPoolExecutor(1, "ahead", torch.set_num_threads, (torch.get_num_threads(),))
    ahead = Ahead(pool, iter(items))
    try:
        yield ahead
    finally:
        ahead.end()
        pool.shutdown(cancel_futures=True)
