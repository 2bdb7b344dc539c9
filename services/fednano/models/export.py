"""NanoAdapters as an ordinary PEFT LoRA adapter for the unmodified stock model.

Because a_m(x) = x + s B A x is linear it moves into the layer before it, exactly:

- a_image behind the connector's last layer (W, b) is LoRA (A W, B) on that layer, its bias set to
  b + s B A b;
- a_text behind the embedding table E [vocabulary, hidden] is LoRA (A E^T, B) on the table.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils.logging import disable_progress_bar

from fednano.models.checkpoint import Origin
from fednano.models.language_model import LowRank
from fednano.models.split import FAMILIES
from fednano.wire.errors import InvalidRequest

_EMBEDDINGS = "language_model.embed_tokens"

_README = """---
library_name: peft
base_model: {base}
---
# NanoAdapters of the FedNano run `{run}`, round {round}

Load into the stock model (fingerprint `{fingerprint}`):

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, "THIS_DIRECTORY")
```

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
    disable_progress_bar()
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise InvalidRequest.of("model_type", f"one of {', '.join(FAMILIES)}", config.model_type)
    targets = {"image": family.CONNECTOR_OUTPUT, "text": _EMBEDDINGS}
    hidden = config.get_text_config().hidden_size
    for modality, adapter in adapters.items():
        if adapter.down.shape[1] != hidden:
            raise InvalidRequest.of(f"adapter {modality}", f"width {hidden}", adapter.down.shape[1])
    stock = AutoModelForImageTextToText.from_pretrained(
        model_dir, dtype=torch.float32, local_files_only=True
    )
    with warnings.catch_warnings():
        # Tied embeddings matter when merging; the README that is written says what to do then.
        warnings.filterwarnings("ignore", message=".*ensure_weight_tying.*")
        # PEFT asks transformers by a name that is on its way out.
        warnings.filterwarnings("ignore", category=FutureWarning)
        peft = get_peft_model(stock, _lora_config({targets[m]: a for m, a in adapters.items()}))
    layers = {
        target: module
        for name, module in peft.named_modules()
        for target in targets.values()
        if name.endswith(target) and isinstance(module, LoraLayer)
    }
    if "image" in adapters:
        _into_linear(layers[targets["image"]], adapters["image"])
    if "text" in adapters:
        _into_embedding(layers[targets["text"]], adapters["text"])
    peft.save_pretrained(str(out), save_embedding_layers=False)
    (out / "README.md").write_text(
        _README.format(
            base=str(model_dir.name),
            run=origin.run,
            round=origin.round,
            fingerprint=origin.fingerprint,
        )
    )


def _lora_config(adapters: dict[str, LowRank]) -> LoraConfig:
    ranks = {target: adapter.down.shape[0] for target, adapter in adapters.items()}
    # PEFT scales by alpha / r; its annotation says int, any number works.
    alphas: dict[str, Any] = {t: adapter.scale * ranks[t] for t, adapter in adapters.items()}
    first = next(iter(adapters))
    return LoraConfig(
        r=ranks[first],
        lora_alpha=alphas[first],
        target_modules=list(adapters),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        bias="lora_only",
        lora_dropout=0.0,
    )


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
