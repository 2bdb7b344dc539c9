"""Who may call what over gRPC; and that the coordinator needs no torch."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import grpc
import httpx
import pytest
from fednano.coordinator.server import CoordinatorServer
from fednano.wire import coordinator_pb2
from fednano.wire.channels import listen, make_channel, make_server
from fednano.wire.coordinator_pb2_grpc import CoordinatorStub
from fednano.wire.errors import (
    Busy,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    SessionEnded,
    Unauthenticated,
)
from fednano.wire.interceptors import bearer
from fednano.wire.sessions import Identity, SessionVerifier
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.coordinator.conftest import ADMIN, PUBLIC_KEY, Running, settings_of
from tests.coordinator.federation import FakeClient, config_of
from tests.redis_server import RedisServer

METHODS = list(coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"].methods)


def status_of(port: int, method: object, token: str | None) -> grpc.StatusCode:
    """The status of a call with an empty request."""
    request = getattr(coordinator_pb2, method.input_type.name)()
    with make_channel(f"127.0.0.1:{port}") as channel:
        call = getattr(CoordinatorStub(channel), method.name)
        metadata = bearer(token) if token is not None else None
        try:
            reply = call(
                iter([request]) if method.client_streaming else request,
                metadata=metadata,
                timeout=5,
            )
            if method.server_streaming:
                list(reply)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
async def test_every_call_needs_a_token_of_the_right_role(
    coordinator: Running, method: object
) -> None:
    _, viewer = await coordinator.store.create_token("reader", "viewer")
    port = coordinator.port
    seen = [
        await asyncio.to_thread(status_of, port, method, token)
        for token in (None, "fn_wrong", viewer, ADMIN)
    ]
    denied = grpc.StatusCode.PERMISSION_DENIED
    assert seen[:2] == [grpc.StatusCode.UNAUTHENTICATED] * 2
    assert (seen[2] is denied) == (method.name != "GetAdapter")
    assert seen[3] in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)


async def test_health_is_open_and_reflection_is_not(coordinator: Running) -> None:
    def ask() -> tuple[int, grpc.StatusCode]:
        with make_channel(f"127.0.0.1:{coordinator.port}") as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            status = check(health_pb2.HealthCheckRequest(service="fednano.v1.Coordinator")).status
            path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
            call = channel.stream_stream(path)(iter([b""]))
            with pytest.raises(grpc.RpcError) as refused:
                list(call)
            return status, refused.value.code()

    serving = health_pb2.HealthCheckResponse.SERVING
    assert await asyncio.to_thread(ask) == (serving, grpc.StatusCode.UNAUTHENTICATED)


async def test_a_login_gives_a_token_that_the_llm_service_verifies(coordinator: Running) -> None:
    client = FakeClient(coordinator.port, ADMIN, "asker")
    request = coordinator_pb2.LoginRequest(header=client.header())
    reply = await asyncio.to_thread(client.call, "Login", request)
    identity = SessionVerifier(PUBLIC_KEY).verify(reply.llm_token.token)
    assert (identity.name, identity.role, identity.run) == ("asker", "admin", "")
    client.close()


async def site_client(running: Running, token_name: str, client: str) -> tuple[str, FakeClient]:
    """A new site token's id, and a client that holds it."""
    record, secret = await running.store.create_token(token_name, "site")
    return record.id, FakeClient(running.port, secret, client, run="trial")


async def joined(client: FakeClient) -> None:
    for _ in range(100):
        if (await asyncio.to_thread(client.join)).HasField("member"):
            return
        await asyncio.sleep(0.05)
    raise AssertionError("no run took the client")


async def test_a_revoked_token_is_refused_at_once(coordinator: Running) -> None:
    await coordinator.store.create_run(config_of(), "test")
    token, client = await site_client(coordinator, "hospital", "c0")
    await joined(client)
    reply = await asyncio.to_thread(client.heartbeat)
    identity = SessionVerifier(PUBLIC_KEY).verify(reply.llm_token.token)
    assert (identity.name, identity.role, identity.run) == ("c0", "site", "trial")
    await coordinator.store.revoke_token(token)
    with pytest.raises(Unauthenticated):
        await asyncio.to_thread(client.heartbeat)
    client.close()


async def test_a_client_id_stays_with_its_token_and_a_session_too(coordinator: Running) -> None:
    await coordinator.store.create_run(config_of(), "test")
    _, owner = await site_client(coordinator, "hospital", "c0")
    _, renewed = await site_client(coordinator, "hospital", "c0")
    _, stranger = await site_client(coordinator, "factory", "c0")
    await joined(owner)
    with pytest.raises(PermissionDenied, match="belongs to another token"):
        await asyncio.to_thread(stranger.join)
    stranger.session = owner.session
    with pytest.raises(SessionEnded):
        await asyncio.to_thread(stranger.heartbeat)
    await joined(renewed)  # the site's next token, of the same name
    for client in (owner, renewed, stranger):
        client.close()


async def test_a_login_under_another_sites_client_id_is_refused(coordinator: Running) -> None:
    await coordinator.store.create_run(config_of(), "test")
    token, owner = await site_client(coordinator, "hospital", "c0")
    _, stranger = await site_client(coordinator, "factory", "c0")
    await joined(owner)
    request = coordinator_pb2.LoginRequest(header=owner.header())
    with pytest.raises(PermissionDenied, match="belongs to another token"):
        await asyncio.to_thread(stranger.call, "Login", request)
    assert (await asyncio.to_thread(owner.call, "Login", request)).HasField("llm_token")
    await coordinator.store.revoke_token(token)  # from now on the id may be inherited
    assert (await asyncio.to_thread(stranger.call, "Login", request)).HasField("llm_token")
    owner.close()
    stranger.close()


async def test_the_token_for_the_llm_service_is_renewed_at_half_its_life(
    redis_server: RedisServer,
) -> None:
    server = CoordinatorServer(settings_of(redis_server.url, session_seconds=4.0))
    client = FakeClient((await server.start()).grpc, ADMIN, "c0", run="trial")
    await server.store.create_run(config_of(), "test")
    await joined(client)
    first, second = [await asyncio.to_thread(client.heartbeat) for _ in range(2)]
    await asyncio.sleep(2.2)
    third = await asyncio.to_thread(client.heartbeat)
    assert [reply.HasField("llm_token") for reply in (first, second, third)] == [True, False, True]
    assert third.llm_token.expires_at_ms > first.llm_token.expires_at_ms
    assert SessionVerifier(PUBLIC_KEY).verify(third.llm_token.token).name == "c0"
    client.close()
    await server.stop()


async def test_a_refused_call_is_logged_with_what_its_header_tells(
    coordinator: Running, caplog: pytest.LogCaptureFixture
) -> None:
    client = FakeClient(coordinator.port, ADMIN, "c0", run="none", session="x")
    request = coordinator_pb2.NextTaskRequest(header=client.header(7))
    with caplog.at_level("INFO"), pytest.raises(NotFound):
        await asyncio.to_thread(client.call, "NextTask", request)
    record = next(record for record in caplog.records if record.message == "request refused")
    told = (record.run, record.round, record.client, record.request_id)  # type: ignore[attr-defined]
    assert told == ("none", 7, "c0", request.header.request)
    client.close()


async def test_those_without_a_token_can_t_fill_the_log(
    coordinator: Running, caplog: pytest.LogCaptureFixture
) -> None:
    client = FakeClient(coordinator.port, "fn_wrong", "c0")
    with caplog.at_level("INFO"):
        with pytest.raises(Unauthenticated):
            await asyncio.to_thread(client.join)
        async with httpx.AsyncClient(trust_env=False) as http:
            reply = await http.get(f"http://127.0.0.1:{coordinator.http_port}/api/v1/runs")
    assert reply.status_code == 401
    assert [r for r in caplog.records if r.message in ("request refused", "http request")] == []
    client.close()


async def test_more_calls_than_a_server_takes_may_be_tried_again() -> None:
    async def admit(_: str) -> Identity:
        await asyncio.sleep(1)
        raise Unauthenticated

    server = make_server(admit, most_calls=1)
    server.add_generic_rpc_handlers([])
    port = listen(server, "127.0.0.1", 0, None)
    await server.start()
    clients = [FakeClient(port, "any", "c0") for _ in range(2)]
    calls = [asyncio.to_thread(client.join) for client in clients]
    refusals = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(refusal) for refusal in refusals} == {Unauthenticated, Busy}
    await server.stop(0)


def test_a_redis_address_that_is_none_is_named(redis_server: RedisServer) -> None:
    for url in ("foo", "redis://:secret@host:port/0"):
        with pytest.raises(InvalidRequest, match=r"redis_url: expected redis://") as refused:
            CoordinatorServer(settings_of(url))
        assert "secret" not in refused.value.detail


@pytest.mark.parametrize("name", ["a:b", "abc\n", "", "a" * 129])
async def test_an_odd_client_id_is_refused(coordinator: Running, name: str) -> None:
    client = FakeClient(coordinator.port, ADMIN, name)
    with pytest.raises(InvalidRequest, match=r"header\.client"):
        await asyncio.to_thread(client.join)
    client.close()


async def test_a_public_address_without_tls_is_refused(redis_server) -> None:
    server = CoordinatorServer(settings_of(redis_server.url, host="0.0.0.0"))
    with pytest.raises(InvalidRequest, match="host: expected a loopback address, TLS"):
        await server.start()
    await server.stop()


def test_a_coordinator_without_a_session_key_is_refused(redis_server) -> None:
    with pytest.raises(InvalidRequest, match="session_key: expected an Ed25519 private key"):
        CoordinatorServer(settings_of(redis_server.url, session_key=""))


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
import asyncio
from fednano.coordinator.server import CoordinatorServer
from fednano.coordinator.settings import CoordinatorSettings
from fednano.wire.sessions import make_keys
async def main():
    key = make_keys()[0].decode()
    server = CoordinatorServer(
        CoordinatorSettings(redis_url=sys.argv[1], grpc_port=0, http_port=0, session_key=key)
    )
    ports = await server.start()
    assert ports.grpc and ports.http
    await server.stop()
asyncio.run(main())
import fednano.coordinator.cli
"""


def test_the_coordinator_runs_with_torch_blocked(redis_server) -> None:
    command = [sys.executable, "-c", BLOCKED, redis_server.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
