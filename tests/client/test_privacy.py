"""What the LLM's operator can read: docs/privacy.md states it, and this shows that it is true."""

from __future__ import annotations

import torch
from fednano.client.adapters import NanoAdapters
from fednano.client.batches import Batch
from fednano.client.digits import examples_of, load_split
from fednano.client.edge import EdgeHalf, NanoEdge
from fednano.client.losses import predicting_positions
from fednano.models.frozen import FrozenLLM
from fednano.models.language_model import IGNORED, Modality
from torch.nn.functional import cross_entropy

from tests.tiny import large_tensors


def small_adapters() -> NanoAdapters:
    """Of the size that training leaves behind: a fifth of the embedding's norm."""
    tensors = large_tensors()
    return NanoAdapters.from_tensors({n: t * 0.2 for n, t in tensors.items()}, scale=0.7)


def seen_by_the_server(edge: EdgeHalf) -> tuple[Batch, torch.Tensor]:
    digits = load_split("train")[:8]
    batch = Batch.of([edge.prepare(e) for digit in digits for e in examples_of(digit)])
    return batch, NanoEdge(small_adapters())(batch).detach()


def test_text_tokens_are_read_by_nearest_neighbours(edge: EdgeHalf, frozen: FrozenLLM) -> None:
    batch, sent = seen_by_the_server(edge)
    table = frozen.embed(torch.arange(frozen.vocabulary))
    rows = batch.rows(Modality.TEXT)
    truth = torch.cdist(batch.base[rows], table).argmin(1)
    assert not torch.equal(sent[rows], batch.base[rows])
    guessed = torch.cdist(sent[rows], table).argmin(1)
    assert (guessed == truth).float().mean() > 0.99


def test_client_side_loss_gives_every_label_away(edge: EdgeHalf, frozen: FrozenLLM) -> None:
    batch, sent = seen_by_the_server(edge)
    sequences = batch.sequences(sent)
    positions = predicting_positions(batch.lengths, batch.labels)
    logits = frozen.forward(sequences, positions, keep=False).logits.clone().requires_grad_()
    labels = batch.labels[batch.labels != IGNORED]
    cross_entropy(logits, labels).backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad.argmin(1), labels)
