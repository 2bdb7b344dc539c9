"""Which strategies can be a run's shadows: merge the updates of every round beside the one that leads.

A shadow is a one-step counterfactual: the adapter that this round's updates, which were trained for
the leading strategy and from its adapter, would have become if they had been merged otherwise. How
clients train is settled by then, so what a shadow would need of them must be what they do anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fednano.wire.run_config import StrategyConfig

MOST_SHADOWS = 8
FISHER_STRATEGIES = ("fednano", "fednano-ef")
_WAYS_TO_TRAIN = ("fedprox", "ffa", "scaffold", "flora")
_MERGED_AS_FEDAVG = ("fedprox", "ffa", "scaffold")
_SERVER_OPTIMIZERS = ("fedavgm", "fedadagrad", "fedadam", "fedyogi")


def check_shadows(leader: StrategyConfig, shadows: Sequence[StrategyConfig]) -> None:
    """Raises ValueError for one that can't be a shadow of `leader`, or beside those before it."""
    for index, shadow in enumerate(shadows):
        expected = _expected(leader, shadows[:index], shadow)
        if expected:
            raise ValueError(f"shadows.{index}: expected {expected}, got {shadow.label}")


def _expected(
    leader: StrategyConfig, earlier: Sequence[StrategyConfig], shadow: StrategyConfig
) -> str:
    """What it should have been; "" if it is."""
    others = {one.name for one in (leader, *earlier)}
    if shadow.name in _WAYS_TO_TRAIN:
        return "a strategy that only merges, as this one's clients train otherwise"
    if leader.name == "flora":
        return "none where flora leads, whose clients send what they add to the adapter"
    if shadow == leader:
        return "another strategy than the one that leads"
    if shadow in earlier:
        return "each strategy once"
    if shadow.name == "fedavg" and leader.name in _MERGED_AS_FEDAVG:
        return f"another merging than that of {leader.name}, which is the same"
    if shadow.name in FISHER_STRATEGIES and others & {*FISHER_STRATEGIES} - {shadow.name}:
        return "fednano or fednano-ef alone, as clients compute their Fisher in one way"
    if shadow.name in _SERVER_OPTIMIZERS and leader.name == "product":
        return "no moments by element where product leads, as each round it turns the rows of A"
    return ""
