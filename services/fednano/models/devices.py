"""Where something computes, by name."""

from __future__ import annotations

from typing import Literal

import torch

from fednano.wire.errors import InvalidRequest

DeviceName = Literal["auto", "cpu", "cuda"]


def pick_device(name: DeviceName) -> torch.device:
    """Raises InvalidRequest where a GPU is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest.of("device", "a CUDA device that torch can use", "none")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
