"""The containers' health check, against real servers, in the clear and over TLS."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import grpc
import pytest
from fednano.health import main
from fednano.wire.channels import ServerTls, listen
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tests.certificates import make_certificate

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def serve(status: int, tls: ServerTls | None) -> tuple[grpc.aio.Server, int]:
    server, servicer = grpc.aio.server(), health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    await servicer.set("", status)
    port = listen(server, "127.0.0.1", 0, tls)
    await server.start()
    return server, port


async def ask(*arguments: str) -> tuple[int, str]:
    """From a process of its own, as a container does."""
    command = [sys.executable, "-m", "fednano.health", "--seconds", "5", *arguments]
    process = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
    _, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, errors.decode()


@pytest.fixture
async def serving() -> AsyncIterator[int]:
    server, port = await serve(SERVING, None)
    yield port
    await server.stop(None)


async def test_a_service_that_serves_is_healthy(serving: int) -> None:
    assert await ask(f"grpc://127.0.0.1:{serving}") == (0, "")


async def test_a_service_that_says_it_does_not_serve_is_not() -> None:
    server, port = await serve(NOT_SERVING, None)
    status, sentence = await ask(f"grpc://127.0.0.1:{port}")
    assert (status, sentence.strip()) == (1, f"grpc://127.0.0.1:{port} is not healthy: NOT_SERVING")
    await server.stop(None)


async def test_over_tls_the_service_is_checked_against_its_authority(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    server, port = await serve(SERVING, ServerTls(certificate, key))
    assert (await ask("--ca", str(certificate), f"grpcs://127.0.0.1:{port}"))[0] == 0
    stranger, _ = make_certificate(tmp_path / "other")
    assert (await ask("--ca", str(stranger), f"grpcs://127.0.0.1:{port}"))[0] == 1
    assert (await ask(f"grpc://127.0.0.1:{port}"))[0] == 1
    await server.stop(None)


class _Ready(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/readyz" else 503)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: a test's own requests."""


@pytest.fixture
def web() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), _Ready)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_http_is_healthy_where_a_get_succeeds(web: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"http://127.0.0.1:{web}/readyz"]) == 0
    assert main([f"http://127.0.0.1:{web}/elsewhere"]) == 1
    assert "HTTP 503" in capsys.readouterr().err


def test_nobody_there_is_a_sentence_and_not_a_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["http://127.0.0.1:9/readyz"]) == 1
    assert "refused" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["127.0.0.1:9"])
    assert end.value.code == 2
    assert "expected one that begins with grpc://" in capsys.readouterr().err
