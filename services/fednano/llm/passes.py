"""Forward and Backward, for losses that clients compute themselves.

A forward pass that keeps its graph is one request's own, and so is the way back. A small request leaves
a GPU idle most of the time. So where others use it too, nothing is kept of such a pass but what it was
fed: then Forward shares its batch, and Backward, which computes forward again, does so too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fednano.llm.exchange import Exchange, Packed
from fednano.llm.factored import PackedGradient, packed_gradient
from fednano.llm.jobs import Job
from fednano.llm.joining import Backwards, Logits
from fednano.llm.requests import Received
from fednano.models.activations import Fed, Kept
from fednano.models.frozen import FrozenLLM
from fednano.models.language_model import ForwardResult
from fednano.wire import llm_pb2
from fednano.wire.errors import InvalidRequest
from fednano.wire.tensor_pb2 import FP32, DType, Header

PackedLogits = tuple[str, Packed]
"""The activation's name, empty where none is kept, and logits [wanted, vocabulary]."""


class Passes:
    """Of one engine."""

    def __init__(self, engine: FrozenLLM, exchange: Exchange, joined_tokens: int) -> None:
        """Requests of at most `joined_tokens` share batches with others', where there are any."""
        self._engine = engine
        self._exchange = exchange
        self._joined_tokens = joined_tokens

    async def forward(
        self, head: llm_pb2.ForwardHead, received: Received, positions: torch.Tensor
    ) -> tuple[PackedLogits, Job[Any]]:
        """Logits at `positions` [wanted] of the packed tokens."""
        sequences, factored = received.sequences, received.factored
        origin = factored.without_base() if factored else None
        tokens = len(sequences.values)
        if head.keep and not self._joins(head.header, tokens):
            return await self._exchange.compute(
                "Forward",
                lambda: _packed(self._engine.forward(sequences, positions, origin=origin)),
                head.header,
                tokens,
            )

        def finish(found: ForwardResult) -> PackedLogits:
            name, logits = _packed(found)
            if head.keep:
                name = self._engine.activations.put(Fed(sequences, positions), origin)
            return name, logits

        work = Logits(partial(self._engine.forward, keep=False), sequences, positions)
        return await self._exchange.joined("Forward", work, head.header, finish)

    async def backward(
        self,
        head: llm_pb2.BackwardHead,
        above: torch.Tensor,
        received: Received | None,
        positions: torch.Tensor | None,
        dtype: DType,
    ) -> tuple[PackedGradient, Job[Any]]:
        """The gradient, as `dtype`, for `above` [wanted, vocabulary]; what was `received` stands for an
        activation that is gone. Raises what FrozenLLM.backward raises."""
        kept = self._engine.activations.get(head.activation)
        origin = kept.origin if kept else received.factored if received else None
        sequences = received.sequences if received else None

        def finish(found: torch.Tensor) -> PackedGradient:
            return packed_gradient(origin, found, dtype, head.want_fisher)

        fed = self._fed(head.header, kept, received, positions)
        if fed is None:
            return await self._exchange.compute(
                "Backward",
                lambda: finish(self._engine.backward(head.activation, above, sequences, positions)),
                head.header,
                len(above),
            )
        if len(fed.positions) != len(above):
            expected = [len(fed.positions), above.shape[1]]
            raise InvalidRequest.of("logits_gradient", expected, list(above.shape))
        self._engine.activations.drop(head.activation)
        work = Backwards(self._engine.backward_again, fed.sequences, fed.positions, above)
        return await self._exchange.joined("Backward", work, head.header, finish)

    def _fed(
        self,
        header: Header,
        kept: Kept | None,
        received: Received | None,
        positions: torch.Tensor | None,
    ) -> Fed | None:
        """What Backward computes forward from in company; None where it goes by itself."""
        if kept is not None:
            held = kept.activation
            return held if isinstance(held, Fed) and not header.alone else None
        if received is None or positions is None:
            return None
        joins = self._joins(header, len(received.sequences.values))
        return Fed(received.sequences, positions) if joins else None

    def _joins(self, header: Header, tokens: int) -> bool:
        return (
            tokens <= self._joined_tokens
            and not header.alone
            and self._exchange.company(header.client)
        )


def _packed(found: ForwardResult) -> PackedLogits:
    return found.activation, Packed.of("logits", found.logits, FP32)
