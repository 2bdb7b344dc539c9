"""The models that steps are measured with, whole and cut in two."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils.logging import disable_progress_bar

from fednano.lab.federation import TINY_MODEL
from fednano.lab.tiny_llava import CHAT_TEMPLATE, EOS, IMAGE, PAD, build_tokenizer
from fednano.models.split import SplitReport, split

_SIDE, _PATCH = 64, 8  # pixels; 64 image tokens
_VOCABULARY = 32_000


@dataclass(frozen=True)
class Model:
    """A checkpoint, its halves, and what its rows say of it."""

    name: str
    halves: Path
    side: int  # of its images, in pixels
    report: SplitReport

    @property
    def parameters(self) -> str:
        edge, llm = self.report.edge.parameters, self.report.llm.parameters
        return f"{(edge + llm) / 1e6:.1f} M, {edge / 1e6:.1f} M of them on the client"


def tiny(directory: Path) -> Model:
    """The shipped one."""
    halves = directory / "tiny"
    return Model("tiny", halves, 32, split(TINY_MODEL, halves))


def hundred(directory: Path) -> Model:
    """A random LLaVA of about 100 M parameters, a quarter of them the vision tower; made anew each
    time from the same seed, as its weights don't matter and would weigh 400 MB."""
    disable_progress_bar()
    whole, halves = directory / "100m-whole", directory / "100m"
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(_config()).float().eval()
    model.save_pretrained(whole)
    build_processor(_SIDE, _PATCH).save_pretrained(whole)
    return Model("100 M", halves, _SIDE, split(whole, halves))


def _config() -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        image_size=_SIDE,
        patch_size=_PATCH,
        projection_dim=512,
    )
    text = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=640,
        intermediate_size=1728,
        num_hidden_layers=10,
        num_attention_heads=10,
        num_key_value_heads=10,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(_SIDE // _PATCH) ** 2,
        tie_word_embeddings=True,
    )


def build_processor(side: int, patch: int) -> LlavaProcessor:
    """For images of `side` pixels, cut into patches; the tiny model's words."""
    half = [0.5, 0.5, 0.5]
    images = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=half,
        image_std=half,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=patch,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )
