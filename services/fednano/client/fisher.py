"""The diagonal empirical Fisher of the adapters, from gradients that training has anyway.

F = mean over samples of the squared gradient of that sample's mean loss over its labelled tokens.
The square of a batch's gradient is something else.
"""

from __future__ import annotations

import torch

from fednano.client.adapters import NanoAdapters, Tensors
from fednano.client.batches import Batch


class FisherEstimate:
    """Adds up squared per-sample gradients at the adapters' values of the moment."""

    def __init__(self, adapters: NanoAdapters) -> None:
        self._adapters = adapters
        self._sums = {name: torch.zeros(t.shape) for name, t in adapters.to_tensors().items()}
        self._samples = 0

    @torch.no_grad()
    def add(self, batch: Batch, gradient: torch.Tensor, weights: torch.Tensor) -> None:
        """`gradient` [tokens, hidden] is that of sum_i weights[i] * (loss sum of sample i)."""
        per_token = 1 / (batch.label_counts * weights)  # undoes the weighting, leaves sample means
        own = gradient * per_token[batch.sample_of, None]
        for modality, adapter in self._adapters.items():
            rows = batch.rows(modality)
            if not len(rows):
                continue
            x, g = _by_sample(batch, rows, batch.base), _by_sample(batch, rows, own)
            down = torch.einsum("btr,btd->brd", g @ adapter.up, x) * adapter.scale
            up = torch.einsum("btd,btr->bdr", g, x @ adapter.down.T) * adapter.scale
            name = modality.name.lower()
            self._sums[f"{name}.down"] += down.square().sum(0)
            self._sums[f"{name}.up"] += up.square().sum(0)
        self._samples += len(batch)

    def mean(self) -> Tensors:
        """By `fisher.<tensor>`, fp32; zero where no sample touched a tensor."""
        count = max(self._samples, 1)
        return {f"fisher.{name}": (total / count).numpy() for name, total in self._sums.items()}


def _by_sample(batch: Batch, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The rows of each sample side by side, padded with zeros: [samples, longest, hidden]."""
    samples = batch.sample_of[rows]
    counts = torch.bincount(samples, minlength=len(batch))
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(rows)) - starts[samples]
    table = values.new_zeros(len(batch), int(counts.max()), values.shape[1])
    table[samples, place] = values[rows]
    return table
