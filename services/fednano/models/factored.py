"""Embeddings in factored form: x + U W, where x never changes and U and W are all that does.

Everything before the adapters is frozen, so x of a sample can be sent once. With an adapter
x + s B A x of rank r, U = A x is [tokens, r] and W = s B^T is [r, hidden]; by the chain rule
dL/dU = g W^T and dL/dW = sum U^T g, so g = dL/d(x + U W) [tokens, hidden] need not travel either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fednano.models.language_model import Modality, Segment, Sequences
from fednano.wire.codec import Buffer
from fednano.wire.tensor_pb2 import BF16, FP32, DType, TensorSpec

Segments = tuple[tuple[Segment, ...], ...]


@dataclass(frozen=True)
class FactoredGradient:
    """With respect to what was sent, in float32."""

    left: torch.Tensor  # dL/dU [tokens, rank]; zero where no W applies
    right: dict[Modality, torch.Tensor]  # dL/dW [rank, hidden]
    fisher: dict[Modality, torch.Tensor]
    """sum_i (U_i^T g_i)^2 [rank, hidden] over samples i, each with its weight in g_i; empty where
    not asked for."""


@dataclass(frozen=True)
class Factored:
    """A batch of token vectors as x + U W, W by each segment's modality; where there is none, x."""

    base: torch.Tensor  # x [tokens, hidden]
    left: torch.Tensor  # U [tokens, rank]
    right: Mapping[Modality, torch.Tensor]  # W [rank, hidden]
    segments: Segments

    def without_base(self) -> Factored:
        """All that `gradient` needs."""
        return replace(self, base=self.base.new_empty(0, self.base.shape[1]))

    def to(self, device: torch.device) -> Factored:
        """The same, float32, on `device`."""
        right = {m: w.to(device, torch.float32) for m, w in self.right.items()}
        base, left = (t.to(device, torch.float32) for t in (self.base, self.left))
        return Factored(base, left, right, self.segments)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sample."""
        return tuple(sum(s.length for s in sample) for sample in self.segments)

    @property
    def pieces(self) -> tuple[int, ...]:
        """Tokens of each segment, of one sample after the other: x lies at the service so."""
        return tuple(s.length for sample in self.segments for s in sample)

    @torch.no_grad()
    def dense(self) -> Sequences:
        """What an LLM is fed: values [tokens, hidden], of x's dtype."""
        values = self.base
        for modality, right in self.right.items():
            rows = torch.cat(_rows(self.segments, modality)).to(values.device)
            values = values.index_add(0, rows, self.left[rows] @ right)
        return Sequences(values, self.segments)

    @torch.no_grad()
    def gradient(self, dense: torch.Tensor, want_fisher: bool = False) -> FactoredGradient:
        """From the gradient g [tokens, hidden] of the dense values."""
        g = dense.to(self.left.device, torch.float32)
        left, right, fisher = torch.zeros_like(self.left), {}, {}
        for modality, w in self.right.items():
            by_sample = _rows(self.segments, modality)
            rows = torch.cat(by_sample).to(g.device)  # at once: a GPU is waited for at each copy
            left[rows] = g[rows] @ w.T
            if want_fisher:
                own = rows.split([len(rows) for rows in by_sample])
                right[modality], fisher[modality] = self._summed(g, own, w)
            else:
                right[modality] = self.left[rows].T @ g[rows]
        return FactoredGradient(left, right, fisher)

    def _summed(
        self, g: torch.Tensor, by_sample: Sequence[torch.Tensor], w: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """sum_i U_i^T g_i and the sum of its squares: one sample's at a time is held."""
        total, squares = torch.zeros_like(w), torch.zeros_like(w)
        for rows in by_sample:
            own = self.left[rows].T @ g[rows]
            total += own
            squares += own.square()
        return total, squares


def fisher_dtype(gradient: DType) -> DType:
    """Of the Fisher part, beside a gradient in that dtype: squares of small numbers need float32's
    range, but not its precision where nothing else has it."""
    return FP32 if gradient == FP32 else BF16


def base_digest(fingerprint: str, spec: TensorSpec, data: Buffer) -> bytes:
    """The address of a piece of x: SHA-256 over model, dtype, shape and bytes."""
    name = f"{fingerprint} {DType.Name(spec.dtype)} {list(spec.shape)}\n"
    found = hashlib.sha256(name.encode())
    found.update(data)
    return found.digest()


def _rows(segments: Segments, modality: Modality) -> list[torch.Tensor]:
    """By sample: indices into the packed tokens of all that are of one modality."""
    found, offset = [], 0
    for sample in segments:
        spans = [
            torch.arange(offset + s.start, offset + s.start + s.length)
            for s in sample
            if s.modality is modality
        ]
        found.append(torch.cat(spans) if spans else torch.empty(0, dtype=torch.long))
        offset += sum(s.length for s in sample)
    return found
