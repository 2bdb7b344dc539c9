"""A PEFT LoRA adapter on disk, for layers of the unmodified stock model."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils.logging import disable_progress_bar

from fednano.models.checkpoint import Origin
from fednano.models.split import FAMILIES
from fednano.wire.errors import InvalidRequest

LANGUAGE_MODEL = "language_model"
"""What the LLM is called inside the stock model."""

_README = """---
library_name: peft
base_model: {base}
---
# {what} of the FedNano run `{run}`, round {round}

Load into the stock model (fingerprint `{fingerprint}`):

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, "THIS_DIRECTORY")
```
"""


@dataclass(frozen=True)
class Layer:
    """A layer that gets W + scale B A; `fill` is given it as PEFT has wrapped it."""

    name: str  # in the stock model, from any dot on
    rank: int
    scale: float
    fill: Callable[[Any], None]


def quiet_peft() -> None:
    """Before PEFT is imported: it imports bitsandbytes, which tells of kernels nobody asked for."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def family_of(model_dir: Path) -> ModuleType:
    """Raises InvalidRequest where it is not known."""
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise InvalidRequest.of("model_type", f"one of {', '.join(FAMILIES)}", config.model_type)
    return family


def write_adapter(
    model_dir: Path,
    layers: Sequence[Layer],
    out: Path,
    origin: Origin,
    what: str,
    notes: str = "",
    biases: bool = False,
) -> None:
    """Writes LoRA for `layers` into `out`; with `biases` those of the layers, too.

    Raises InvalidRequest where the model has no such layer.
    """
    quiet_peft()
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    disable_progress_bar()
    stock = AutoModelForImageTextToText.from_pretrained(
        model_dir, dtype=torch.float32, local_files_only=True
    )
    with warnings.catch_warnings():
        # Tied embeddings matter when merging; the README that is written says what to do then.
        warnings.filterwarnings("ignore", message=".*ensure_weight_tying.*")
        # PEFT asks transformers by a name that is on its way out.
        warnings.filterwarnings("ignore", category=FutureWarning)
        peft = get_peft_model(stock, _config(layers, biases))
    wrapped = {n: m for n, m in peft.named_modules() if isinstance(m, LoraLayer)}
    for layer in layers:
        found = [module for name, module in wrapped.items() if name.endswith(f".{layer.name}")]
        if not found:
            raise InvalidRequest.of("adapter", "layers that the model has", layer.name)
        layer.fill(found[0])
    peft.save_pretrained(str(out), save_embedding_layers=False)
    told = {**vars(origin), "base": str(model_dir.name), "what": what}
    (out / "README.md").write_text(_README.format(**told) + notes)


def _config(layers: Sequence[Layer], biases: bool) -> Any:
    from peft import LoraConfig

    # PEFT scales by alpha / r; its annotation says int, any number works.
    alphas: dict[str, Any] = {layer.name: layer.scale * layer.rank for layer in layers}
    return LoraConfig(
        r=layers[0].rank,
        lora_alpha=alphas[layers[0].name],
        target_modules=[layer.name for layer in layers],
        rank_pattern={layer.name: layer.rank for layer in layers},
        alpha_pattern=alphas,
        bias="lora_only" if biases else "none",
        lora_dropout=0.0,
    )
