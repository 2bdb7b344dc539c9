"""Forward and Backward, for losses that clients compute themselves.

A forward pass that keeps its graph is one request's own, and so is the way back. A small request leaves
a GPU idle most of the time. So where others use it too, nothing is kept of such a pass but what it was
fed: then Forward shares its batch, and Backward, which computes forward again, does so too.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch

from fednano.llm.exchange import Exchange, Packed
from fednano.llm.factored import PackedGradient, packed_gradient
from fednano.llm.jobs import Job
from fednano.llm.joining import Backwards, Logits, padded
from fednano.llm.requests import Received
from fednano.models.activations import Fed, Kept
from fednano.models.frozen import FrozenLLM
from fednano.models.language_model import ForwardResult, Sequences
from fednano.wire import llm_pb2
from fednano.wire.errors import InvalidRequest
from fednano.wire.tensor_pb2 import FP32, DType, Header

_RECENT_SECONDS = 2.0
"""For so long a client counts as one of several."""
PackedLogits = tuple[str, Packed]
"""The activation's name, empty where none is kept, and logits [wanted, vocabulary]."""


class Passes:
    """Of one engine."""

    def __init__(self, engine: FrozenLLM, exchange: Exchange, joined_tokens: int) -> None:
        """Requests of at most `joined_tokens`, padding counted, share batches with others', where there
        are any."""
        self._engine = engine
        self._seen: dict[str, float] = {}  # by client, when its last pass came that may be joined
        self._exchange = exchange
        self._joined_tokens = joined_tokens

    async def forward(
        self, head: llm_pb2.ForwardHead, received: Received, positions: torch.Tensor
    ) -> tuple[PackedLogits, Job[Any]]:
        """Logits at `positions` [wanted] of the packed tokens."""
        sequences, factored = received.sequences, received.factored
        origin = factored.without_base() if factored else None
        if not self._joins(head.header, sequences) and head.keep:
            return await self._exchange.compute(
                "Forward",
                lambda: _packed(self._engine.forward(sequences, positions, origin=origin)),
                head.header,
                len(sequences.values),
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
            gradient = packed_gradient(origin, found, dtype, head.want_fisher)
            self._engine.activations.drop(head.activation)
            return gradient

        fed = self._fed(head.header, kept, received, positions)
        del kept  # what is pushed out meanwhile shall be gone
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
        joins = self._joins(header, received.sequences)
        return Fed(received.sequences, positions) if joins else None

    def _joins(self, header: Header, sequences: Sequences) -> bool:
        """One that may be joined, and others have such passes, too."""
        if header.alone or padded(sequences.lengths) > self._joined_tokens:
            return False
        now = time.monotonic()
        self._seen = {c: at for c, at in self._seen.items() if now - at <= _RECENT_SECONDS}
        self._seen[header.client] = now
        return len(self._seen) > 1


def _packed(found: ForwardResult) -> PackedLogits:
    return found.activation, Packed.of("logits", found.logits, FP32)
