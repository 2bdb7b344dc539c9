"""A real LLM service in a thread with an event loop of its own, for blocking callers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fednano.client.remote import Caller, RemoteLanguageModel
from fednano.client.replicas import Replicas
from fednano.llm.server import LlmServer
from fednano.llm.settings import LlmSettings
from fednano.models.frozen import FrozenLLM
from fednano.wire.headers import make_header
from fednano.wire.sessions import Identity, SessionSigner, make_keys

PRIVATE, PUBLIC = make_keys()


class Served:
    """One LLM service on a free port; it can be ended and started again on the same one."""

    def __init__(self, engine: FrozenLLM, port: int = 0, **settings: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        given = LlmSettings(
            model=Path("unused"),
            port=port,
            metrics_port=-1,
            session_public_key=PUBLIC.decode(),
            **settings,
        )
        self.server: LlmServer = self._do(self._make(given, engine))
        self.port = self._do(self.server.start()).grpc

    @staticmethod
    async def _make(settings: LlmSettings, engine: FrozenLLM) -> LlmServer:
        return LlmServer(settings, engine, settings.host)

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def stop(self) -> None:
        if self._thread.is_alive():
            self._do(self.server.stop(drain=0))
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()


@contextmanager
def served(engine: FrozenLLM) -> Iterator[Served]:
    service = Served(engine)
    yield service
    service.stop()


def caller(client: str = "c1") -> Caller:
    token, _ = SessionSigner(PRIVATE).issue(Identity(client, "site"))
    return Caller(lambda: make_header(client), lambda: token)


@contextmanager
def remote(port: int, **settings: Any) -> Iterator[RemoteLanguageModel]:
    replicas = Replicas(f"127.0.0.1:{port}")
    yield RemoteLanguageModel(replicas, caller(), **settings)
    replicas.close()
