"""Light clients over real gRPC: what they train is a deterministic function in numpy."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
from fednano.coordinator.records import Tensors
from fednano.coordinator.strategies import State, Update, initial_adapter, strategy_of
from fednano.wire.channels import ClientTls, make_channel, translated
from fednano.wire.codec import Payload, chunked, pack, spec_of
from fednano.wire.coordinator_pb2 import (
    EVALUATOR,
    TRAINER,
    Costs,
    Evaluation,
    GetAdapterRequest,
    HeartbeatReply,
    HeartbeatRequest,
    JoinReply,
    JoinRequest,
    NextTaskReply,
    NextTaskRequest,
    SubmitEvaluationRequest,
    SubmitHead,
    SubmitReply,
    SubmitRequest,
)
from fednano.wire.coordinator_pb2_grpc import CoordinatorStub
from fednano.wire.errors import RETRYABLE, SessionEnded
from fednano.wire.headers import make_header
from fednano.wire.interceptors import bearer
from fednano.wire.low_rank import cut, drawn
from fednano.wire.run_config import RunConfig
from fednano.wire.tensor_pb2 import FP32, DType, Header

HIDDEN = 8
FINGERPRINT = "a-model"
_OF = ("image", "text")
SMALL = {"rank": 2, "scale": 2.0}


def config_of(name: str = "trial", **changes: object) -> RunConfig:
    """A run that is over quickly."""
    values: dict[str, object] = {
        "name": name,
        "clients": 3,
        "min_clients": 2,
        "rounds": 2,
        "adapter": SMALL,
        "data": {"source": "own"},
        "evaluation": {"own_data": "never", "seconds": 5.0},
        "enrol_seconds": 20.0,
        "round_seconds": 20.0,
    }
    return RunConfig.model_validate({**values, **changes})


def step(base: Tensors, client: str, number: int) -> tuple[Tensors, Tensors]:
    """The "training": a new adapter and its Fisher, by client and round alone."""
    rng = np.random.default_rng([number, *client.encode()])
    adapter = {
        name: (base[name] + rng.normal(0, 0.1, base[name].shape)).astype(np.float32)
        for name in sorted(base)
    }
    fisher = {
        f"fisher.{name}": rng.uniform(0, 1, base[name].shape).astype(np.float32)
        for name in sorted(base)
    }
    return adapter, fisher


def work(
    config: RunConfig, base: Tensors, handed: Tensors, client: str, number: int, rank: int
) -> tuple[Tensors, Tensors]:
    """What a client of this rank sends for a round, by the strategy: with SCAFFOLD what was handed
    out takes part in its training, and with FLoRA it starts from nothing."""
    start = cut(base, rank) if config.adapter.ranks else base
    if config.strategy.name == "flora":
        start = {name: np.zeros_like(t) for name, t in drawn(_OF, rank, HIDDEN, [0]).items()}
    adapter, fisher = step(start, client, number)
    if config.strategy.name != "scaffold":
        return adapter, fisher
    pull = {name: handed.get(f"control.{name}", np.float32(0)) for name in adapter}
    moved = {f"control.{name}": fisher[f"fisher.{name}"] - np.float32(0.5) for name in adapter}
    return {name: tensor - pull[name] for name, tensor in adapter.items()}, moved


def expected_rounds(
    config: RunConfig, clients: list[str], samples: int = 10
) -> Iterator[list[State]]:
    """Of each round of an undisturbed run what the strategy that leads makes of its updates, and then
    what each shadow does; computed without any coordinator."""
    shape = config.adapter
    first = State(initial_adapter(shape.modalities, shape.rank, HIDDEN, config.seed))
    states = [first for _ in config.strategies]
    for number in range(1, config.rounds + 1):
        base, handed = states[0].adapter, states[0].handed
        ranks = {c: config.adapter.rank_of(index) for index, c in enumerate(sorted(clients))}
        sent = {c: work(config, base, handed, c, number, rank) for c, rank in ranks.items()}
        updates = [Update(client, samples, *pair) for client, pair in sent.items()]
        states = [
            strategy_of(strategy).advance(State(base, state.moments), updates)
            for strategy, state in zip(config.strategies, states, strict=True)
        ]
        yield states


def expected_result(config: RunConfig, clients: list[str], samples: int = 10) -> Tensors:
    """The last adapter of an undisturbed run."""
    *_, (state, *_) = expected_rounds(config, clients, samples)
    return state.adapter


def same_bytes(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(
        one[name].tobytes() == other[name].tobytes() for name in one
    )


@dataclass
class FakeClient:
    """One client: each call is one RPC, errors are ours."""

    port: int
    token: str
    id: str
    role: int = TRAINER
    samples: int = 10
    run: str = ""
    session: str = ""
    ca: Path | None = None  # speaks TLS where there is one
    fisher: bool = True  # sends what FedNano's strategies, or SCAFFOLD, want beside the adapter
    twin: int = 0  # port of another coordinator, to turn to when this one is gone
    config: RunConfig = field(init=False)
    channel: grpc.Channel = field(init=False)

    def __post_init__(self) -> None:
        self.dial(self.port)

    def dial(self, port: int) -> None:
        self.port = port
        tls = ClientTls(self.ca) if self.ca else None
        self.channel = make_channel(f"127.0.0.1:{port}", tls)
        self.stub = CoordinatorStub(self.channel)

    def close(self) -> None:
        self.channel.close()

    def header(self, number: int = 0, attempt: int = 0) -> Header:
        return make_header(
            self.id, run=self.run, session=self.session, round_number=number, attempt=attempt
        )

    def call(self, method: str, request: object) -> object:
        with translated():
            return getattr(self.stub, method)(request, metadata=bearer(self.token), timeout=10)

    def join(self, **changes: object) -> JoinReply:
        values: dict[str, object] = {
            "header": self.header(),
            "role": self.role,
            "samples": self.samples,
            "fingerprint": FINGERPRINT,
            "hidden_size": HIDDEN,
            "version": "test",
        }
        reply = self.call("Join", JoinRequest(**{**values, **changes}))
        if reply.HasField("member"):
            self.run, self.session = reply.member.run, reply.member.session
            self.config = RunConfig.model_validate_json(reply.member.config_json)
        return reply

    def next_task(self, wait_ms: int = 0) -> NextTaskReply:
        return self.call("NextTask", NextTaskRequest(header=self.header(), wait_ms=wait_ms))

    def heartbeat(self, number: int = 0, attempt: int = 0, **more: object) -> HeartbeatReply:
        request = HeartbeatRequest(header=self.header(number, attempt), **more)
        return self.call("Heartbeat", request)

    def adapter(self, **which: object) -> Tensors:
        request = GetAdapterRequest(header=self.header(), run=self.run, **which)
        with translated():
            replies = self.stub.GetAdapter(request, metadata=bearer(self.token), timeout=10)
            payload = Payload(next(replies).head.tensors, 1 << 30)
            for reply in replies:
                payload.feed(reply.chunk)
        return payload.arrays()

    def submit(
        self,
        number: int,
        attempt: int,
        base_digest: str,
        adapter: Tensors,
        auxiliary: Tensors,
        *,
        dtype: DType = FP32,
        parts: Callable[[Iterator[SubmitRequest]], Iterator[SubmitRequest]] = iter,
        **changes: object,
    ) -> SubmitReply:
        buffers = [pack(tensor, dtype) for tensor in (*adapter.values(), *auxiliary.values())]
        values: dict[str, object] = {
            "header": self.header(number, attempt),
            "base": base_digest,
            "tensors": [spec_of(name, tensor, dtype) for name, tensor in adapter.items()],
            "auxiliary": [spec_of(name, tensor, dtype) for name, tensor in auxiliary.items()],
            "digest": hashlib.sha256(b"".join(buffers)).hexdigest(),
            "samples": self.samples,
            "metrics": {"train_loss": 0.5},
            "costs": Costs(sent_bytes={"adapters": 100}, client_seconds=0.5),
        }

        def requests() -> Iterator[SubmitRequest]:
            yield SubmitRequest(head=SubmitHead(**{**values, **changes}))
            for chunk in chunked(buffers):
                yield SubmitRequest(chunk=chunk)

        return self.call("Submit", parts(requests()))

    def train(self, task: NextTaskReply, **changes: object) -> SubmitReply:
        """Does a train task."""
        wanted = task.train
        base, handed = self.adapter(digest=wanted.adapter), {}
        for digest in wanted.auxiliary:
            handed |= self.adapter(digest=digest)
        sent = work(self.config, base, handed, self.id, wanted.round, wanted.rank)
        adapter, auxiliary = sent if self.fisher else (sent[0], {})
        place = wanted.round, wanted.attempt, wanted.adapter
        return self.submit(*place, adapter, auxiliary, **changes)

    def evaluate(self, task: NextTaskReply, accuracy: float = 0.5) -> SubmitReply:
        wanted = task.evaluate
        scores = [
            Evaluation(adapter=digest, samples=4, metrics={"accuracy": accuracy})
            for digest in wanted.adapters
        ]
        request = SubmitEvaluationRequest(
            header=self.header(wanted.round, wanted.attempt), evaluations=scores
        )
        return self.call("SubmitEvaluation", request)

    def live(self, until: Callable[[], bool] = lambda: False) -> str:
        """A client's whole life: joins, does its tasks, survives failures. The run's end state."""
        while not until():
            try:
                if not self.session and not self.join().HasField("member"):
                    time.sleep(0.05)
                    continue
                task = self.next_task(wait_ms=500)
                if task.HasField("train"):
                    self.train(task)
                elif task.HasField("evaluate"):
                    self.evaluate(task, 0.1 * (task.evaluate.round + 1))
                elif task.HasField("finished"):
                    return task.finished.run_state
            except SessionEnded:
                self.session = ""
            except RETRYABLE:
                time.sleep(0.05)
                self.close()
                self.port, self.twin = self.twin or self.port, self.port if self.twin else 0
                self.dial(self.port)
        return ""


class Crowd:
    """Several clients, each living in a thread of its own."""

    def __init__(self, clients: list[FakeClient]) -> None:
        self.clients = clients
        self.states: dict[int, str] = {}
        self._leave = threading.Event()
        self._threads = [
            threading.Thread(target=self._live, args=(client,), daemon=True) for client in clients
        ]

    def _live(self, client: FakeClient) -> None:
        self.states[id(client)] = client.live(self._leave.is_set)

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave.set()
        for thread in self._threads:
            thread.join(15)
        for client in self.clients:
            client.close()

    def wait(self, seconds: float = 30) -> dict[int, str]:
        """Until all have seen the run end."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        assert len(self.states) == len(self.clients), f"only {self.states} ended"
        return self.states


def evaluator(port: int, token: str, name: str = "evaluator") -> FakeClient:
    return FakeClient(port, token, name, role=EVALUATOR)
