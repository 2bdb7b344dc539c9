"""LLaVA-1.5-7B's shape where the wire and the client see it: 336 pixels, 576 image tokens, vectors of
4096. The LLM behind it is one small layer, as the client doesn't notice and few machines hold 7 B."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.utils.logging import disable_progress_bar

from fednano.lab.bench.checkpoints import Model, build_processor
from fednano.lab.tiny_llava import EOS, IMAGE, PAD
from fednano.models.split import split

SIDE, PATCH, HIDDEN = 336, 14, 4096
BATCH, TOKENS, RANK = 16, 700, 64
"""The step that is measured: samples, tokens of each, and rank of the adapters."""


@dataclass(frozen=True)
class Weights:
    """Of a model that was not made: its parameters, and what they take in bf16."""

    parameters: int

    @property
    def bytes(self) -> int:
        return 2 * self.parameters


def whole_llava() -> Weights:
    """All of LLaVA-1.5-7B's, counted on the meta device."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(_published())
    return Weights(sum(parameter.numel() for parameter in model.parameters()))


def embedding_table() -> Weights:
    """Of LLaVA-1.5-7B; a client has it only if it was split so."""
    return Weights(published_text().vocab_size * HIDDEN)


def published_text() -> LlamaConfig:
    """Of LLaVA-1.5-7B's LLM."""
    text: LlamaConfig = _published().text_config
    return text


def _published() -> Any:
    """The configuration that `fednano account` ships."""
    from fednano.models.account import built_in  # PEFT comes with it: not into a measured client

    return LlavaConfig.from_pretrained(built_in()["llava-1.5-7b"])


def clip_large() -> CLIPVisionConfig:
    """CLIP ViT-L/14-336, which LLaVA-1.5 sees with."""
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=768,
    )


def clip_small(side: int = SIDE, patch: int = PATCH) -> CLIPVisionConfig:
    """As many image tokens, for next to nothing."""
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=patch,
        projection_dim=32,
    )


def wide(
    directory: Path,
    name: str,
    vision: CLIPVisionConfig,
    dtype: torch.dtype,
    hidden: int = HIDDEN,
) -> Model:
    """A checkpoint with random weights in `dtype`, cut in two by the real split."""
    whole, halves = directory / f"{name}-whole", directory / name
    side, patch = _pixels(vision)
    processor = build_processor(side, patch)
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    disable_progress_bar()
    torch.manual_seed(0)
    model: Any = LlavaForConditionalGeneration(_config(vision, text))
    model.to(dtype).save_pretrained(whole)
    processor.save_pretrained(whole)
    return Model(name, halves, side, split(whole, halves))


def _pixels(vision: Any) -> tuple[int, int]:
    """Of a side, and of a patch's."""
    return vision.image_size, vision.patch_size


def _config(vision: CLIPVisionConfig, text: LlamaConfig) -> LlavaConfig:
    side, patch = _pixels(vision)
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(side // patch) ** 2,
        tie_word_embeddings=text.tie_word_embeddings,
    )
