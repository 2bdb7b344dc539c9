"""The two ways in which a batch crosses the cut, and in which its gradient comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from fednano.client.batches import Batch, Prepared
from fednano.client.edge import NanoEdge
from fednano.client.factored import FactoredLanguageModel
from fednano.client.fisher import FisherEstimate
from fednano.client.losses import client_side_step
from fednano.client.messages import unheard
from fednano.models.language_model import LanguageModel, LowRank, NewToken, Sampling, ScoreResult


@dataclass(frozen=True)
class Crossed:
    """What a step gave."""

    loss_sums: torch.Tensor  # [samples]
    token_counts: torch.Tensor  # [samples]
    backward: Callable[[], None]
    """Goes on from the cut into the adapters."""


class Wire(Protocol):
    """Puts batches to an LLM, adapters applied."""

    def ready(self, examples: Sequence[Prepared]) -> Batch:
        """A batch, and all that can be done to it before the adapters are known. Any other batch may
        be put to the LLM too: then this is done at each call."""
        ...

    def step(
        self,
        nano: NanoEdge,
        batch: Batch,
        estimate: FisherEstimate | None,
        under_way: Callable[[], None] = unheard,
    ) -> Crossed:
        """The gradient is that of sum_i weights[i] * loss_i, by the batch's weights; `estimate` is told
        of it, and `under_way` when there is little to do here until the LLM has answered: once or more,
        by any thread."""
        ...

    def score(self, nano: NanoEdge, batch: Batch) -> ScoreResult: ...

    def generate(
        self, nano: NanoEdge, batch: Batch, sampling: Sampling, text: LowRank | None
    ) -> Iterator[list[NewToken]]: ...


@dataclass(frozen=True)
class DenseWire:
    """A vector per token there, its gradient back."""

    llm: LanguageModel
    loss: str = "server"

    def ready(self, examples: Sequence[Prepared]) -> Batch:
        return Batch.of(examples)

    def step(
        self,
        nano: NanoEdge,
        batch: Batch,
        estimate: FisherEstimate | None,
        under_way: Callable[[], None] = unheard,
    ) -> Crossed:
        hidden = nano(batch)  # [tokens, hidden], adapters applied
        sequences, weights = batch.sequences(hidden.detach()), batch.weights
        under_way()
        if self.loss == "client":
            reply = client_side_step(self.llm, sequences, batch.labels, weights)
        else:
            reply = self.llm.step(sequences, batch.labels, weights)
        if estimate is not None:
            estimate.add(batch, reply.gradient, weights)
        gradient = reply.gradient.to(hidden.device)
        return Crossed(reply.loss_sums, reply.token_counts, lambda: hidden.backward(gradient))

    def score(self, nano: NanoEdge, batch: Batch) -> ScoreResult:
        return self.llm.score(batch.sequences(nano(batch)), batch.labels)

    def generate(
        self, nano: NanoEdge, batch: Batch, sampling: Sampling, text: LowRank | None
    ) -> Iterator[list[NewToken]]:
        return self.llm.generate(batch.sequences(nano(batch)), sampling, text)


@dataclass(frozen=True)
class FactoredWire:
    """x once; then U and W there, their gradients back."""

    llm: FactoredLanguageModel
    loss: str = "server"

    def ready(self, examples: Sequence[Prepared]) -> Batch:
        pieces = [x for e in examples for x in e.base.split([s.length for s in e.segments])]
        return Batch.of(examples, *self.llm.held(pieces))

    def step(
        self,
        nano: NanoEdge,
        batch: Batch,
        estimate: FisherEstimate | None,
        under_way: Callable[[], None] = unheard,
    ) -> Crossed:
        held, weights = self._held(batch), batch.weights
        sent = nano.factored(held)
        step = self.llm.client_side_step if self.loss == "client" else self.llm.step
        reply = step(sent, batch.labels, weights, estimate is not None, held.digests, under_way)
        if estimate is not None:
            estimate.add_factored(held, reply.gradient, weights)

        def backward() -> None:
            pairs = [(right, reply.gradient.right[m]) for m, right in sent.right.items()]
            for part, gradient in [(sent.left, reply.gradient.left), *pairs]:
                if part.requires_grad:  # not where no token passes an adapter, or one is frozen
                    part.backward(gradient.to(part.device))

        return Crossed(reply.loss_sums, reply.token_counts, backward)

    def score(self, nano: NanoEdge, batch: Batch) -> ScoreResult:
        held = self._held(batch)
        return self.llm.score(nano.factored(held), batch.labels, held.digests)

    def generate(
        self, nano: NanoEdge, batch: Batch, sampling: Sampling, text: LowRank | None
    ) -> Iterator[list[NewToken]]:
        held = self._held(batch)
        return self.llm.generate(nano.factored(held), sampling, text, held.digests)

    def _held(self, batch: Batch) -> Batch:
        if batch.digests:
            return batch
        base, digests = self.llm.held(batch.base.split(batch.pieces))
        return replace(batch, base=base.to(batch.base.device), digests=digests)
