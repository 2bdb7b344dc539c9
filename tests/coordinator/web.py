"""The application on the real store, behind a real HTTP server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from fednano.coordinator.metrics import Metrics
from fednano.coordinator.rest import make_app
from fednano.coordinator.settings import CoordinatorSettings
from fednano.coordinator.store import Store
from fednano.wire.run_config import RunConfig, StrategyConfig

from tests.coordinator.played import Clock, Federation
from tests.redis_server import RedisServer

ADMIN = "the-first-admin"


class Server(uvicorn.Server):
    """Ends the event streams before it waits for its connections, as the coordinator does."""

    def __init__(self, app: FastAPI, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: object = None) -> None:
        self._app.state.streams.close()
        await super().shutdown()


@asynccontextmanager
async def serving(app: FastAPI, port: int = 0) -> AsyncIterator[str]:
    """The address of a server of `app`, meanwhile."""
    config = uvicorn.Config(app, port=port, log_level="error", lifespan="off")
    server = Server(app, config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        assert not task.done()
        await asyncio.sleep(0.01)
    try:
        bound = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{bound}"
    finally:
        server.should_exit = True
        await asyncio.wait_for(task, 10)


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def config(name: str = "trial", **fields: object) -> RunConfig:
    """A small run that merges without Fisher."""
    body = {"clients": 2, "rounds": 3, "strategy": StrategyConfig(name="fedavg"), **fields}
    return RunConfig.model_validate({"name": name, **body})


@dataclass
class Site:
    """What a test needs: the address, the store behind it, a client that is admin."""

    url: str
    app: FastAPI
    store: Store
    clock: Clock
    http: httpx.AsyncClient

    async def federation(self, name: str = "trial", **fields: object) -> Federation:
        """A run that is through enrolment, with its clients."""
        made = Federation(self.store, self.clock, config(name, **fields))
        await made.enrol()
        return made

    async def token(self, role: str) -> str:
        _, secret = await self.store.create_token(f"a-{role}", role)
        return secret


@pytest.fixture
async def site(redis_server: RedisServer) -> AsyncIterator[Site]:
    """Import this module and write `site = web.site` to use it."""
    clock = Clock()
    store = Store.connect(redis_server.url, clock, admin_token=ADMIN)
    await store.prepare()
    app = make_app(store=store, settings=CoordinatorSettings(), metrics=Metrics())
    async with (
        store.listening(),
        serving(app) as url,
        httpx.AsyncClient(base_url=f"{url}/api/v1", headers=bearer(ADMIN), trust_env=False) as http,
    ):
        yield Site(url, app, store, clock, http)
    await store.close()
