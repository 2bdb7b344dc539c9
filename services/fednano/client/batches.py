"""Examples made ready for the LLM: token vectors before any adapter, what each is, and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import torch

from fednano.models.language_model import IGNORED, Modality, Segment, Sequences


@dataclass(frozen=True)
class Prepared:
    """One example. `base` never changes, as everything before the adapters is frozen."""

    base: torch.Tensor  # [tokens, hidden], before any adapter
    segments: tuple[Segment, ...]
    labels: torch.Tensor  # [tokens] int64; IGNORED but for the answer and its end token


@dataclass(frozen=True)
class Batch:
    """Examples packed one behind the other."""

    base: torch.Tensor  # [tokens, hidden]
    segments: tuple[tuple[Segment, ...], ...]
    labels: torch.Tensor  # [tokens]
    digests: tuple[bytes, ...] = ()
    """Of x of each of `pieces`, where it is already as a service holds it (factored.py)."""

    @classmethod
    def of(
        cls,
        examples: Sequence[Prepared],
        base: torch.Tensor | None = None,
        digests: tuple[bytes, ...] = (),
    ) -> Batch:
        """`base` stands for the examples' own, end to end."""
        return cls(
            base=torch.cat([e.base for e in examples]) if base is None else base,
            segments=tuple(e.segments for e in examples),
            labels=torch.cat([e.labels for e in examples]),
            digests=digests,
        )

    def __len__(self) -> int:
        return len(self.segments)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [sum(s.length for s in sample) for sample in self.segments]

    @cached_property
    def pieces(self) -> list[int]:
        """Tokens of each segment, of one sample after the other."""
        return [s.length for sample in self.segments for s in sample]

    @cached_property
    def sample_of(self) -> torch.Tensor:
        """[tokens]: the sample that each token belongs to."""
        return torch.repeat_interleave(torch.arange(len(self)), torch.tensor(self.lengths))

    @cached_property
    def label_counts(self) -> torch.Tensor:
        """[samples] float32: labelled tokens of each sample."""
        counts = torch.zeros(len(self))
        return counts.index_add_(0, self.sample_of, (self.labels != IGNORED).float())

    @cached_property
    def weights(self) -> torch.Tensor:
        """[samples]: of each sample's loss sum, for the batch's to be a mean of its samples' means."""
        return 1 / (self.label_counts * len(self))

    @cached_property
    def stretches(self) -> list[tuple[Modality, torch.Tensor]]:
        """Of `base`: views of what lies side by side and is of one modality, across samples."""
        kinds = [(s.modality, s.length) for sample in self.segments for s in sample]
        runs = [(m, sum(n for _, n in run)) for m, run in groupby(kinds, lambda kind: kind[0])]
        views = self.base.split([length for _, length in runs])
        return [(modality, x) for (modality, _), x in zip(runs, views, strict=True)]

    def to(self, device: torch.device) -> Batch:
        """With `base` there; everything else stays where requests are made."""
        if self.base.device.type == device.type:
            return self
        return replace(self, base=self.base.to(device))

    def rows(self, modality: Modality) -> torch.Tensor:
        """Indices into the packed tokens of all that are of one modality, on the CPU."""
        spans, offset = [], 0
        for sample, length in zip(self.segments, self.lengths, strict=True):
            for s in sample:
                if s.modality is modality:
                    spans.append(torch.arange(offset + s.start, offset + s.start + s.length))
            offset += length
        return torch.cat(spans) if spans else torch.empty(0, dtype=torch.long)

    def sequences(self, hidden: torch.Tensor) -> Sequences:
        """The batch as the LLM takes it: `hidden` [tokens, hidden] in place of `base`."""
        return Sequences(hidden, self.segments)
