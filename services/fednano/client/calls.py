"""How calls to the LLM service are made: headers and tokens, streams in chunks, bytes counted, and
another try where one failed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from structlog.contextvars import bound_contextvars

from fednano.client.messages import unheard
from fednano.client.meter import Kind, Meter
from fednano.client.replicas import SERVICE, Replica, Replicas
from fednano.client.retries import retried
from fednano.wire import codec, llm_pb2, torch_codec
from fednano.wire.channels import calling
from fednano.wire.errors import Unavailable
from fednano.wire.tensor_pb2 import Header, TensorSpec

log = logging.getLogger(__name__)

T = TypeVar("T")
_REPLY_LIMIT = 1 << 34
_CHUNK_KINDS: dict[str, tuple[Kind, Kind]] = {  # of chunks sent and received
    "ForwardBackward": ("embeddings", "gradients"),
    "Score": ("embeddings", "control"),
    "Forward": ("embeddings", "logits"),
    "Backward": ("logits", "gradients"),
    "Generate": ("embeddings", "control"),
    "Embed": ("control", "embeddings"),
}


@dataclass(frozen=True)
class Caller:
    """Who calls: makes headers, and knows the newest token."""

    header: Callable[[], Header]
    token: Callable[[], str]


@dataclass(frozen=True)
class Calls:
    """Every call is tried again, on another replica where there is one, until `retry_seconds` are
    over; a call is safe to repeat as the service keeps nothing that it can't lose."""

    replicas: Replicas
    caller: Caller
    meter: Meter
    retry_seconds: float
    call_seconds: float

    def retried(self, header: Header, call: Callable[[Replica], T]) -> T:
        with bound_contextvars(request_id=header.request):
            return retried(
                lambda: call(self.replicas.next()),
                self.retry_seconds,
                lambda error: self.note_failure(error, header),
            )

    def note_failure(self, error: BaseException, header: Header) -> None:
        self.replicas.failed()
        extra = {"reason": str(error), "request_id": header.request}
        log.warning("the LLM service is asked again", extra=extra)

    @contextmanager
    def calling(self, rpc: str, header: Header) -> Iterator[dict[str, Any]]:
        """Around one try: the options of the stub's method."""
        with calling(f"{SERVICE}/{rpc}", header, self.caller.token()) as metadata:
            self.meter.call(SERVICE, metadata)
            yield {"metadata": metadata, "timeout": self.call_seconds}

    def sent(self, message: Any) -> None:
        """Counts a message that holds no tensor's bytes."""
        self.meter.message("sent", "control", message.ByteSize())

    def received(self, message: Any) -> None:
        self.meter.message("received", "control", message.ByteSize())

    def whole(
        self, head: llm_pb2.ForwardBackwardHead, body: Iterable[codec.Buffer]
    ) -> llm_pb2.ForwardBackwardRequest:
        """A step's request in one message."""
        message = llm_pb2.ForwardBackwardRequest(head=head)
        self.sent(message)
        message.body = b"".join(body)
        self.meter.within("sent", "embeddings", len(message.body))
        return message

    def stream(
        self,
        rpc: str,
        request: Callable[..., Any],
        head: Any,
        body: Iterable[codec.Buffer],
        under_way: Callable[[], None] = unheard,
    ) -> Iterator[Any]:
        """The messages of a request: its head, then the bytes that it announces; `under_way` is told
        when they have been taken."""
        first = request(head=head)
        self.sent(first)
        yield first
        for chunk in codec.chunked(body):
            self.meter.chunk("sent", _CHUNK_KINDS[rpc][0], len(chunk))
            yield request(chunk=chunk)
        under_way()

    def collect(
        self, rpc: str, replies: Iterator[Any], specs: Callable[[Any], list[TensorSpec]]
    ) -> tuple[Any, list[torch.Tensor]]:
        """The first message of a reply stream and the tensors that it announced."""
        first = next(replies, None)
        if first is None:
            raise Unavailable(f"{rpc} ended without a reply")
        body, announced = getattr(first, "body", b""), specs(first)
        payload = codec.Payload(announced, _REPLY_LIMIT)
        if body:
            self.meter.within("received", _CHUNK_KINDS[rpc][1], len(body))
            payload.feed(body)
            first.ClearField("body")
        self.received(first)
        for reply in replies:
            self.meter.chunk("received", _CHUNK_KINDS[rpc][1], len(reply.chunk))
            payload.feed(reply.chunk)
        buffers = payload.buffers()
        return first, [
            torch_codec.to_torch(s.dtype, s.shape, buffers[s.name], s.name).float()
            for s in announced
        ]

    def spent(self, spent: llm_pb2.Spent) -> None:
        self.meter.add_server_seconds(spent.compute_seconds)
