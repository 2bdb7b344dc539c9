"""Spans of clients and services, as an OpenTelemetry collector receives them."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import torch
from fednano import tracing
from fednano.client.adapters import NanoAdapters
from fednano.client.batches import Batch
from fednano.client.coordination import CoordinatorClient, Membership
from fednano.client.edge import EdgeHalf, NanoEdge
from fednano.client.examples import Example
from fednano.client.remote import Caller, RemoteLanguageModel
from fednano.client.replicas import Replicas
from fednano.coordinator.server import CoordinatorServer
from fednano.models.frozen import FrozenLLM
from fednano.models.language_model import Sampling
from fednano.wire import coordinator_pb2 as pb
from fednano.wire.errors import FedNanoError, InvalidRequest, WrongModel
from fednano.wire.headers import make_header
from fednano.wire.run_config import RunConfig
from fednano.wire.sessions import Identity, SessionSigner

from tests.client.serving import PRIVATE, served
from tests.coordinator.conftest import ADMIN, settings_of
from tests.redis_server import RedisServer
from tests.test_logs import Lines, lines

pytest.importorskip(
    "opentelemetry.exporter.otlp.proto.grpc", reason="TRACES UNTESTED: pip install '.[tracing]'"
)
from opentelemetry.proto.collector.trace.v1 import (
    trace_service_pb2 as otlp,
)
from opentelemetry.proto.collector.trace.v1 import (
    trace_service_pb2_grpc as otlp_grpc,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span as OtlpSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status

__all__ = ["lines"]
LLM, COORDINATOR = "fednano.v1.LanguageModel", "fednano.v1.Coordinator"
CLIENT, SERVER = OtlpSpan.SPAN_KIND_CLIENT, OtlpSpan.SPAN_KIND_SERVER
IDS = {"run": "trial", "round": 3, "client": "ward-7"}


@dataclass
class Collector(otlp_grpc.TraceServiceServicer):
    """Keeps what is exported to it."""

    exported: list[Any] = field(default_factory=list)

    def Export(self, request: Any, context: object) -> Any:  # noqa: N802
        self.exported.extend(request.resource_spans)
        return otlp.ExportTraceServiceResponse()

    def spans(self) -> list[OtlpSpan]:
        """All that were recorded; nothing is recorded after that."""
        tracing.stop()
        return [s for group in self.exported for scope in group.scope_spans for s in scope.spans]

    def named(self, name: str, kind: int) -> OtlpSpan:
        (span,) = (s for s in self.spans() if s.name == name and s.kind == kind)
        return span


def told(span: OtlpSpan) -> dict[str, Any]:
    """A span's attributes."""
    return {
        item.key: getattr(item.value, str(item.value.WhichOneof("value")))
        for item in span.attributes
    }


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Traces are on, and go to a real OTLP server."""
    server, made = grpc.server(ThreadPoolExecutor(2)), Collector()
    otlp_grpc.add_TraceServiceServicer_to_server(made, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    tracing.configure("test")
    yield made
    tracing.stop()
    server.stop(0).wait()


@pytest.fixture
def llm(collector: Collector, frozen: FrozenLLM) -> Iterator[RemoteLanguageModel]:
    token, _ = SessionSigner(PRIVATE).issue(Identity("ward-7", "site", "trial"))
    caller = Caller(lambda: make_header("ward-7", run="trial", round_number=3), lambda: token)
    with served(frozen) as service:
        replicas = Replicas(f"127.0.0.1:{service.port}")
        yield RemoteLanguageModel(replicas, caller)
        replicas.close()


@pytest.fixture
def batch(edge: EdgeHalf, examples: list[Example]) -> Batch:
    return Batch.of([edge.prepare(example) for example in examples])


@pytest.fixture
def arguments(batch: Batch, adapters: NanoAdapters) -> Any:
    return (
        batch.sequences(NanoEdge(adapters)(batch).detach()),
        batch.labels,
        torch.tensor([0.5, 0.3, 0.2]),
    )


def test_a_client_s_step_is_the_parent_of_the_service_s(
    llm: RemoteLanguageModel, collector: Collector, arguments: Any
) -> None:
    with tracing.working("train", IDS):
        llm.step(*arguments)
    (task,) = (span for span in collector.spans() if span.name == "train")
    called = collector.named(f"{LLM}/ForwardBackward", CLIENT)
    computed = collector.named(f"{LLM}/ForwardBackward", SERVER)
    assert called.parent_span_id == task.span_id
    assert computed.parent_span_id == called.span_id
    assert task.trace_id == called.trace_id == computed.trace_id
    assert called.start_time_unix_nano <= computed.start_time_unix_nano
    assert computed.end_time_unix_nano <= called.end_time_unix_nano


def test_spans_tell_ids_and_nothing_that_was_sent(
    llm: RemoteLanguageModel, collector: Collector, arguments: Any
) -> None:
    llm.step(*arguments)
    (called, computed) = (
        told(collector.named(f"{LLM}/ForwardBackward", kind)) for kind in (CLIENT, SERVER)
    )
    assert called == computed
    request_id = called.pop("fednano.request_id")
    assert len(request_id) == 32
    assert called == {
        "fednano.run": "trial",
        "fednano.round": 3,
        "fednano.client": "ward-7",
        "rpc.system": "grpc",
        "rpc.service": LLM,
        "rpc.method": "ForwardBackward",
        "rpc.grpc.status_code": 0,
    }


def test_a_refused_call_is_the_caller_s_error_without_its_words(
    llm: RemoteLanguageModel, collector: Collector, arguments: Any
) -> None:
    llm.card.fingerprint = "of-another-model"
    with pytest.raises(WrongModel):
        llm.step(*arguments)
    for kind, status in ((CLIENT, Status.STATUS_CODE_ERROR), (SERVER, Status.STATUS_CODE_UNSET)):
        span = collector.named(f"{LLM}/ForwardBackward", kind)
        assert span.status.code == status
        assert told(span)["error.type"] == "WrongModel"
        assert told(span)["rpc.grpc.status_code"] == grpc.StatusCode.FAILED_PRECONDITION.value[0]
        assert b"of-another-model" not in span.SerializeToString()


def test_an_answer_that_nobody_waits_for_ends_its_spans_quietly(
    llm: RemoteLanguageModel, collector: Collector, arguments: Any, lines: Lines
) -> None:
    answer = llm.generate(arguments[0], Sampling(max_new_tokens=200))
    next(answer)
    answer.close()
    called = collector.named(f"{LLM}/Generate", CLIENT)
    assert told(called)["rpc.grpc.status_code"] == grpc.StatusCode.CANCELLED.value[0]
    assert called.status.code == Status.STATUS_CODE_UNSET
    assert lines("Failed to detach context") == []


def test_lines_of_a_traced_call_tell_its_trace(
    llm: RemoteLanguageModel, collector: Collector, arguments: Any, lines: Lines
) -> None:
    with tracing.working("train", IDS):
        llm.step(*arguments)
        logging.getLogger("fednano").info("in between")
    logging.getLogger("fednano").info("afterwards")
    trace_id = collector.named(f"{LLM}/ForwardBackward", SERVER).trace_id.hex()
    assert lines("in between")[0]["trace_id"] == trace_id
    served_lines = [line for line in lines("call served") if "ForwardBackward" in line["rpc"]]
    assert [line["trace_id"] for line in served_lines] == [trace_id]
    assert "trace_id" not in lines("afterwards")[0]


async def test_a_submission_s_trace_reaches_into_the_coordinator(
    collector: Collector, redis_server: RedisServer
) -> None:
    server = CoordinatorServer(settings_of(redis_server.url))
    ports = await server.start()
    client = CoordinatorClient(f"127.0.0.1:{ports.grpc}", ADMIN, "ward-7")
    member = Membership("trial", "ended", RunConfig(name="trial"), "", 0, 1)
    task = pb.TrainTask(round=3, attempt=1)

    def submit() -> None:
        head = pb.SubmitHead(header=client.header(member, task), base="none", samples=1)
        with tracing.working("train", IDS), pytest.raises(FedNanoError):
            client.submit(head, {"text.down": np.zeros((1, 8), np.float32)}, {})
        with pytest.raises(FedNanoError):
            client.heartbeat(member, task, 0.5, "training")

    await asyncio.to_thread(submit)
    async with httpx.AsyncClient(trust_env=False) as http:
        for path in ("/healthz", "/api/v1/runs"):
            await http.get(
                f"http://127.0.0.1:{ports.http}{path}", headers={"Authorization": f"Bearer {ADMIN}"}
            )
    client.close()
    await server.stop()
    called, taken = (collector.named(f"{COORDINATOR}/Submit", kind) for kind in (CLIENT, SERVER))
    assert (taken.trace_id, taken.parent_span_id) == (called.trace_id, called.span_id)
    names = {span.name for span in collector.spans() if span.kind == SERVER}
    assert names == {f"{COORDINATOR}/Submit", "GET /api/v1/runs"}
    assert told(collector.named("GET /api/v1/runs", SERVER))["fednano.request_id"]


def test_whoever_has_no_token_leaves_no_span(collector: Collector, frozen: FrozenLLM) -> None:
    with served(frozen) as service:
        replicas = Replicas(f"127.0.0.1:{service.port}")
        with pytest.raises(FedNanoError):
            RemoteLanguageModel(replicas, Caller(lambda: make_header("x"), lambda: "wrong"))
        replicas.close()
    assert [span.kind for span in collector.spans()] == [CLIENT]


def test_a_service_has_a_name_that_the_environment_may_change(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("", "ward"):
        monkeypatch.setenv("OTEL_SERVICE_NAME", name)
        tracing.configure("client")
        with tracing.working("train", {}):
            pass
        tracing.stop()
    found = [
        item.value.string_value
        for group in collector.exported
        for item in group.resource.attributes
        if item.key == "service.name"
    ]
    assert found == ["fednano-client", "ward"]


@pytest.mark.parametrize(
    ("variable", "value"),
    [("OTEL_TRACES_EXPORTER", "zipkin"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")],
)
def test_what_is_not_offered_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidRequest, match=variable):
        tracing.configure("test")
    assert not tracing.on()


@pytest.mark.parametrize(
    ("variable", "value"), [("OTEL_TRACES_EXPORTER", "none"), ("OTEL_SDK_DISABLED", "true")]
)
def test_traces_can_be_left_off_where_others_are_on(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv(variable, value)
    tracing.configure("test")
    assert not tracing.on()


def python(program: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)


def test_off_nothing_of_opentelemetry_is_imported() -> None:
    done = python(
        "import sys\n"
        "from fednano import logs\n"
        "import fednano.client.coordination, fednano.wire.channels\n"
        "logs.configure('llm')\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))\n"
    )
    assert done.returncode == 0, done.stderr


def test_asking_without_the_extra_ends_with_a_sentence(tmp_path: Path) -> None:
    """As `fednano client run` on a machine where it is not installed."""
    (tmp_path / "token").write_text("secret")
    done = python(
        "import sys\n"
        "sys.modules['opentelemetry.exporter'] = None\n"
        "from fednano.cli import main\n"
        "main()\n",
        *("client", "run", "--token-file", str(tmp_path / "token"), "--edge", str(tmp_path)),
        OTEL_TRACES_EXPORTER="otlp",
    )
    assert done.returncode == 2
    assert "pip install 'fednano[tracing]'" in done.stderr
    assert "Traceback" not in done.stderr
