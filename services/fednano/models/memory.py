"""Too little memory: how torch says so, and a way to need less of it.

A forward pass with its graph keeps every layer's intermediate results until the way back. A layer
that is computed again there need only keep what it was fed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from fednano.models.layers import layers

_NO_MEMORY = ("can't allocate memory", "out of memory")  # as torch says it of a CPU's


def out_of_memory(error: Exception) -> bool:
    """On a GPU it has a type of its own; on a CPU it is a RuntimeError that says so."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def free_memory() -> None:
    """Gives back what torch holds for later."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextmanager
def recomputed(model: PreTrainedModel) -> Iterator[None]:
    """What is computed in here with a graph keeps of each layer only what it was fed.

    The way back may come later. It gives the same bytes: nothing in a layer is random here.
    Transformers' own switch asks for `training`, which turns some families' dropout on.
    """
    before = [(layer, layer.__dict__.get("forward")) for layer in layers(model)]
    for layer, _ in before:
        layer.__dict__["forward"] = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for layer, own in before:
            del layer.__dict__["forward"]
            if own is not None:  # of a layer that accelerate brings to the device
                layer.__dict__["forward"] = own
