"""Who may call what over gRPC; and that the coordinator needs no torch."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import grpc
import pytest
from fednano.coordinator.server import CoordinatorServer
from fednano.wire import coordinator_pb2
from fednano.wire.channels import make_channel
from fednano.wire.coordinator_pb2_grpc import CoordinatorStub
from fednano.wire.errors import InvalidRequest, PermissionDenied, SessionEnded, Unauthenticated
from fednano.wire.interceptors import bearer
from fednano.wire.sessions import SessionVerifier
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.coordinator.conftest import ADMIN, PUBLIC_KEY, Running, settings_of
from tests.coordinator.federation import FakeClient, config_of

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


async def test_an_odd_client_id_is_refused(coordinator: Running) -> None:
    client = FakeClient(coordinator.port, ADMIN, "a:b")
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
