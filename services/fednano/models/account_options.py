"""What `fednano account` may be asked. No torch here: the command line loads this at every start."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Adapted(StrEnum):
    """Modalities that may have an adapter."""

    IMAGE = "image"
    TEXT = "text"


class Fisher(StrEnum):
    """When a client estimates the Fisher that it uploads."""

    NONE = "none"
    LAST_EPOCH = "last-epoch"
    EXTRA_PASS = "extra-pass"


class LoraTargets(StrEnum):
    """Which layers of the LLM whole-model LoRA is put on."""

    QUERY_VALUE = "q-v"
    ALL_LINEAR = "all-linear"


class WireDType(StrEnum):
    """Of embeddings and gradients."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"


@dataclass(frozen=True)
class Plan:
    """What a run would ask of one client. Tokens are those of one sample."""

    rank: int
    modalities: tuple[Adapted, ...]
    fisher: Fisher
    batch_size: int
    prompt_tokens: int  # of text before the answer
    image_tokens: int | None  # None: of one image
    answer_tokens: int
    samples: int
    epochs: int  # local ones in a round
    wire_dtype: WireDType
    lora_rank: int
    lora_targets: LoraTargets
