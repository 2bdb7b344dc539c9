"""What can be chosen of how the LLM computes; without torch, for the settings."""

from __future__ import annotations

from typing import Literal

Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]
Weights = Literal["auto", "int8", "nf4"]
Checkpointing = Literal["auto", "on", "off"]
