"""Where in the model the weights may lie that a method trains, and what doesn't go with each place."""

from __future__ import annotations

from typing import Literal

from fednano.wire.errors import Problem
from fednano.wire.run_config import RunConfig

PlacementName = Literal["nano-adapters", "connector", "lora"]
_FISHER = (
    "its updates carry no Fisher, as gradients of single samples are computed for NanoAdapters"
)
_CONTROL = "its clients' controls are kept for NanoAdapters"
_NO_PRODUCT = "a connector's weights are no product B A"
_NOT_FACTORED = {"connector": "whose vectors are no x + U W", "lora": "where no vectors cross"}
_REASONS: dict[str, dict[str, str]] = {
    "connector": {
        "fednano": _FISHER,
        "fednano-ef": _FISHER,
        "scaffold": _CONTROL,
        "product": _NO_PRODUCT,
        "ffa": _NO_PRODUCT,
        "flora": _NO_PRODUCT,
    },
    "lora": {
        "fednano": _FISHER,
        "fednano-ef": _FISHER,
        "scaffold": _CONTROL,
        "product": "it refactors square maps, which an LLM's projections need not be",
        "flora": "its growing stack is put beside NanoAdapters",
    },
}


def misplaced(placement: PlacementName, personal: str, config: RunConfig) -> Problem | None:
    """What of a cell doesn't go with its placement."""
    reasons = _REASONS.get(placement, {})
    for strategy in config.strategies:
        if strategy.name in reasons:
            expected = f"another strategy beside placement {placement}: {reasons[strategy.name]}"
            return Problem("methods", expected, strategy.name)
    if not reasons:
        return None
    if personal == "feddpa-f":
        expected = "placement nano-adapters beside feddpa-f, which mixes two NanoAdapters"
        return Problem("methods.placement", expected, placement)
    if config.training.wire == "factored":
        expected = f"dense beside placement {placement}, {_NOT_FACTORED[placement]}"
        return Problem("run.training.wire", expected, "factored")
    return None
