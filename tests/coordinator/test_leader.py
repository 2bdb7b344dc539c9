"""The leader survives whatever Redis and a run's record do to it, and says so when it can't."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from fednano.coordinator import keys
from fednano.coordinator.leader import Leader
from fednano.coordinator.metrics import Metrics
from fednano.coordinator.records import RunState
from fednano.coordinator.store import Store

from tests.coordinator.conftest import Running
from tests.coordinator.federation import config_of
from tests.redis_server import RedisServer


@asynccontextmanager
async def leading(store: Store) -> AsyncIterator[asyncio.Task[None]]:
    """The task of a leader on `store`, meanwhile."""
    task = asyncio.create_task(Leader(store, Metrics(), 0.4).serve())
    yield task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def enrols(store: Store, name: str) -> None:
    """Until the leader has opened the run's enrolment."""
    for _ in range(200):
        if (await store.run(name)).state is RunState.ENROLLING:
            return
        await asyncio.sleep(0.05)
    pytest.fail("nobody leads")


async def test_a_leader_outlives_a_redis_without_memory(
    store: Store, redis_server: RedisServer
) -> None:
    await store.create_run(config_of(), "test")
    with redis_server.client() as client:
        client.config_set("maxmemory", 1)
        async with leading(store) as task:
            await asyncio.sleep(0.5)
            assert not task.done()
            client.config_set("maxmemory", 0)
            await enrols(store, "trial")


async def test_a_leader_outlives_a_run_whose_record_is_damaged(
    store: Store, redis_server: RedisServer
) -> None:
    await store.create_run(config_of(), "test")
    async with leading(store) as task:
        await enrols(store, "trial")
        with redis_server.client() as client:
            client.hset(keys.run("trial"), "config", "{")
            client.hincrby(keys.run("trial"), "version", 1)  # as whatever damaged it would
        await asyncio.sleep(3.5)  # three attempts, and giving the run up
        assert not task.done()
        await store.create_run(config_of("other"), "test")
        await enrols(store, "other")


async def test_a_coordinator_that_can_t_lead_is_not_ready(coordinator: Running) -> None:
    url = f"http://127.0.0.1:{coordinator.http_port}/readyz"
    async with httpx.AsyncClient(trust_env=False) as http:
        assert (await http.get(url)).status_code == 200
        task = coordinator.server._leading
        assert task is not None
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        reply = await http.get(url)
    assert (reply.status_code, "ceased to lead" in reply.json()["detail"]) == (503, True)
