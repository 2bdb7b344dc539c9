"""A tuned connector, or LoRA inside the LLM, as an ordinary PEFT LoRA adapter for the stock model.

LoRA is there already. The difference D of a connector's layer is the product D 1 or 1 D, whichever
has the smaller rank: a LoRA of full rank, exactly, and a bias.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from fednano.models.checkpoint import Origin
from fednano.models.peft_files import LANGUAGE_MODEL, Layer, family_of, write_adapter
from fednano.wire.errors import InvalidRequest
from fednano.wire.low_rank import DOWN, UP
from fednano.wire.placements import CONNECTOR, LORA

_WEIGHT, _BIAS = ".weight", ".bias"
_NOTES = """
- It changes biases of the connector. PEFT's `disable_adapter()` does not undo that: load the stock
  model afresh to compare.
- For the same reason PEFT refuses to load a second adapter beside this one.
"""
Named = dict[str, torch.Tensor]


def export_lora(model_dir: Path, tensors: Named, scale: float, out: Path, origin: Origin) -> None:
    """Writes `lora.<layer>.down` and `.up` into `out`. Raises InvalidRequest where the model has no
    such layer."""
    layers = [
        _layer(f"{LANGUAGE_MODEL}.{layer}", tensors[name], tensors[LORA + layer + UP], scale)
        for name in tensors
        if name.endswith(DOWN)
        for layer in [name.removeprefix(LORA).removesuffix(DOWN)]
    ]
    write_adapter(model_dir, layers, out, origin, "LoRA inside the LLM")


def export_connector(model_dir: Path, tensors: Named, out: Path, origin: Origin) -> None:
    """Writes `connector.<layer>.weight` and `.bias`, the differences from the checkpoint's, into
    `out`. Raises InvalidRequest where they are of something else than linear layers."""
    module = family_of(model_dir).CONNECTOR
    layers = []
    for name, change in tensors.items():
        layer = name.removeprefix(CONNECTOR).removesuffix(_WEIGHT)
        if name.endswith(_BIAS) and name.removesuffix(_BIAS) + _WEIGHT in tensors:
            continue
        if not name.endswith(_WEIGHT) or change.ndim != 2:
            expected = "weights and biases of linear layers, which a LoRA can stand for"
            raise InvalidRequest.of(f"adapter {name}", expected, list(change.shape))
        bias = tensors.get(CONNECTOR + layer + _BIAS)
        layers.append(_layer(f"{module}.{layer}", *_factors(change), 1.0, bias))
    write_adapter(model_dir, layers, out, origin, "The connector", _NOTES, biases=True)


def _factors(change: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B whose product is `change` [out, in]."""
    outputs, inputs = change.shape
    return (torch.eye(inputs), change) if inputs <= outputs else (change, torch.eye(outputs))


def _layer(
    name: str,
    down: torch.Tensor,
    up: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
) -> Layer:
    return Layer(name, len(down), scale, partial(_fill, down=down, up=up, bias=bias))


@torch.no_grad()
def _fill(layer: Any, down: torch.Tensor, up: torch.Tensor, bias: torch.Tensor | None) -> None:
    held = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for parameter, tensor in zip(held, (down, up), strict=True):
        if parameter.shape != tensor.shape:
            raise InvalidRequest.of("adapter", list(parameter.shape), list(tensor.shape))
        parameter.copy_(tensor)
    if bias is not None:
        layer.get_base_layer().bias.add_(bias)
