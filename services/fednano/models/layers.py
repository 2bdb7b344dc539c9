"""A model's repeated blocks, each of which can be treated alike: computed again, or compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """As transformers marks them; none in a family that it does not mark."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_layers(model: PreTrainedModel) -> None:
    """Each layer is compiled at its first use: once for all layers of a kind, and for all lengths, but
    anew for batches with padding and without, with a graph and without.

    The whole model is not: `logits_to_keep` differs from batch to batch, and each would be compiled.
    """
    for layer in layers(model):
        layer.__dict__["forward"] = _compiled(layer.forward)


def _compiled(plain: Callable[..., Any]) -> Callable[..., Any]:
    fast = torch.compile(plain, dynamic=True)

    def forward(*args: Any, **given: Any) -> Any:
        # A cache grows with each token, and would be compiled as often.
        return (fast if given.get("past_key_values") is None else plain)(*args, **given)

    return forward
