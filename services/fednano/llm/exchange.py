"""What every method of the service does around its own work: admit, receive, compute, reply."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from google.protobuf.message import Message

from fednano.llm.bases import Owner
from fednano.llm.beside import Beside
from fednano.llm.incoming import Incoming
from fednano.llm.jobs import Job, Sender
from fednano.llm.jobs import Kind as Priority
from fednano.llm.joining import Work
from fednano.llm.metrics import Kind, Metrics
from fednano.llm.requests import Announced, Limits, Received
from fednano.llm.worker import Worker
from fednano.models.generation import Answer, Write
from fednano.models.language_model import NewToken
from fednano.models.memory import out_of_memory
from fednano.wire import codec, llm_pb2, torch_codec
from fednano.wire.errors import Busy, PermissionDenied, Problem
from fednano.wire.headers import check_header
from fednano.wire.interceptors import Context, caller
from fednano.wire.sessions import Identity
from fednano.wire.tensor_pb2 import DType, Header, TensorSpec

if TYPE_CHECKING:
    from fednano.llm.factored import Factors

T = TypeVar("T")
D = TypeVar("D")
M = TypeVar("M", bound=Message)
COMPUTING_ROLES = ("site", "admin")


@dataclass(frozen=True)
class Packed:
    """A tensor ready to be sent."""

    spec: TensorSpec
    data: codec.Buffer

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor, dtype: DType) -> Packed:
        spec = torch_codec.spec_of(name, tensor, dtype)
        return cls(spec, torch_codec.pack(tensor, dtype))


def authorise(header: Header) -> None:
    """The token must be this client's, for this run, and of a role that may compute.

    Raises PermissionDenied.
    """
    identity = caller()
    if identity.role not in COMPUTING_ROLES:
        raise PermissionDenied
    for field, own in (("client", identity.name), ("run", identity.run)):
        claimed = getattr(header, field)
        if claimed != own and (own or field == "client"):
            problem = Problem(f"header.{field}", f"{own!r}, as in the token", repr(claimed))
            raise PermissionDenied(str(problem), problem)


def owner_of(identity: Identity) -> Owner:
    """Of bases: a client's in one run are not its own in another, nor those outside of any."""
    return identity.run, identity.name


class Exchange:
    """Shared by all calls of a service; holds nothing of any of them."""

    def __init__(
        self,
        fingerprint: str,
        limits: Limits,
        worker: Worker,
        metrics: Metrics,
        beside: Beside,
    ) -> None:
        self._fingerprint = fingerprint
        self.limits = limits
        self._beside = beside
        self._worker = worker
        self._metrics = metrics
        metrics.allow(worker.limit)
        # Threads of our own: the loop's may all be taken by whoever shares the process.
        self.checkers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="check")

    def close(self) -> None:
        self.checkers.shutdown()

    def admit(self, header: Header) -> None:
        """May this caller compute, with this model, now?

        Raises what `owner` raises, or Busy.
        """
        self.owner(header)
        self._worker.check_room()

    def owner(self, header: Header) -> Owner:
        """Whose bases this caller may use: the token says so, not the header.

        Raises PermissionDenied, or what check_header raises.
        """
        authorise(header)
        check_header(header, self._fingerprint)
        return owner_of(caller())

    async def head(self, incoming: Incoming) -> Any:
        """A stream's first message, admitted."""
        head = await incoming.head()
        self.admit(head.header)
        self._metrics.received("control", head.ByteSize())
        return head

    async def payload(
        self, incoming: Incoming, specs: Sequence[TensorSpec], kinds: Sequence[Kind]
    ) -> list[memoryview]:
        """The bytes of the announced tensors, which hold `kinds`."""
        buffers = await incoming.payload(specs, self.limits.message_bytes)
        for kind, buffer in zip(kinds, buffers, strict=False):
            self._metrics.received(kind, len(buffer))
        return buffers

    async def received(self, incoming: Incoming, embeddings: Announced | Factors) -> Received:
        """The announced embeddings, checked off the event loop unless they are small."""
        kinds: list[Kind] = ["embeddings"] * len(embeddings.specs)
        data = await self.payload(incoming, embeddings.specs, kinds)
        if self.small(incoming):
            return embeddings.read(data)
        return await self.checked(embeddings.read, data)

    def small(self, incoming: Incoming) -> bool:
        """Whether a thread to check a request, or its reply, costs more than that itself. A GPU is
        waited for, however little is copied."""
        return bool(incoming.body) and not self._beside.apart

    async def checked(self, read: Callable[[D], T], data: D) -> T:
        """`read(data)` off the event loop, beside what the device computes."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.checkers, self._beside, partial(read, data))

    async def compute(
        self, rpc: str, work: Callable[[], T], header: Header, tokens: int
    ) -> tuple[T, Job[T]]:
        """What `work` returns, once it was its turn on the device."""
        job = self._worker.submit(work, Sender.of(header), tokens=tokens)
        with self.on_device(rpc, job):
            return await job.result(), job

    async def joined(
        self,
        rpc: str,
        work: Work[T],
        header: Header,
        finish: Callable[[T], D],
        priority: Priority = "train",
        small: bool = False,
    ) -> tuple[D, Job[T]]:
        """What `finish` makes of the result, off the device: there the next batch runs meanwhile. A
        thread to do it costs more than what it does where that is `small`."""
        job = self._worker.join(work, Sender.of(header), priority)
        with self.on_device(rpc, job):
            if small:
                return finish(await job.result()), job
            return await self.checked(finish, await job.result()), job

    def stream(
        self, context: Context, begin: Callable[[], Answer], write: Write, header: Header
    ) -> Job[list[NewToken]]:
        """An answer in turns; to be used within `on_device`.

        A caller who hangs up frees the device, even while a reply is on its way.
        """
        job = self._worker.write(begin, write, Sender.of(header))

        def gone(_: Any) -> None:
            self._worker.leave(job)

        context.add_done_callback(cast("Any", gone))
        return job

    @contextmanager
    def on_device(self, rpc: str, job: Job[Any]) -> Iterator[None]:
        """Frees the device whatever becomes of the caller."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise Busy("the device has no memory for this; send less, or try later") from error
        finally:
            self._worker.leave(job)
            if job.started:
                self._metrics.computed(rpc, job.queue_seconds, job.compute_seconds)

    def counted(self, reply: M) -> M:
        """`reply`, after its bytes were counted."""
        self._metrics.sent("control", reply.ByteSize())
        return reply

    def whole(
        self, reply: llm_pb2.ForwardBackwardReply, bodies: Sequence[Packed]
    ) -> llm_pb2.ForwardBackwardReply:
        """`reply` with the bytes that it announces beside it; counted."""
        self.counted(reply)
        reply.body = b"".join(body.data for body in bodies)
        self._metrics.sent("gradients", len(reply.body))
        return reply

    def chunks(self, kind: Kind, *bodies: Packed) -> Iterator[bytes]:
        for chunk in codec.chunked([body.data for body in bodies]):
            self._metrics.sent(kind, len(chunk))
            yield chunk
