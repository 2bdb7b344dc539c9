"""LLaVA and its like: a CLIP-style vision tower, a projector, and a causal LM.

The vision half keeps the stock names, so that its weights are those of the checkpoint, key for key.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel
from transformers.modeling_utils import PreTrainedModel

FAMILY = "llava"
EDGE_PARTS = ("vision_tower", "multi_modal_projector")
CONNECTOR = "multi_modal_projector"
CONNECTOR_OUTPUT = f"{CONNECTOR}.linear_2"
"""The last linear layer before the LLM: where an exported image adapter sits."""


class LlavaFront(torch.nn.Module):
    """Vision tower and projector: pixels to vectors in the LLM's embedding space."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self._model = LlavaModel(_without_llm(config))
        del self._model.language_model
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, directory: Path, config: LlavaConfig, dtype: torch.dtype) -> LlavaFront:
        """From the edge half's directory."""
        front = cls(config)
        front._model.load_state_dict(load_file(directory / "model.safetensors"), strict=True)
        return front.to(dtype)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @torch.inference_mode()
    def encode(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """pixel_values [images, 3, height, width] to one [image tokens, hidden] for each image."""
        pixels = pixel_values.to(self.device, self.dtype)
        output = self._model.get_image_features(pixel_values=pixels, return_dict=True)
        return [features.clone() for features in output.pooler_output]


def _without_llm(config: LlavaConfig) -> LlavaConfig:
    """The same configuration with an LLM that costs nothing to build."""
    small = copy.deepcopy(config)
    text: Any = small.text_config
    text.num_hidden_layers = 0
    text.vocab_size = 2
    text.pad_token_id = None
    return small


def edge_weights(model: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The tensors of the client's half, by their stock names."""
    return {
        f"{part}.{name}": tensor.contiguous()
        for part in EDGE_PARTS
        for name, tensor in getattr(model.model, part).state_dict().items()
    }


def causal_lm(model: LlavaForConditionalGeneration) -> PreTrainedModel:
    """The LLM inside as a stock causal LM; it shares the weights."""
    from transformers import AutoModelForCausalLM

    text_config = copy.deepcopy(model.config.get_text_config())
    text_config.dtype = model.dtype
    with torch.device("meta"):
        causal: PreTrainedModel = AutoModelForCausalLM.from_config(text_config)
    weights = {f"model.{name}": t for name, t in model.model.language_model.state_dict().items()}
    causal.load_state_dict({**weights, "lm_head.weight": model.lm_head.weight}, assign=True)
    causal.generation_config = copy.deepcopy(model.generation_config)
    return causal
