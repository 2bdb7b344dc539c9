"""Bases as they arrive: in chunks, several in one stream, resumed where a stream broke off."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TypeVar

from fednano.llm import requests
from fednano.llm.bases import Base, BaseStore, Owner
from fednano.llm.metrics import Kind
from fednano.llm.requests import Limits
from fednano.models.factored import base_digest
from fednano.wire import codec, llm_pb2
from fednano.wire.codec import CHUNK_BYTES
from fednano.wire.errors import BadTensor, InvalidRequest
from fednano.wire.tensor_pb2 import Header, TensorSpec

T = TypeVar("T")
DIGEST_BYTES = 32


@dataclass
class _Arriving:
    """One base of a stream."""

    owner: Owner
    digest: bytes
    spec: TensorSpec
    size: int
    offset: int  # where its chunks begin
    complete: bool  # already held: its bytes are dropped
    data: bytearray = field(default_factory=bytearray)
    fed: int = 0

    def feed(self, chunk: bytes) -> None:
        if not self.fed:
            del self.data[self.offset :]
        if self.offset + self.fed + len(chunk) > self.size:
            got = f"at least {self.offset + self.fed + len(chunk)}"
            raise BadTensor.of("values", f"{self.size} bytes as announced", got)
        self.fed += len(chunk)
        if not self.complete:
            self.data += chunk

    @property
    def held(self) -> int:
        return self.size if self.complete else len(self.data)


class Uploads:
    """Receives bases into a store. Belongs to the event loop's thread; checks run on `threads`."""

    def __init__(
        self, store: BaseStore, fingerprint: str, limits: Limits, threads: Executor
    ) -> None:
        self._store = store
        self._fingerprint = fingerprint
        self._limits = limits
        self._threads = threads
        # Unfinished ones, with the time at which they broke off.
        self._parked: OrderedDict[tuple[Owner, bytes], tuple[float, bytearray]] = OrderedDict()

    async def receive(
        self,
        messages: AsyncIterator[llm_pb2.UploadBaseRequest],
        admit: Callable[[Header], Owner],
        count: Callable[[Kind, int], None],
    ) -> int:
        """How many of the announced bytes are held now, in their order and without a gap.

        A head without chunks asks only. `count` is told of all that comes. Raises what `admit`
        raises, BadTensor, or InvalidRequest where the content is not that of the digest.
        """
        received, gap = 0, False
        arriving: _Arriving | None = None
        try:
            async for message in messages:
                if message.WhichOneof("part") == "head":
                    owner = admit(message.head.header)
                    count("control", message.ByteSize())
                    held, gap = await self._end(arriving, gap)
                    received += held
                    arriving = None  # a bad head parks nothing twice
                    arriving = await self._begin(message.head, owner)
                    continue
                chunk = message.chunk
                if arriving is None or not 0 < len(chunk) <= CHUNK_BYTES:
                    expected = f"a head, then chunks of 1 to {CHUNK_BYTES} bytes"
                    raise InvalidRequest.of("part", expected, f"{len(chunk)} bytes")
                count("bases", len(chunk))
                arriving.feed(chunk)
            if arriving is None:
                raise InvalidRequest.of("first message", "a head", "nothing")
            held, gap = await self._end(arriving, gap)
            arriving = None
            return received + held
        finally:
            if arriving is not None:
                self._park(arriving)  # the stream broke off, or went wrong

    def forget(self, owner: Owner) -> None:
        """Drops what an owner has not finished."""
        for name in [name for name in self._parked if name[0] == owner]:
            del self._parked[name]

    def expire(self, seconds: float) -> None:
        """Drops what nobody came back for."""
        before = time.monotonic() - seconds
        for name in [name for name, (at, _) in self._parked.items() if at < before]:
            del self._parked[name]

    async def _begin(self, head: llm_pb2.UploadBaseHead, owner: Owner) -> _Arriving:
        """Raises BadTensor or InvalidRequest."""
        spec, limits = head.values, self._limits
        if len(head.digest) != DIGEST_BYTES:
            raise InvalidRequest.of("digest", f"{DIGEST_BYTES} bytes", len(head.digest))
        tokens = spec.shape[0] if spec.shape else 0
        if not 1 <= tokens <= limits.tokens_per_sample:
            raise InvalidRequest.of("values", f"1 to {limits.tokens_per_sample} tokens", tokens)
        requests.check_spec("values", spec, (tokens, limits.hidden))
        size = codec.spec_size(spec)
        complete = await self._off_loop(lambda: self._store.holds(owner, head.digest))
        arriving = _Arriving(owner, head.digest, spec, size, int(head.offset), complete)
        if not complete:
            # Taken while it is written to: a second stream with the same base starts afresh.
            _, arriving.data = self._parked.pop((owner, head.digest), (0.0, bytearray()))
            if head.offset > len(arriving.data):
                self._park(arriving)
                raise InvalidRequest.of("offset", f"at most {len(arriving.data)}", head.offset)
        return arriving

    async def _end(self, arriving: _Arriving | None, gap: bool) -> tuple[int, bool]:
        """Bytes to be told of, and whether something is missing before what comes next."""
        if arriving is None:
            return 0, gap
        held = arriving.held
        if not arriving.complete:
            if held == arriving.size:
                await self._off_loop(lambda: self._keep(arriving))
            else:
                self._park(arriving)
        return (0 if gap else held), gap or held < arriving.size

    def _keep(self, arriving: _Arriving) -> None:
        """Raises InvalidRequest for other content than announced, BadTensor for NaN and infinity."""
        data = memoryview(arriving.data)
        if base_digest(self._fingerprint, arriving.spec, data) != arriving.digest:
            arriving.data = bytearray()
            raise InvalidRequest.of("digest", "that of model, dtype, shape and bytes", "another")
        try:
            requests.floats("values", arriving.spec, data)
        except BadTensor:
            arriving.data = bytearray()
            raise
        shape = (int(arriving.spec.shape[0]), int(arriving.spec.shape[1]))
        self._store.put(arriving.owner, arriving.digest, Base(arriving.spec.dtype, shape, data))

    def _park(self, arriving: _Arriving) -> None:
        """Keeps what has come so far, as long as all such together are no larger than a message."""
        if arriving.complete or not 0 < len(arriving.data) < arriving.size:
            return
        self._parked[arriving.owner, arriving.digest] = time.monotonic(), arriving.data
        while sum(len(data) for _, data in self._parked.values()) > self._limits.message_bytes:
            self._parked.popitem(last=False)

    async def _off_loop(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
