"""A coordinator in the test's own loop, on free ports, with an empty Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from fednano.coordinator.server import CoordinatorServer, Ports
from fednano.coordinator.settings import CoordinatorSettings
from fednano.coordinator.store import Store
from fednano.wire.sessions import make_keys

from tests.redis_server import RedisServer

ADMIN = "the-admins-secret"
PRIVATE_KEY, PUBLIC_KEY = make_keys()


def settings_of(url: str, **changes: Any) -> CoordinatorSettings:
    values: dict[str, Any] = {
        "redis_url": url,
        "grpc_port": 0,
        "http_port": 0,
        "admin_token": ADMIN,
        "session_key": PRIVATE_KEY.decode(),
        "lease_seconds": 1.0,
        "client_seconds": 2.0,
        "drain_seconds": 0.5,
    }
    return CoordinatorSettings(**{**values, **changes})


@pytest.fixture
async def store(redis_server: RedisServer) -> AsyncIterator[Store]:
    """A store without a coordinator around it; nobody leads."""
    store = Store.connect(redis_server.url, client_seconds=2.0, admin_token=ADMIN)
    await store.prepare()
    yield store
    await store.close()


class Running:
    """A coordinator that serves."""

    def __init__(self, server: CoordinatorServer, ports: Ports) -> None:
        self.server = server
        self.store = server.store
        self.port = ports.grpc
        self.http_port = ports.http


@pytest.fixture
async def coordinator(redis_server: RedisServer) -> AsyncIterator[Running]:
    server = CoordinatorServer(settings_of(redis_server.url))
    ports = await server.start()
    yield Running(server, ports)
    await server.stop()
