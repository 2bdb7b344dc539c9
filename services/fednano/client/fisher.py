"""The diagonal empirical Fisher of the adapters, from gradients that training has anyway.

F = mean over samples of the squared gradient of that sample's mean loss over its labelled tokens.
The square of a batch's gradient is something else.
"""

from __future__ import annotations

import torch

from fednano.client.adapters import NanoAdapters, Tensors
from fednano.client.batches import Batch
from fednano.models.factored import FactoredGradient


class FisherEstimate:
    """Adds up squared per-sample gradients at the adapters' values of the moment."""

    def __init__(self, adapters: NanoAdapters) -> None:
        self._adapters = adapters
        self._sums = {name: torch.zeros_like(p) for name, p in adapters.named().items()}
        self._samples = 0

    @torch.no_grad()
    def add(self, batch: Batch, gradient: torch.Tensor, weights: torch.Tensor) -> None:
        """`gradient` [tokens, hidden] is that of sum_i weights[i] * (loss sum of sample i)."""
        per_token = 1 / (batch.label_counts * weights)  # undoes the weighting, leaves sample means
        own = (gradient * per_token[batch.sample_of, None].to(gradient.device)).to(
            batch.base.device
        )
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

    @torch.no_grad()
    def add_factored(self, batch: Batch, gradient: FactoredGradient, weights: torch.Tensor) -> None:
        """The same from the gradient of x + U W, where g stays with the service.

        B's part is the service's sum over samples of (U_i^T g_i)^2, as W = s B^T. Weights can't be
        taken out of a sum any more, so they must weigh each sample's mean alike.
        """
        factors = 1 / (batch.label_counts * weights)
        factor = float(factors.mean())
        assert torch.allclose(factors, factors.mean(), rtol=1e-4), "samples are weighed differently"
        own = gradient.left * factors[batch.sample_of, None].to(gradient.left.device)
        for modality, adapter in self._adapters.items():
            rows = batch.rows(modality)
            if not len(rows):
                continue
            rank, name = len(adapter.down), modality.name.lower()
            left = _by_sample(batch, rows, own)[..., :rank].to(batch.base.device)
            down = torch.einsum("btr,btd->brd", left, _by_sample(batch, rows, batch.base))
            up = gradient.fisher[modality][:rank].T * (adapter.scale * factor) ** 2
            self._sums[f"{name}.down"] += down.square().sum(0)
            self._sums[f"{name}.up"] += up.to(down.device)
        self._samples += len(batch)

    def mean(self) -> Tensors:
        """By `fisher.<tensor>`, fp32; zero where no sample touched a tensor."""
        count = max(self._samples, 1)
        return {
            f"fisher.{name}": (total / count).cpu().numpy() for name, total in self._sums.items()
        }


def _by_sample(batch: Batch, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The rows of each sample side by side, padded with zeros: [samples, longest, hidden]."""
    samples = batch.sample_of[rows]
    counts = torch.bincount(samples, minlength=len(batch))
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(rows)) - starts[samples]
    table = values.new_zeros(len(batch), int(counts.max()), values.shape[1])
    table[samples, place] = values[rows]
    return table
