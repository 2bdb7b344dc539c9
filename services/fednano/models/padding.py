"""Where packed tokens lie in a left-padded batch, and which of them predict a label."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fednano.models.language_model import IGNORED


@dataclass(frozen=True)
class Predictions:
    """The tokens whose logits are held against a label: those just before a labelled one."""

    positions: torch.Tensor  # [labelled], indices into the packed tokens
    targets: torch.Tensor  # [labelled], the label that follows each
    counts: tuple[int, ...]  # by sample, how many of them are its own

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """values [labelled] to their sum over each sample [samples].

        Sample by sample: a scatter would add in another order on each run of a GPU.
        """
        return torch.stack([part.sum() for part in values.split(self.counts)])


@dataclass(frozen=True)
class Padding:
    """A batch of sequences, padded on the left to the longest."""

    lengths: tuple[int, ...]  # [samples]
    rows: torch.Tensor  # [tokens], the sample of each packed token
    columns: torch.Tensor  # [tokens], its column in the padded batch
    mask: torch.Tensor  # [samples, longest], 1 where there is a token
    position_ids: torch.Tensor  # [samples, longest], from 0 in each sample

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device) -> Padding:
        """The padding of samples of these lengths, each at least 1."""
        sizes = torch.tensor(lengths, device=device)
        column = torch.arange(max(lengths), device=device)
        position_ids = column - (max(lengths) - sizes)[:, None]
        mask = position_ids >= 0
        rows, columns = mask.nonzero(as_tuple=True)
        return cls(lengths, rows, columns, mask.long(), position_ids.clamp(min=0))

    def pad(self, values: torch.Tensor) -> torch.Tensor:
        """values [tokens, hidden] to [samples, longest, hidden]; gradients flow back."""
        padded = values.new_zeros(*self.mask.shape, values.shape[-1])
        return padded.index_put((self.rows, self.columns), values)

    def predictions(self, labels: torch.Tensor) -> Predictions:
        """What `labels` [tokens] ask for.

        Nothing comes before a sample's first token, so a label there is never predicted.
        """
        labels = labels.to(self.rows.device, torch.long)
        wanted = (labels != IGNORED) & (self.position_ids[self.rows, self.columns] > 0)
        labelled = wanted.nonzero(as_tuple=True)[0]
        counts = torch.bincount(self.rows[labelled], minlength=len(self.lengths)).tolist()
        return Predictions(labelled - 1, labels[labelled], tuple(counts))
