"""Real servers on port 0 over a small random Llama."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from fednano.llm.server import LlmServer
from fednano.llm.settings import LlmSettings
from fednano.models.frozen import FrozenLLM
from fednano.wire.channels import make_channel
from fednano.wire.sessions import SessionSigner, make_keys

from tests.llm.caller import Caller
from tests.models.causal import build

Start = Callable[..., Awaitable[Caller]]


@pytest.fixture(scope="session")
def keys() -> tuple[bytes, bytes]:
    return make_keys()


@pytest.fixture(scope="session")
def engine() -> FrozenLLM:
    return FrozenLLM(build(), "mark", "small")


@asynccontextmanager
async def serving(
    keys: tuple[bytes, bytes], engine: FrozenLLM, **settings: Any
) -> AsyncIterator[Caller]:
    private, public = keys
    given = {"model": Path("unused"), "port": 0, "metrics_port": -1, **settings}
    server = LlmServer(LlmSettings(session_public_key=public.decode(), **given), engine)
    ports = await server.start()
    target = f"127.0.0.1:{ports.grpc}"
    with make_channel(target) as channel:
        async with grpc.aio.insecure_channel(target) as live:
            signer = SessionSigner(private)
            yield Caller(
                server, ports.grpc, ports.metrics, channel, live, signer, engine.fingerprint
            )
    await server.stop(drain=1)


@pytest.fixture
async def start(keys: tuple[bytes, bytes], engine: FrozenLLM) -> AsyncIterator[Start]:
    """Starts a server with settings of one's own; `on` is another engine."""
    async with AsyncExitStack() as stack:

        async def begin(on: FrozenLLM = engine, **settings: Any) -> Caller:
            return await stack.enter_async_context(serving(keys, on, **settings))

        yield begin


@pytest.fixture
async def llm(start: Start) -> Caller:
    return await start()
