"""Who may call what: every method of every service but health, found by walking the descriptors."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from fednano.llm.server import SERVICE
from fednano.wire import llm_pb2
from fednano.wire.errors import from_rpc_error
from fednano.wire.interceptors import bearer
from fednano.wire.sessions import Identity, SessionSigner, make_keys
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.llm.caller import CLIENT, RUN, Caller

METHODS = {m.name: m for m in llm_pb2.DESCRIPTOR.services_by_name["LanguageModel"].methods}


def first_message(rpc: str, header: Any) -> Any:
    """The smallest request that carries a header."""
    message = GetMessageClass(METHODS[rpc].input_type)()
    head = message.head if METHODS[rpc].client_streaming else message
    head.header.CopyFrom(header)
    return message


def statuses(llm: Caller, rpc: str, metadata: Any, header: Any) -> grpc.aio.AioRpcError:
    """The error of one call, whatever its kind."""
    method, message = METHODS[rpc], first_message(rpc, header)
    kinds = ("unary", "stream")
    kind = f"{kinds[method.client_streaming]}_{kinds[method.server_streaming]}"
    call = getattr(llm.channel, kind)(
        f"/{SERVICE}/{rpc}",
        request_serializer=type(message).SerializeToString,
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    sent = iter([message]) if method.client_streaming else message
    with pytest.raises(grpc.RpcError) as caught:
        reply = call(sent, metadata=metadata, timeout=20)
        list(reply) if method.server_streaming else reply
    return caught.value


def wrong_credentials(llm: Caller) -> Iterator[tuple[tuple[str, str], ...]]:
    stranger = SessionSigner(make_keys()[0]).issue(Identity(CLIENT, "site", RUN))[0]
    yield ()
    yield (("authorization", llm.token()),)  # no scheme
    yield (("authorization", f"Basic {llm.token()}"),)
    yield bearer("nonsense")
    yield bearer(stranger)
    yield bearer(llm.token()[:-4] + "AAAA")


async def off_loop(function: Any, *arguments: Any) -> Any:
    return await asyncio.to_thread(function, *arguments)


@pytest.mark.parametrize("rpc", METHODS)
async def test_wrong_credentials_are_refused(llm, rpc):
    for metadata in wrong_credentials(llm):
        error = await off_loop(statuses, llm, rpc, metadata, llm.header())
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert error.details() == "a valid bearer token is required"


@pytest.mark.parametrize("rpc", METHODS)
async def test_expired_tokens_are_refused(llm, keys, rpc):
    old = SessionSigner(keys[0], ttl_seconds=-1).issue(Identity(CLIENT, "site", RUN))[0]
    error = await off_loop(statuses, llm, rpc, bearer(old), llm.header())
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "expired" in error.details()


@pytest.mark.parametrize("rpc", METHODS)
async def test_a_viewer_may_not_compute(llm, rpc):
    metadata = bearer(llm.token(role="viewer"))
    error = await off_loop(statuses, llm, rpc, metadata, llm.header())
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("rpc", METHODS)
async def test_nobody_calls_in_anothers_name(llm, rpc):
    for metadata, field in [
        (bearer(llm.token(client="hospital-b")), "header.client"),
        (bearer(llm.token(run="another")), "header.run"),
    ]:
        error = await off_loop(statuses, llm, rpc, metadata, llm.header())
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        assert from_rpc_error(error).problems[0].field == field


@pytest.mark.parametrize("rpc", METHODS)
async def test_another_protocol_is_refused(llm, rpc):
    header = llm.header()
    header.protocol = 2
    error = await off_loop(statuses, llm, rpc, llm.metadata(), header)
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "header.protocol: expected 1, got 2" in error.details()


@pytest.mark.parametrize("role", ["site", "admin"])
async def test_sites_and_admins_may_compute_outside_a_run_too(llm, role):
    request = llm_pb2.DescribeRequest(header=llm.header())
    metadata = bearer(llm.token(role=role, run=""))
    assert (await llm.stub.Describe(request, metadata=metadata)).fingerprint == "mark"


async def test_an_unknown_method_without_a_token_looks_like_a_known_one(llm):
    call = llm.live.unary_unary(f"/{SERVICE}/Nothing")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(b"")
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_health_is_open_to_all(llm):
    stub = health_pb2_grpc.HealthStub(llm.live)
    for service in ("", SERVICE):
        request = health_pb2.HealthCheckRequest(service=service)
        assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


async def test_reflection_needs_a_token(llm):
    stub = reflection_pb2_grpc.ServerReflectionStub(llm.live)
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [reply async for reply in stub.ServerReflectionInfo(iter([ask]))]
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    call = stub.ServerReflectionInfo(iter([ask]), metadata=llm.metadata())
    (reply,) = [reply async for reply in call]
    assert SERVICE in [s.name for s in reply.list_services_response.service]
