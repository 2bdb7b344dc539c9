"""Who is next, where several want the one device."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Shares(Generic[K]):
    """Fair queueing by virtual time (Goyal et al., Start-time Fair Queuing, 1996).

    The next is whoever has had the least so far, by its weight. Whoever was away starts with the
    others: it neither owes nor has saved anything. So each gets its part, and nobody starves.
    """

    def __init__(self, weights: Mapping[K, float] | None = None) -> None:
        self._weights = weights or {}
        self._had: dict[K, float] = {}
        self._now = 0.0

    def order(self, waiting: Iterable[K]) -> list[K]:
        """Those that wait, the next one first; ties as they came."""
        keys = list(dict.fromkeys(waiting))
        had = {key: max(self._had.get(key, 0.0), self._now) for key in keys}
        self._now = min(had.values(), default=self._now)
        away = {key: used for key, used in self._had.items() if used > self._now}
        self._had = {**away, **had}
        return sorted(keys, key=had.__getitem__)

    def charge(self, key: K, cost: float) -> None:
        """After `order` has named it."""
        had = max(self._had.get(key, 0.0), self._now)
        self._had[key] = had + cost / self._weights.get(key, 1.0)
