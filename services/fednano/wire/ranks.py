"""What goes with adapters whose ranks differ from client to client, or grow from round to round."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fednano.wire.run_config import RunConfig

_OF_ANY_RANK = ("product", "flora")


def check_ranks(run: RunConfig) -> None:
    """Raises ValueError for what can't be combined."""
    unequal = [one.name for one in run.strategies if one.name not in _OF_ANY_RANK]
    if run.adapter.ranks and unequal:
        raise ValueError(
            f"adapter.ranks: expected nothing for {unequal[0]}, which merges A and B element by"
            f" element; {' and '.join(_OF_ANY_RANK)} merge what adapters of different ranks do"
        )
    if 0 < (run.strategy.max_rank or 0) < run.adapter.rank:
        raise ValueError(
            f"strategy.max_rank: expected 0, or adapter.rank ({run.adapter.rank}) at least, got"
            f" {run.strategy.max_rank}"
        )
    if run.strategy.name == "flora" and run.training.wire == "factored":
        raise ValueError(
            "training.wire: expected dense for flora, got factored, which saves nothing at the ranks"
            " that the adapter grows to"
        )
