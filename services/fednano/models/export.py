"""NanoAdapters as an ordinary PEFT LoRA adapter for the unmodified stock model.

Because a_m(x) = x + s B A x is linear it moves into the layer before it, exactly:

- a_image behind the connector's last layer (W, b) is LoRA (A W, B) on that layer, its bias set to
  b + s B A b;
- a_text behind the embedding table E [vocabulary, hidden] is LoRA (A E^T, B) on the table.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from fednano.models.checkpoint import Origin
from fednano.models.language_model import LowRank
from fednano.models.peft_files import LANGUAGE_MODEL, Layer, family_of, write_adapter
from fednano.wire.errors import InvalidRequest

_EMBEDDINGS = f"{LANGUAGE_MODEL}.embed_tokens"
_NOTES = """
- The image adapter changes the bias of the connector's last layer. PEFT's `disable_adapter()` does
  not undo that: load the stock model afresh to compare.
- For the same reason PEFT refuses to load a second adapter beside this one.
- Before merging into a checkpoint with tied embeddings, untie `lm_head`: merging changes the
  embedding table, which must not change the output layer.
"""


def export_peft(model_dir: Path, adapters: dict[str, LowRank], out: Path, origin: Origin) -> None:
    """Writes `adapters` ("image", "text"; A [r, d], B [d, r]) as a PEFT adapter into `out`.

    Raises InvalidRequest where the adapters don't fit the model or the family is not known.
    """
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    hidden = config.get_text_config().hidden_size
    for modality, adapter in adapters.items():
        if adapter.down.shape[1] != hidden:
            raise InvalidRequest.of(f"adapter {modality}", f"width {hidden}", adapter.down.shape[1])
    targets = {"image": family_of(model_dir).CONNECTOR_OUTPUT, "text": _EMBEDDINGS}
    fills = {"image": _into_linear, "text": _into_embedding}
    layers = [
        Layer(targets[m], len(a.down), a.scale, partial(fills[m], adapter=a))
        for m, a in adapters.items()
    ]
    write_adapter(model_dir, layers, out, origin, "NanoAdapters", _NOTES, biases=True)


@torch.no_grad()
def _into_linear(layer: Any, adapter: LowRank) -> None:
    linear = layer.get_base_layer()
    layer.lora_A["default"].weight.copy_(adapter.down @ linear.weight)
    layer.lora_B["default"].weight.copy_(adapter.up)
    if linear.bias is not None:
        linear.bias.copy_(adapter(linear.bias))


@torch.no_grad()
def _into_embedding(layer: Any, adapter: LowRank) -> None:
    table = layer.get_base_layer().weight  # [vocabulary, hidden]
    layer.lora_embedding_A["default"].copy_(adapter.down @ table.T)
    layer.lora_embedding_B["default"].copy_(adapter.up)
