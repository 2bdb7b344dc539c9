"""The coordinator as a client sees it: a session, tasks, adapters, submissions."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from structlog.contextvars import bound_contextvars

from fednano.client.adapters import Tensors
from fednano.client.meter import Meter
from fednano.client.retries import retried
from fednano.wire import codec
from fednano.wire import coordinator_pb2 as pb
from fednano.wire.channels import ClientTls, calling, make_channel
from fednano.wire.coordinator_pb2_grpc import CoordinatorStub
from fednano.wire.errors import FedNanoError
from fednano.wire.headers import make_header
from fednano.wire.run_config import RunConfig
from fednano.wire.tensor_pb2 import Header

log = logging.getLogger(__name__)

T = TypeVar("T")
_SERVICE = f"/{pb.DESCRIPTOR.services_by_name['Coordinator'].full_name}"
_ADAPTER_LIMIT = 1 << 34
_REPORT_SECONDS = 30.0
"""How often a heartbeat tells what was spent: a client that is killed takes no more to its grave."""


@dataclass(frozen=True)
class Adapter:
    """Named tensors as they came from the coordinator."""

    tensors: Tensors
    scale: float
    digest: str
    round: int


@dataclass
class Membership:
    """A session in a run; its token for the LLM service is renewed while it lasts."""

    run: str
    session: str
    config: RunConfig
    llm_token: str
    shard: int
    of: int
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def renew(self, token: pb.LlmToken) -> None:
        if token.token:
            with self._lock:
                self.llm_token = token.token

    def token(self) -> str:
        with self._lock:
            return self.llm_token


class CoordinatorClient:
    """One client's calls. All of them are safe to repeat, and are repeated while the coordinator
    can't be reached, for at most `retry_seconds`."""

    def __init__(
        self,
        target: str,
        token: str,
        client: str,
        tls: ClientTls | None = None,
        meter: Meter | None = None,
        retry_seconds: float = 300.0,
    ) -> None:
        self.client = client
        self.meter = meter if meter is not None else Meter()
        self._token = token
        self._retry_seconds = retry_seconds
        self._reported_at = time.monotonic()
        self._unheard: tuple[str, pb.Costs] | None = None  # costs of a request that got no answer
        self._beating = threading.Lock()
        self._channel = make_channel(target, tls)
        self._stub = CoordinatorStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def header(self, member: Membership | None = None, task: object = None) -> Header:
        """`task` is a TrainTask or EvaluateTask, where the call belongs to one."""
        return make_header(
            self.client,
            run=member.run if member else "",
            session=member.session if member else "",
            round_number=getattr(task, "round", 0),
            attempt=getattr(task, "attempt", 0),
        )

    def join(self, request: pb.JoinRequest) -> pb.JoinReply:
        """A membership, or how long to wait before asking again."""
        reply: pb.JoinReply = self._call("Join", request)
        return reply

    def login(self) -> str:
        """A run-less token for the LLM service."""
        request = pb.LoginRequest(header=self.header())
        token: str = self._call("Login", request).llm_token.token
        return token

    def next_task(self, member: Membership, wait_ms: int) -> pb.NextTaskReply:
        request = pb.NextTaskRequest(header=self.header(member), wait_ms=wait_ms)
        timeout = wait_ms / 1000 + 30
        reply: pb.NextTaskReply = self._call("NextTask", request, timeout)
        return reply

    def heartbeat(
        self,
        member: Membership,
        task: object,
        progress: float,
        doing: str,
        report: bool = False,
    ) -> pb.HeartbeatReply:
        """Tried once: the next one is due soon anyway. Now and then, and where `report` says so, it
        also tells what was spent."""
        request = pb.HeartbeatRequest(
            header=self.header(member, task), progress=progress, doing=doing
        )
        with self._beating:
            if report or time.monotonic() - self._reported_at > _REPORT_SECONDS:
                self._unheard = self._unheard or (request.header.request, self.meter.take())
            if self._unheard is not None:
                # The same costs under the same name, until they are heard: they count once.
                request.header.request, costs = self._unheard
                request.costs.CopyFrom(costs)
            reply: pb.HeartbeatReply = self._once("Heartbeat", request, 10)
            if self._unheard is not None:
                self._unheard, self._reported_at = None, time.monotonic()
        member.renew(reply.llm_token)
        return reply

    def forget_costs(self) -> None:
        """What a run was not told of any more, so that the next one doesn't pay for it."""
        with self._beating:
            self._unheard = None
            self.meter.take()

    def adapter(self, request: pb.GetAdapterRequest) -> Adapter:
        """By digest, round, best or last."""

        def call() -> Adapter:
            with self._calling("GetAdapter", request.header, 60) as options:
                self.meter.message("sent", "control", request.ByteSize())
                replies = self._stub.GetAdapter(request, **options)
                first = next(replies)
                self.meter.message("received", "control", first.ByteSize())
                head = first.head
                payload = codec.Payload(head.tensors, _ADAPTER_LIMIT)
                for reply in replies:
                    self.meter.chunk("received", "adapters", len(reply.chunk))
                    payload.feed(reply.chunk)
            arrays = {n: a.astype("<f4", copy=False) for n, a in payload.arrays().items()}
            return Adapter(arrays, head.scale, head.digest, head.round)

        return self._retried(request.header, call)

    def submit(self, head: pb.SubmitHead, tensors: Tensors, auxiliary: Tensors) -> pb.SubmitReply:
        """Fills in `head`'s tensors, digest and costs, and sends everything; its own bytes are among
        the costs."""
        arrays = [tensors[name] for name in sorted(tensors)]
        arrays += [auxiliary[name] for name in sorted(auxiliary)]
        head.tensors.extend(codec.spec_of(name, tensors[name]) for name in sorted(tensors))
        head.auxiliary.extend(codec.spec_of(name, auxiliary[name]) for name in sorted(auxiliary))
        buffers = [codec.pack(array) for array in arrays]
        digest = hashlib.sha256()
        for buffer in buffers:
            digest.update(buffer)
        head.digest = digest.hexdigest()
        ahead = {"adapters": sum(map(len, buffers)), "control": head.ByteSize()}
        head.costs.CopyFrom(self.meter.take(ahead))

        def requests() -> Iterator[pb.SubmitRequest]:
            first = pb.SubmitRequest(head=head)
            self.meter.message("sent", "control", first.ByteSize())
            yield first
            for chunk in codec.chunked(buffers):
                self.meter.chunk("sent", "adapters", len(chunk))
                yield pb.SubmitRequest(chunk=chunk)

        def call() -> pb.SubmitReply:
            with self._calling("Submit", head.header, 120) as options:
                reply: pb.SubmitReply = self._stub.Submit(requests(), **options)
            self.meter.message("received", "control", reply.ByteSize())
            return reply

        with self._reported(head.costs):
            return self._retried(head.header, call)

    def submit_evaluation(self, request: pb.SubmitEvaluationRequest) -> pb.SubmitReply:
        """Fills in `request`'s costs."""
        request.costs.CopyFrom(self.meter.take())
        with self._reported(request.costs):
            reply: pb.SubmitReply = self._call("SubmitEvaluation", request)
        return reply

    @contextmanager
    def _reported(self, costs: pb.Costs) -> Iterator[None]:
        """Around what carries costs; they are kept for the next report where it is not heard."""
        try:
            yield
        except FedNanoError:
            self.meter.put_back(costs)
            raise

    def _call(self, rpc: str, request: Any, timeout: float = 30) -> Any:
        return self._retried(request.header, lambda: self._once(rpc, request, timeout))

    def _once(self, rpc: str, request: Any, timeout: float) -> Any:
        self.meter.message("sent", "control", request.ByteSize())
        with self._calling(rpc, request.header, timeout) as options:
            reply = getattr(self._stub, rpc)(request, **options)
        self.meter.message("received", "control", reply.ByteSize())
        return reply

    def _retried(self, header: Header, call: Callable[[], T]) -> T:
        with bound_contextvars(request_id=header.request):
            return retried(call, self._retry_seconds, _note_failure)

    @contextmanager
    def _calling(self, rpc: str, header: Header, timeout: float) -> Iterator[dict[str, Any]]:
        """Around one try: the options of the stub's method."""
        with calling(f"{_SERVICE}/{rpc}", header, self._token) as metadata:
            self.meter.call(_SERVICE, metadata)
            yield {"metadata": metadata, "timeout": timeout}


def _note_failure(error: BaseException) -> None:
    log.warning("the coordinator is asked again", extra={"reason": str(error)})
