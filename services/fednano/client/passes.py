"""Forward and Backward, for a loss of the client's own: logits there, and the gradient for theirs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fednano.client.calls import Calls
from fednano.client.messages import Sent, gradient_specs, integers
from fednano.client.replicas import Replica
from fednano.models.language_model import ForwardResult
from fednano.wire import codec, llm_pb2, torch_codec
from fednano.wire.errors import RETRYABLE, UnknownActivation
from fednano.wire.tensor_pb2 import FP32, DType, Header

log = logging.getLogger(__name__)

Back = tuple[llm_pb2.Gradient, list[torch.Tensor]]
"""A gradient's message, and its tensors in the order of `gradient_specs`."""


class Passes:
    """Remembers which replica holds which activation; see `Calls` for what becomes of failures."""

    def __init__(self, calls: Calls, header: Callable[[], Header], wire_dtype: DType) -> None:
        self._calls = calls
        self._header = header
        self._wire_dtype = wire_dtype
        self._homes: dict[str, str] = {}  # activation -> address of the replica that holds it

    def forward(self, sent: Sent, positions: torch.Tensor, keep: bool = True) -> ForwardResult:
        """Logits at `positions` [wanted] of the tokens of `sent`."""
        head = llm_pb2.ForwardHead(
            header=self._header(),
            embeddings=sent.embeddings,
            positions=integers(positions),
            keep=keep,
        )

        def call(replica: Replica) -> ForwardResult:
            requests = self._calls.stream(
                "Forward", llm_pb2.ForwardRequest, head, sent.body, sent.under_way
            )
            with self._calls.calling("Forward", head.header) as options:
                replies = replica.stub.Forward(requests, **options)
                first, values = self._calls.collect("Forward", replies, lambda r: [r.result.logits])
            self._calls.spent(first.result.spent)
            if first.result.activation:
                self._homes[first.result.activation] = replica.address
            return ForwardResult(first.result.activation, values[0])

        return self._calls.retried(head.header, lambda at: sent.around(at, lambda: call(at)))

    def backward(
        self,
        activation: str,
        logits_gradient: torch.Tensor,
        again: Callable[[], Sent],
        positions: torch.Tensor,
        want_fisher: bool = False,
    ) -> Back:
        """Goes to the replica that holds the activation; elsewhere it is computed again, from what
        `again` gives."""
        head = llm_pb2.BackwardHead(
            header=self._header(),
            activation=activation,
            logits_gradient=torch_codec.spec_of("logits_gradient", logits_gradient, FP32),
            gradient_dtype=self._wire_dtype,
            want_fisher=want_fisher,
        )
        body = [torch_codec.pack(logits_gradient, FP32)]
        home = self._calls.replicas.at(self._homes.pop(activation, ""))
        if home is not None:
            try:
                return self._back(home, head, body)
            except (UnknownActivation, *RETRYABLE) as error:
                extra = {"reason": str(error), "request_id": head.header.request}
                log.info("activation computed again", extra=extra)
        sent = again()
        head.activation = ""
        head.embeddings.CopyFrom(sent.embeddings)
        head.positions.CopyFrom(integers(positions))
        whole = [*body, *sent.body]
        return self._calls.retried(
            head.header, lambda at: sent.around(at, lambda: self._back(at, head, whole))
        )

    def _back(self, replica: Replica, head: llm_pb2.BackwardHead, body: list[codec.Buffer]) -> Back:
        requests = self._calls.stream("Backward", llm_pb2.BackwardRequest, head, body)
        with self._calls.calling("Backward", head.header) as options:
            replies: Iterator[Any] = replica.stub.Backward(requests, **options)
            first, values = self._calls.collect(
                "Backward", replies, lambda r: gradient_specs(r.gradient)
            )
        self._calls.spent(first.spent)
        return first.gradient, values
