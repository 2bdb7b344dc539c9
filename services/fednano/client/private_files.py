"""What a client keeps for itself between rounds and runs: files that only their owner can read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fednano.client.adapters import Tensors


def save(path: Path, tensors: Tensors, about: Mapping[str, str]) -> None:
    """Whole or not at all."""
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.touch(mode=0o600)
    save_file(tensors, unfinished, dict(about))
    unfinished.replace(path)


def load(path: Path) -> tuple[Tensors, Mapping[str, str]] | None:
    """None where there is nothing that can be read."""
    try:
        with safe_open(path, "numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata()
    except (FileNotFoundError, SafetensorError):
        return None


def under(prefix: str, tensors: Tensors) -> Tensors:
    """Those whose names begin so, by the rest of their names."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
