"""An error raised in a service is the same error at its caller."""

from __future__ import annotations

import grpc
import pytest
from fednano.wire.channels import listen, make_channel, make_server, translated
from fednano.wire.errors import (
    FedNanoError,
    InvalidRequest,
    Problem,
    Unauthenticated,
    Unavailable,
    WrongModel,
)
from fednano.wire.interceptors import bearer
from fednano.wire.llm_pb2 import DescribeReply, DescribeRequest
from fednano.wire.llm_pb2_grpc import (
    LanguageModelServicer,
    LanguageModelStub,
    add_LanguageModelServicer_to_server,
)
from fednano.wire.sessions import Identity


class Failing(LanguageModelServicer):
    """Raises what it was given."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def Describe(self, request: object, context: object) -> DescribeReply:  # noqa: N802
        raise self._error


async def authenticate(token: str) -> Identity:
    if token != "good":
        raise Unauthenticated
    return Identity("somebody", "site")


async def call(error: Exception, token: str = "good") -> None:
    import asyncio

    server = make_server(authenticate)
    add_LanguageModelServicer_to_server(Failing(error), server)
    port = listen(server, "127.0.0.1", 0, None)
    await server.start()

    def ask() -> None:
        with translated(), make_channel(f"127.0.0.1:{port}") as channel:
            LanguageModelStub(channel).Describe(DescribeRequest(), metadata=bearer(token))

    try:
        await asyncio.to_thread(ask)
    finally:
        await server.stop(0)


async def test_class_sentence_and_fields_arrive() -> None:
    problem = Problem("header.fingerprint", "abc", "def")
    with pytest.raises(WrongModel, match="another model") as caught:
        await call(WrongModel("another model", problem))
    assert caught.value.problems == (problem,)


async def test_what_is_nobodys_business_stays_in_the_log() -> None:
    with pytest.raises(FedNanoError) as caught:
        await call(RuntimeError("the password is swordfish"))
    assert "swordfish" not in str(caught.value)


async def test_a_wrong_token_never_reaches_the_servicer() -> None:
    with pytest.raises(Unauthenticated):
        await call(AssertionError("was called"), token="bad")


def test_nobody_there_is_unavailable() -> None:
    with (
        pytest.raises(Unavailable),
        translated(),
        make_channel("127.0.0.1:1") as channel,
    ):
        LanguageModelStub(channel).Describe(DescribeRequest(), timeout=5)


def test_every_error_has_a_status_of_its_own_kind() -> None:
    assert InvalidRequest.of("rank", "1 to 4", 5).detail == "rank: expected 1 to 4, got 5"
    assert InvalidRequest.status is grpc.StatusCode.INVALID_ARGUMENT
