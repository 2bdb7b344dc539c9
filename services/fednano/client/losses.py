"""Client-side loss: logits come from the LLM, the loss and its gradient are the client's own.

This is for losses of one's own, and not for privacy: d loss / d logits gives the labels away.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from fednano.client.portions import WHOLE, Limited, joined
from fednano.models.language_model import IGNORED, LanguageModel, Sequences, StepResult


def predicting_positions(sequences: Sequences, labels: torch.Tensor) -> torch.Tensor:
    """[labelled]: for each labelled token, the packed index of the token before it in its sample."""
    labelled = (labels != IGNORED).nonzero().flatten()
    firsts = torch.tensor([0, *sequences.lengths[:-1]]).cumsum(0)
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
    positions = predicting_positions(sequences, labels)
    reply = llm.forward(sequences, positions)
    logits = reply.logits.clone().requires_grad_()  # [labelled, vocabulary]
    losses = cross_entropy(logits.float(), labels[positions + 1], reduction="none")
    samples = len(sequences.segments)
    lengths = torch.tensor(sequences.lengths)
    sample_of = torch.repeat_interleave(torch.arange(samples), lengths)[positions]
    loss_sums = torch.zeros(samples).index_add(0, sample_of, losses)
    (loss_sums * weights).sum().backward()
    assert logits.grad is not None
    return StepResult(
        loss_sums=loss_sums.detach(),
        token_counts=torch.bincount(sample_of, minlength=samples).int(),
        gradient=llm.backward(reply.activation, logits.grad, sequences, positions),
    )
