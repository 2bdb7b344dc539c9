"""A request stream: one typed first message, then the chunks that it announces."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from google.protobuf.message import Message

from fednano.wire import codec
from fednano.wire.codec import CHUNK_BYTES
from fednano.wire.errors import InvalidRequest
from fednano.wire.tensor_pb2 import TensorSpec

_BYTES = f"1 to {CHUNK_BYTES} bytes"


class Incoming:
    """Reads the stream in order: `head` once, then `payload` once."""

    def __init__(self, messages: AsyncIterator[Any]) -> None:
        self._messages = messages
        self.body = b""
        """Bytes that came beside the head, and instead of chunks."""

    async def head(self) -> Any:
        """The first message's head; raises InvalidRequest where it is something else."""
        first: Message | None = await anext(self._messages, None)
        part = first.WhichOneof("part") if first is not None else None
        if first is None or part != "head":
            raise InvalidRequest.of("first message", "a head", part or "nothing")
        self.body = getattr(first, "body", b"")
        return getattr(first, "head")  # noqa: B009 - each request type has its own

    async def payload(self, specs: Sequence[TensorSpec], limit: int) -> list[memoryview]:
        """The bytes of each announced tensor, in the order announced.

        Raises BadTensor where more or less arrives, or more than `limit` bytes are announced.
        """
        # Callers may name their tensors as they like; here they go by their order.
        named = [
            TensorSpec(name=str(i), dtype=spec.dtype, shape=spec.shape)
            for i, spec in enumerate(specs)
        ]
        payload = codec.Payload(named, limit)
        if self.body:
            _check("body", len(self.body))
            payload.feed(self.body)
            return list(payload.buffers().values())
        async for message in self._messages:
            part = message.WhichOneof("part")
            if part != "chunk":
                raise InvalidRequest.of("chunk", _BYTES, part or "nothing")
            _check("chunk", len(message.chunk))
            payload.feed(message.chunk)
        return list(payload.buffers().values())


def _check(field: str, size: int) -> None:
    if not 0 < size <= CHUNK_BYTES:
        raise InvalidRequest.of(field, _BYTES, f"{size} bytes")
