"""Client-side loss: logits come from the LLM, the loss and its gradient are the client's own.

This is for losses of one's own, and not for privacy: d loss / d logits gives the labels away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from fednano.client.portions import WHOLE, Limited, joined
from fednano.models.language_model import IGNORED, LanguageModel, Sequences, StepResult


@dataclass(frozen=True)
class LogitsLoss:
    """The loss of sample i is the sum over its labelled tokens; the gradient is that of
    sum_i weights[i] * loss_i with respect to the logits."""

    loss_sums: torch.Tensor  # [samples] float32
    token_counts: torch.Tensor  # [samples] int32, labelled tokens
    gradient: torch.Tensor  # [labelled, vocabulary]

    @classmethod
    def of(
        cls,
        logits: torch.Tensor,
        positions: torch.Tensor,
        lengths: Sequence[int],
        labels: torch.Tensor,
        weights: torch.Tensor,
    ) -> LogitsLoss:
        """Cross entropy of `logits` [labelled, vocabulary] at `predicting_positions`."""
        logits = logits.cpu().clone().requires_grad_()
        losses = cross_entropy(logits.float(), labels[positions + 1], reduction="none")
        samples = len(lengths)
        sample_of = torch.arange(samples).repeat_interleave(torch.tensor(lengths))[positions]
        loss_sums = torch.zeros(samples).index_add(0, sample_of, losses)
        (loss_sums * weights).sum().backward()
        assert logits.grad is not None
        counts = torch.bincount(sample_of, minlength=samples).int()
        return cls(loss_sums.detach(), counts, logits.grad)


def predicting_positions(lengths: Sequence[int], labels: torch.Tensor) -> torch.Tensor:
    """[labelled]: for each labelled token, the packed index of the token before it in its sample."""
    labelled = (labels != IGNORED).nonzero().flatten()
    firsts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    return labelled[~torch.isin(labelled, firsts)] - 1


def client_side_step(
    llm: LanguageModel, sequences: Sequences, labels: torch.Tensor, weights: torch.Tensor
) -> StepResult:
    """The same as `llm.step`, in two round trips for each portion that the LLM takes at once."""
    portions = llm.portions(sequences, labels) if isinstance(llm, Limited) else [WHOLE]
    found = [
        _step(llm, portion.of(sequences), labels[portion.tokens], weights[portion.samples])
        for portion in portions
    ]
    return StepResult(
        joined([part.loss_sums for part in found]),
        joined([part.token_counts for part in found]),
        joined([part.gradient for part in found]),
    )


def _step(
    llm: LanguageModel, sequences: Sequences, labels: torch.Tensor, weights: torch.Tensor
) -> StepResult:
    positions = predicting_positions(sequences.lengths, labels)
    reply = llm.forward(sequences, positions)
    loss = LogitsLoss.of(reply.logits, positions, sequences.lengths, labels, weights)
    gradient = llm.backward(reply.activation, loss.gradient, sequences, positions)
    return StepResult(loss.loss_sums, loss.token_counts, gradient)
