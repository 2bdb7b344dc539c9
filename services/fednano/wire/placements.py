"""Where in the model the weights may lie that a run trains, and what doesn't go with each place."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from fednano.wire.low_rank import DOWN, UP

if TYPE_CHECKING:
    from fednano.wire.run_config import RunConfig

PlacementName = Literal["nano-adapters", "connector", "lora"]
Shapes = tuple[tuple[str, tuple[int, ...]], ...]
"""Of named tensors, in the model's order."""

CONNECTOR, LORA = "connector.", "lora."
_PREFIXES: dict[PlacementName, str] = {"connector": CONNECTOR, "lora": LORA}

_FISHER = (
    "its updates carry no Fisher, as gradients of single samples are computed for NanoAdapters"
)
_CONTROL = "its clients' controls are kept for NanoAdapters"
_NO_PRODUCT = "a connector's weights are no product B A"
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
LACKING: dict[PlacementName, str] = {
    "connector": "trains the connector, of which this client tells no shapes: start a newer one",
    "lora": "trains LoRA inside the LLM, which takes clients that have it whole: give --llm-half DIR",
}
"""What keeps a client out that announces no weights for the placement."""
_NOT_FACTORED = {"connector": "whose vectors are no x + U W", "lora": "where no vectors cross"}


def check_placement(run: RunConfig) -> None:
    """Raises ValueError for what can't be combined."""
    if run.placement == "nano-adapters":
        return
    beside = f"beside placement {run.placement}"
    for place, strategy in _strategies(run):
        reason = _REASONS[run.placement].get(strategy)
        if reason:
            raise ValueError(
                f"{place}: expected another strategy, such as fedavg, {beside}: {reason}, got"
                f" {strategy}"
            )
    if run.personal == "feddpa-f":
        raise ValueError(
            f"personal: expected none or fine-tuned {beside}, as feddpa-f mixes two NanoAdapters,"
            " got feddpa-f"
        )
    if run.training.wire == "factored":
        why = _NOT_FACTORED[run.placement]
        raise ValueError(f"training.wire: expected dense {beside}, {why}, got factored")
    if run.placement == "lora":
        _check_nothing_crosses(run, beside)


def _strategies(run: RunConfig) -> Iterable[tuple[str, str]]:
    """The field and the name of each."""
    yield "strategy.name", run.strategy.name
    for index, shadow in enumerate(run.shadows):
        yield f"shadows.{index}", shadow.name


def _check_nothing_crosses(run: RunConfig, beside: str) -> None:
    training = run.training
    if training.wire_dtype != "fp32":
        raise ValueError(
            f"training.wire_dtype: expected fp32 {beside}, where no vectors cross, got"
            f" {training.wire_dtype}"
        )
    if training.loss != "server":
        raise ValueError(
            f"training.loss: expected server {beside}, where each client has the whole LLM, got"
            f" {training.loss}"
        )


def placement_of(names: Iterable[str]) -> PlacementName:
    """Of tensors with these names."""
    found = list(names)
    for placement, prefix in _PREFIXES.items():
        if found and all(name.startswith(prefix) for name in found):
            return placement
    return "nano-adapters"


def trained_by(placement: PlacementName, weights: Shapes) -> Shapes:
    """Those of a client's weights that the placement trains; none for NanoAdapters, which are made
    from the LLM's width alone."""
    prefix = _PREFIXES.get(placement)
    return tuple((n, s) for n, s in weights if prefix and n.startswith(prefix))


def exchanged(placement: PlacementName, weights: Shapes, rank: int) -> Shapes:
    """What travels for these weights: what changes of each, or A [r, in] and B [out, r] for a
    layer's [out, in]."""
    if placement != "lora":
        return weights
    return tuple(
        pair
        for name, (outputs, inputs) in weights
        for pair in ((name + DOWN, (rank, inputs)), (name + UP, (outputs, rank)))
    )


def total(shapes: Shapes) -> int:
    """Numbers in all of them together."""
    return sum(math.prod(shape) for _, shape in shapes)


def difference(expected: Shapes, got: Shapes) -> tuple[str, str] | None:
    """The first tensor in which they differ, as either side has it; None where they don't."""
    for index in range(max(len(expected), len(got))):
        one, other = (_shown(shapes, index) for shapes in (expected, got))
        if one != other:
            return one, other
    return None


def _shown(shapes: Shapes, index: int) -> str:
    if index >= len(shapes):
        return "no more"
    name, shape = shapes[index]
    return f"{name} {list(shape)}"
