"""Small random causal LMs of several families, and packed sequences for them."""

from __future__ import annotations

import torch
from fednano.models.frozen import FrozenLLM
from fednano.models.language_model import IGNORED, Modality, Segment, Sequences
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

HIDDEN, VOCABULARY, POSITIONS, STOP = 32, 64, 48, 2
LENGTHS = (7, 3, 11)
FAMILIES = ("llama", "qwen2", "gemma2")
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.3,
    "eos_token_id": STOP,
    "pad_token_id": 0,
}


def build(family: str = "llama", positions: int = POSITIONS) -> PreTrainedModel:
    """Gemma 2 scales embeddings, soft-caps logits and has a sliding window in every other layer."""
    torch.manual_seed(7)
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**_SIZES)).eval()
    if family == "gemma2":
        more = {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 3.0}
        return Gemma2ForCausalLM(Gemma2Config(**_SIZES, **more)).eval()
    return LlamaForCausalLM(LlamaConfig(**{**_SIZES, "max_position_embeddings": positions})).eval()


def packed(engine: FrozenLLM, lengths: tuple[int, ...] = LENGTHS, seed: int = 1) -> Sequences:
    """Random prompts whose values have been shifted a little, as adapters do."""
    made = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (sum(lengths),), generator=made)
    values = engine.embed(ids)
    values = values + 0.1 * torch.randn(values.shape, generator=made)
    segments = tuple((Segment(Modality.TEXT, 0, n),) for n in lengths)
    return Sequences(values, segments)


def several_labels(lengths: tuple[int, ...] = LENGTHS, seed: int = 2) -> torch.Tensor:
    """The second half of each sample is labelled."""
    ids = torch.randint(
        3, VOCABULARY, (sum(lengths),), generator=torch.Generator().manual_seed(seed)
    )
    asked = torch.cat([torch.arange(n) >= (n + 1) // 2 for n in lengths])
    return ids.where(asked, torch.tensor(IGNORED))
