"""Simulated clients: they join, poll, fetch and submit over gRPC as real ones do, but only sleep where
those train."""

from __future__ import annotations

import asyncio
import hashlib
import random
import resource
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

import grpc
import numpy as np

from fednano import __version__
from fednano.coordinator.records import Tensors
from fednano.lab.bench.rows import BenchFailed
from fednano.wire.codec import Payload, chunked, pack, spec_of
from fednano.wire.coordinator_pb2 import (
    TRAINER,
    Costs,
    GetAdapterRequest,
    JoinRequest,
    NextTaskReply,
    NextTaskRequest,
    SubmitHead,
    SubmitReply,
    SubmitRequest,
    TrainTask,
)
from fednano.wire.coordinator_pb2_grpc import CoordinatorStub
from fednano.wire.headers import make_header
from fednano.wire.interceptors import bearer
from fednano.wire.tensor_pb2 import Header

if TYPE_CHECKING:
    from fednano.wire.coordinator_pb2_grpc import CoordinatorAsyncStub as AsyncStub
else:
    AsyncStub = CoordinatorStub

T = TypeVar("T")
HIDDEN = 128
_JOINING = 50  # at a time
_CALL_SECONDS = 120.0
_FILES_SPARE = 200
_AGAIN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)  # as real clients do
_PAUSE_SECONDS = 0.5
_TRIES = 100
_TICK_SECONDS = 0.01


@dataclass
class Played:
    """What the clients saw, all of them together."""

    calls: int = 0  # of NextTask
    seconds: float = 0.0
    beyond_wait: list[float] = field(default_factory=list)  # of calls that were held to the end
    handed_out: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    join_seconds: list[float] = field(default_factory=list)
    fetch_seconds: list[float] = field(default_factory=list)
    submit_seconds: list[float] = field(default_factory=list)
    acknowledged: list[tuple[int, str]] = field(default_factory=list)
    repeated: Counter[str] = field(default_factory=Counter)  # calls that failed, by status
    late: list[float] = field(default_factory=list)  # how late this process itself was, in seconds
    cpu_seconds: float = 0.0  # of this process


@dataclass(frozen=True)
class Habits:
    """What all clients have in common."""

    target: str
    token: str
    run: str
    wait_ms: int  # of NextTask
    training_seconds: float  # at most


async def play(habits: Habits, clients: int) -> Played:
    """Until the run has finished."""
    played, joining = Played(), asyncio.Semaphore(_JOINING)
    start, used = time.perf_counter(), time.process_time()
    watch = asyncio.create_task(_watch(played))
    try:
        async with asyncio.TaskGroup() as tasks:
            for number in range(clients):
                client = _Client(habits, f"c{number:05d}", played)
                tasks.create_task(client.live(joining))
    except* grpc.aio.AioRpcError as errors:
        raise BenchFailed(f"a simulated client got {errors.exceptions[0]}") from None
    finally:
        watch.cancel()
    played.seconds = time.perf_counter() - start
    played.cpu_seconds = time.process_time() - used
    return played


async def _watch(played: Played) -> None:
    """All clients share one loop: what they call latency includes how late that is."""
    while True:
        asked = time.perf_counter()
        await asyncio.sleep(_TICK_SECONDS)
        played.late.append(time.perf_counter() - asked - _TICK_SECONDS)


def allow_files(clients: int) -> None:
    """Each client has a connection of its own, here and in the processes that are started later."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * clients + _FILES_SPARE
    if soft < wanted <= hard or (soft < wanted and hard == resource.RLIM_INFINITY):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@dataclass
class _Client:
    habits: Habits
    id: str
    played: Played
    session: str = ""

    async def live(self, joining: asyncio.Semaphore) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
        async with grpc.aio.insecure_channel(self.habits.target, options) as channel:
            stub = cast(AsyncStub, CoordinatorStub(channel))
            async with joining:
                await self._join(stub)
            while not (reply := await self._next(stub)).HasField("finished"):
                if reply.HasField("train"):
                    self.played.handed_out[reply.train.round].append(time.perf_counter())
                    await self._train(stub, reply.train)

    def _header(self, task: TrainTask | None = None) -> Header:
        return make_header(
            self.id,
            run=self.habits.run,
            session=self.session,
            round_number=task.round if task else 0,
            attempt=task.attempt if task else 0,
        )

    @property
    def _options(self) -> dict[str, Any]:
        return {"metadata": bearer(self.habits.token), "timeout": _CALL_SECONDS}

    async def _join(self, stub: AsyncStub) -> None:
        request = JoinRequest(
            header=self._header(),
            role=TRAINER,
            samples=10,
            fingerprint="bench",
            hidden_size=HIDDEN,
            version=__version__,
        )
        start = time.perf_counter()
        reply = await self._tried(lambda: stub.Join(request, **self._options))
        if not reply.HasField("member"):
            raise BenchFailed(f"{self.id} may not join: {reply.wait.reason}")
        self.played.join_seconds.append(time.perf_counter() - start)
        self.session = reply.member.session

    async def _tried(self, call: Callable[[], Awaitable[T]]) -> T:
        """Every call is safe to repeat."""
        for _ in range(_TRIES - 1):
            try:
                return await call()
            except grpc.aio.AioRpcError as error:
                if error.code() not in _AGAIN:
                    raise
                self.played.repeated[error.code().name] += 1
                await asyncio.sleep(random.uniform(0, _PAUSE_SECONDS))
        return await call()

    async def _next(self, stub: AsyncStub) -> NextTaskReply:
        return await self._tried(lambda: self._next_once(stub))

    async def _next_once(self, stub: AsyncStub) -> NextTaskReply:
        request = NextTaskRequest(header=self._header(), wait_ms=self.habits.wait_ms)
        start = time.perf_counter()
        self.played.calls += 1
        reply: NextTaskReply = await stub.NextTask(request, **self._options)
        if reply.HasField("wait"):
            self.played.beyond_wait.append(time.perf_counter() - start - self.habits.wait_ms / 1000)
        return reply

    async def _train(self, stub: AsyncStub, task: TrainTask) -> None:
        start = time.perf_counter()
        base = await self._tried(lambda: self._fetch(stub, task))
        fetched = time.perf_counter()
        self.played.fetch_seconds.append(fetched - start)
        # Clients don't end together; meanwhile those that have wait for the next round.
        chance = random.Random(f"{self.id}/{task.round}")
        await asyncio.sleep(chance.uniform(0, self.habits.training_seconds))
        fetched = time.perf_counter()
        reply = await self._tried(lambda: stub.Submit(self._update(task, base), **self._options))
        self.played.submit_seconds.append(time.perf_counter() - fetched)
        if reply.result in (SubmitReply.ACCEPTED, SubmitReply.DUPLICATE):
            self.played.acknowledged.append((task.round, self.id))

    async def _fetch(self, stub: AsyncStub, task: TrainTask) -> Tensors:
        request = GetAdapterRequest(
            header=self._header(task), run=self.habits.run, digest=task.adapter
        )
        replies = stub.GetAdapter(request, **self._options)
        head = await anext(aiter(replies))
        payload = Payload(head.head.tensors, 1 << 30)
        async for reply in replies:
            payload.feed(reply.chunk)
        return {name: np.asarray(array, np.float32) for name, array in payload.arrays().items()}

    async def _update(self, task: TrainTask, base: Tensors) -> AsyncIterator[SubmitRequest]:
        """A small step from the base, and some Fisher."""
        adapter = {name: array + np.float32(0.01) for name, array in base.items()}
        fisher = {f"fisher.{name}": np.ones_like(array) for name, array in base.items()}
        buffers = [pack(array) for array in (*adapter.values(), *fisher.values())]
        yield SubmitRequest(
            head=SubmitHead(
                header=self._header(task),
                base=task.adapter,
                tensors=[spec_of(name, array) for name, array in adapter.items()],
                auxiliary=[spec_of(name, array) for name, array in fisher.items()],
                digest=hashlib.sha256(b"".join(buffers)).hexdigest(),
                samples=10,
                metrics={"train_loss": 0.5},
                costs=Costs(sent_bytes={"adapters": sum(map(len, buffers))}, client_seconds=0.1),
            )
        )
        for chunk in chunked(buffers):
            yield SubmitRequest(chunk=chunk)
