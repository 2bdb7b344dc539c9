"""Key-value caches of several batches as one: rows that come and go between two tokens.

All rows are aligned at their newest token, so a cache that is too short is padded at its beginning, and
one that is longer than its rows is cut there; the attention mask hides what is padding.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def can_grow(cache: Any) -> bool:
    """Whether all its layers are rows of keys and values; a recurrent state is not."""
    layers: Any = getattr(cache, "layers", None)
    return bool(layers) and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers
    )


def narrowed(cache: Any, rows: Sequence[int], width: int, wanted: int) -> Any:
    """A cache of those rows, `wanted` tokens wide where `cache` is `width`, which it leaves alone.

    A cache that can't grow keeps its width.
    """
    if can_grow(cache):
        made = copy.copy(cache)
        made.layers = [copy.copy(layer) for layer in cache.layers]
    else:
        made = copy.deepcopy(cache)  # it may change its states in place
    made.batch_select_indices(torch.tensor(rows))  # of no device: layers may lie on several
    if can_grow(made):
        for layer in made.layers:
            _set_width(layer, width, wanted)
    return made


def gathered(caches: Sequence[Any]) -> Any:
    """One cache with the rows of all, which are equally wide."""
    made = caches[0]
    if len(caches) == 1:
        return made
    for index, layer in enumerate(made.layers):
        if layer.is_initialized:
            layer.keys = torch.cat([cache.layers[index].keys for cache in caches])
            layer.values = torch.cat([cache.layers[index].values for cache in caches])
    return made


def _set_width(layer: Any, width: int, wanted: int) -> None:
    """A sliding window holds at most its own length less one of them."""
    if not layer.is_initialized:  # it shares another layer's keys
        return
    held = wanted
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length += wanted - width
        held = min(wanted, layer.sliding_window - 1)
    more = held - layer.keys.shape[-2]
    # Negative padding cuts.
    layer.keys, layer.values = (pad(part, (0, 0, more, 0)) for part in (layer.keys, layer.values))
