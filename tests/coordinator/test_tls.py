"""TLS from end to end: gRPC, REST and the cookie; nothing in the clear."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fednano.coordinator.server import CoordinatorServer
from fednano.rest_client import RestClient, RestSettings
from fednano.wire.coordinator_pb2 import LoginRequest
from fednano.wire.errors import Unavailable

from tests.certificates import make_certificate
from tests.coordinator.conftest import ADMIN, Running, settings_of
from tests.coordinator.federation import FakeClient, config_of
from tests.coordinator.web import bearer
from tests.redis_server import RedisServer


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, signed by itself, and its key."""
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
async def secured(redis_server: RedisServer, pair: tuple[Path, Path]) -> AsyncIterator[Running]:
    settings = settings_of(redis_server.url, tls_certificate=pair[0], tls_key=pair[1])
    server = CoordinatorServer(settings)
    ports = await server.start()
    yield Running(server, ports)
    await server.stop()


async def test_grpc_over_tls_works_with_the_ca(secured: Running, pair: tuple[Path, Path]) -> None:
    await secured.store.create_run(config_of(), "test")
    client = FakeClient(secured.port, ADMIN, "c0", ca=pair[0])
    for _ in range(100):
        if (reply := await asyncio.to_thread(client.join)).HasField("member"):
            break
        await asyncio.sleep(0.05)
    assert reply.member.run == "trial"
    request = LoginRequest(header=client.header())
    assert (await asyncio.to_thread(client.call, "Login", request)).llm_token.token
    client.close()


async def test_rest_over_https_works_with_the_ca(secured: Running, pair: tuple[Path, Path]) -> None:
    await secured.store.create_run(config_of(), "test")
    url = f"https://127.0.0.1:{secured.http_port}"

    def runs(ca: Path | None) -> list[str]:
        with RestClient(RestSettings(url=url, token=ADMIN, ca=ca)) as rest:
            return [run["name"] for run in rest.items("/runs")]

    assert await asyncio.to_thread(runs, pair[0]) == ["trial"]
    with pytest.raises(Unavailable, match=r"(?i)certificate"):
        await asyncio.to_thread(runs, None)


async def test_the_cookie_over_https_is_secure(secured: Running, pair: tuple[Path, Path]) -> None:
    trust = ssl.create_default_context(cafile=str(pair[0]))
    url = f"https://127.0.0.1:{secured.http_port}/api/v1/login"
    async with httpx.AsyncClient(verify=trust, trust_env=False) as http:
        reply = await http.post(url, headers=bearer(ADMIN))
    assert "Secure" in reply.headers["set-cookie"]


async def test_what_comes_in_the_clear_is_refused(secured: Running) -> None:
    client = FakeClient(secured.port, ADMIN, "c0")
    with pytest.raises(Unavailable):
        await asyncio.to_thread(client.join)
    async with httpx.AsyncClient(trust_env=False) as http:
        with pytest.raises(httpx.TransportError):
            await http.get(f"http://127.0.0.1:{secured.http_port}/healthz")
    client.close()
