"""The next batch is prepared while the one before is being computed with.

Only what does not depend on the adapters may be prepared so: then the numbers are those of doing one
after the other.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final, TypeVar

import torch

T = TypeVar("T")


class _End:
    """What comes after the last item; a StopIteration can't pass through a future."""


_END: Final = _End()


@contextmanager
def one_ahead(items: Iterable[T]) -> Iterator[Iterator[T]]:
    """`items`, each made by one thread of their own while the caller uses the one before.

    What making an item raises is raised where that item would have come. On leaving, the thread ends
    with what it is at.
    """
    # Each thread has a number of its own for OpenMP, which is not the process's until it is set.
    pool = ThreadPoolExecutor(1, "ahead", torch.set_num_threads, (torch.get_num_threads(),))
    try:
        yield _taken(pool, iter(items))
    finally:
        pool.shutdown(cancel_futures=True)


def _taken(pool: ThreadPoolExecutor, items: Iterator[T]) -> Iterator[T]:
    def begin() -> Future[T | _End]:
        context = contextvars.copy_context()  # that thread's lines, too, tell run and client
        return pool.submit(lambda: context.run(lambda: next(items, _END)))

    coming = begin()
    while not isinstance(item := coming.result(), _End):
        coming = begin()
        yield item
