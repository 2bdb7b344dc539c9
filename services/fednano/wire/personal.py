"""Adapters that clients keep for themselves beside the merged one, and what doesn't go with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fednano.wire.run_config import RunConfig

Personal = Literal["none", "fine-tuned", "feddpa-f"]


def check_personal(run: RunConfig) -> None:
    """Raises ValueError for what can't be combined."""
    if run.personal == "none":
        return
    if run.evaluation.own_data == "never":
        raise ValueError(
            f"evaluation.own_data: expected ends or always for personal {run.personal}, which clients"
            " train and score with their last evaluation, got never"
        )
    if run.strategy.name == "flora" or run.adapter.ranks:
        unequal = "flora" if run.strategy.name == "flora" else "adapter.ranks"
        raise ValueError(
            f"personal: expected none with {unequal}, where a client doesn't train the merged adapter"
            f" as it is, got {run.personal}"
        )
