"""The life of the process: start, ports, TLS, refusal to be exposed, draining."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer
from fednano.llm.cli import llm as command
from fednano.llm.server import SERVICE, LlmServer, Ports, announce
from fednano.llm.settings import LlmSettings
from fednano.models.frozen import FrozenLLM
from fednano.models.language_model import Sampling
from fednano.wire import llm_pb2, llm_pb2_grpc
from fednano.wire.channels import ClientTls, make_channel
from fednano.wire.errors import InvalidRequest
from fednano.wire.headers import make_header
from fednano.wire.interceptors import bearer
from fednano.wire.sessions import Identity, SessionSigner, write_keys
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from tests.certificates import make_certificate
from tests.llm.caller import generate_request
from tests.models.causal import build, packed

START = (
    "import typer; from fednano.llm.cli import llm; app = typer.Typer(); app.command()(llm); app()"
)


def settings(keys: tuple[bytes, bytes], **given: Any) -> LlmSettings:
    given = {"model": Path("unused"), "port": 0, "metrics_port": -1, **given}
    return LlmSettings(session_public_key=keys[1].decode(), **given)


def test_a_terminated_service_finishes_what_it_has_begun(tmp_path):
    """SIGTERM in the middle of an answer: it is written to its end, then the process exits 0."""
    model = build(positions=4000)
    model.save_pretrained(tmp_path / "llm")
    engine = FrozenLLM.load(tmp_path / "llm", device="cpu")
    private, public = write_keys(tmp_path)
    flags = ["--model", tmp_path / "llm", "--session-public-key-file", public]
    flags += ["--port", "0", "--metrics-port", "0", "--threads", "1", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", START, *map(str, flags)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process, make_channel(f"127.0.0.1:{ready_port(process)}") as channel:
        token = SessionSigner(private.read_bytes()).issue(Identity("a", "site"))[0]
        header = make_header("a", fingerprint=engine.fingerprint)
        sampling = Sampling(300, temperature=5.0, stop_ids=(63,), seed=4)
        stub = llm_pb2_grpc.LanguageModelStub(channel)
        sent = generate_request(header, packed(engine, (5,)), sampling)
        replies = stub.Generate(iter(sent), metadata=bearer(token), timeout=60)
        first = next(replies)
        process.send_signal(signal.SIGTERM)
        found = [t for reply in (first, *replies) for t in reply.tokens]
        assert process.wait(30) == 0
    expected = [t for step in engine.generate(packed(engine, (5,)), sampling) for t in step]
    assert [t.id for t in found] == [t.id for t in expected]
    assert len(found) > 20


def ready_port(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    ready = json.loads(process.stdout.readline())
    assert ready["event"] == "ready"
    assert ready["metrics_port"] > 0
    return int(ready["port"])


async def test_a_stopping_service_says_so_and_takes_nothing_new(keys, engine):
    server = LlmServer(settings(keys), engine)
    ports = await server.start()
    await server.stop(drain=0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc}") as channel:
        stub = llm_pb2_grpc.LanguageModelStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Describe(llm_pb2.DescribeRequest())
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_watchers_of_health_are_told_and_do_not_hold_the_end_up(keys, engine):
    server = LlmServer(settings(keys), engine)
    ports = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=SERVICE)
        )
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        async with asyncio.timeout(10):
            await server.stop(drain=60)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    return make_certificate(tmp_path)


async def test_both_listeners_speak_tls(keys, engine, certificate):
    paths = {"tls_certificate": certificate[0], "tls_key": certificate[1]}
    server = LlmServer(settings(keys, metrics_port=0, **paths), engine)
    ports = await server.start()
    token = SessionSigner(keys[0]).issue(Identity("a", "site"))[0]
    trust = ssl.create_default_context(cafile=str(certificate[0]))

    def call() -> tuple[str, int]:
        url = f"https://127.0.0.1:{ports.metrics}/metrics"
        with (
            make_channel(f"127.0.0.1:{ports.grpc}", ClientTls(certificate[0])) as channel,
            urllib.request.urlopen(url, timeout=10, context=trust) as metrics,
        ):
            request = llm_pb2.DescribeRequest(header=make_header("a"))
            stub = llm_pb2_grpc.LanguageModelStub(channel)
            return stub.Describe(request, metadata=bearer(token)).name, metrics.status

    assert await asyncio.to_thread(call) == ("small", 200)
    await server.stop(drain=0)


@pytest.mark.parametrize("field", ["host", "metrics_host"])
async def test_nothing_is_exposed_in_the_clear_unasked(keys, engine, field):
    given = settings(keys, metrics_port=0, **{field: "0.0.0.0"})
    with pytest.raises(InvalidRequest, match=f"{field}: expected a loopback address"):
        await LlmServer(given, engine).start()
    server = LlmServer(given.model_copy(update={"insecure": True}), engine)
    await server.start()
    await server.stop(drain=0)


def test_the_ready_file_holds_the_ports(tmp_path):
    announce(Ports(1234, 5678), tmp_path / "ready.json")
    found = json.loads((tmp_path / "ready.json").read_text())
    assert found == {"event": "ready", "port": 1234, "metrics_port": 5678}
    assert [path.name for path in tmp_path.iterdir()] == ["ready.json"]


@pytest.fixture
def log_handlers() -> Iterator[None]:
    """The command sends logs to its own standard error, which ends with the test."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers = handlers
    root.setLevel(level)


def invoke(*flags: Any, env: dict[str, str] | None = None) -> Any:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(flag) for flag in flags], env=env)


def test_what_is_missing_is_named(tmp_path):
    result = invoke("--session-public-key-file", tmp_path / "none")
    assert result.exit_code == 2
    assert "session_public_key_file: expected a file to read" in result.output
    result = invoke("--model", tmp_path)
    assert result.exit_code == 2
    assert "session_public_key: expected" in result.output


def test_a_private_key_in_the_wrong_place_is_not_repeated(tmp_path, keys):
    wrong = {"FEDNANO_LLM_SESSION_PUBLIC_KEY": keys[0].decode()}
    result = invoke("--model", tmp_path, env=wrong)
    assert result.exit_code == 2
    assert "session_public_key: expected Ed25519 public keys in PEM form" in result.output
    assert "PRIVATE" not in result.output


@pytest.mark.usefixtures("log_handlers")
def test_a_directory_without_a_model_is_a_sentence_not_a_traceback(tmp_path, keys):
    key = {"FEDNANO_LLM_SESSION_PUBLIC_KEY": keys[1].decode()}
    result = invoke("--model", tmp_path, env=key)
    assert result.exit_code == 2
    assert "is no Hugging Face checkpoint" in result.output


def test_an_exposed_service_does_not_even_load_its_model(tmp_path, keys):
    key = {"FEDNANO_LLM_SESSION_PUBLIC_KEY": keys[1].decode()}
    result = invoke("--model", tmp_path, "--host", "0.0.0.0", env=key)
    assert result.exit_code == 2
    assert "host: expected a loopback address, TLS, or --insecure" in result.output


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path, keys, monkeypatch):
    monkeypatch.setenv("FEDNANO_LLM_QUEUE", "7")
    monkeypatch.setenv("FEDNANO_LLM_SESSION_PUBLIC_KEY", keys[1].decode())
    file = tmp_path / "llm.yaml"
    file.write_text("model: m\nqueue: 5\nnew_tokens: 9\nport: 1\n")
    found = LlmSettings.load({"port": 2, "host": None}, file)
    assert (found.port, found.queue, found.new_tokens, found.model) == (2, 7, 9, Path("m"))
