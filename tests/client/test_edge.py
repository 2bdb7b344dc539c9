"""What the adapters make of a batch, whole and taken apart, and what that keeps in memory."""

from __future__ import annotations

import torch
from fednano.client.adapters import NanoAdapters
from fednano.client.batches import Batch
from fednano.client.edge import NanoEdge
from fednano.models.language_model import Modality, Segment
from torch.autograd.graph import saved_tensors_hooks

from tests.tiny import large_tensors

RAW, TEXT, IMAGE = Modality.RAW, Modality.TEXT, Modality.IMAGE


def batch_of(*samples: list[tuple[Modality, int]], hidden: int = 128) -> Batch:
    """Random x, a sample's segments by modality and length."""
    segments = []
    for sample in samples:
        starts = [sum(n for _, n in sample[:i]) for i in range(len(sample))]
        segments.append(tuple(Segment(m, a, n) for (m, n), a in zip(sample, starts, strict=True)))
    tokens = sum(n for sample in samples for _, n in sample)
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(1))
    return Batch(x, tuple(segments), torch.zeros(tokens, dtype=torch.long))


MIXED = batch_of(
    [(TEXT, 2), (IMAGE, 16), (RAW, 1), (TEXT, 3)], [(TEXT, 4)], [(IMAGE, 5), (IMAGE, 6), (RAW, 2)]
)


def test_factors_make_what_the_adapters_make(adapters: NanoAdapters) -> None:
    """Stretches of one modality reach across segments and samples; raw tokens pass no adapter."""
    nano = NanoEdge(adapters)
    sent, wanted = nano.factored(MIXED), nano(MIXED)
    torch.testing.assert_close(sent.dense().values, wanted, rtol=1e-5, atol=1e-5)
    assert not sent.left[18].any()
    assert torch.equal(sent.dense().values[18], MIXED.base[18])


def test_gradients_through_the_factors_are_those_of_the_adapters(adapters: NanoAdapters) -> None:
    nano, parameters = NanoEdge(adapters), list(adapters.parameters())
    hidden = nano(MIXED)
    above = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    wanted = torch.autograd.grad(hidden, parameters, above)
    sent = nano.factored(MIXED)
    gradient = sent.gradient(above)
    found = torch.autograd.grad(
        [sent.left, *sent.right.values()],
        parameters,
        [gradient.left, *(gradient.right[m] for m in sent.right)],
    )
    for own, other in zip(found, wanted, strict=True):
        assert other.norm() > 0
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


def test_the_factored_way_back_keeps_no_copy_of_x() -> None:
    """A client's memory would hold it twice."""
    nano = NanoEdge(NanoAdapters.from_tensors(large_tensors(rank=4), 0.7))
    kept: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        nano.factored(MIXED)
    x = MIXED.base.untyped_storage().data_ptr()
    own = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() != x]
    assert len(own) < len(kept)
    assert sum(tensor.numel() for tensor in own) <= 4 * 4 * 128  # A and B, at most
