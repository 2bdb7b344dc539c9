"""What an adapter's tensors are: of each modality A [r, d] as `<modality>.down`, random at first, and
B [d, r] as `<modality>.up`, zero at first. Both sides draw and cut them, and must do it alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

DOWN, UP = ".down", ".up"
Tensors = dict[str, NDArray[np.float32]]


def drawn(modalities: Iterable[str], rank: int, hidden_size: int, seed: Sequence[int]) -> Tensors:
    """A uniform in +-1/sqrt(hidden) by seed and modality, B zero: it changes nothing yet."""
    tensors: Tensors = {}
    bound = 1 / np.sqrt(hidden_size)
    for modality in modalities:
        rng = np.random.default_rng([*seed, *modality.encode()])
        down = rng.uniform(-bound, bound, (rank, hidden_size))
        tensors[modality + DOWN] = down.astype(np.float32)
        tensors[modality + UP] = np.zeros((hidden_size, rank), np.float32)
    return tensors


def cut(tensors: Mapping[str, NDArray[np.float32]], rank: int) -> Tensors:
    """The first `rank` rows of every A and columns of every B."""
    return {
        name: tensor[:rank] if name.endswith(DOWN) else tensor[:, :rank]
        for name, tensor in tensors.items()
    }
