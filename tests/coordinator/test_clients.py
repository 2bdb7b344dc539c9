"""Real clients on the tiny model: strategies in which they take a part, by real services."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fednano.client.daemon import Client
from fednano.client.edge import EdgeHalf
from fednano.client.remote import RemoteLanguageModel
from fednano.client.settings import ClientSettings
from fednano.coordinator.records import Tensors
from fednano.coordinator.server import CoordinatorServer
from fednano.models.frozen import FrozenLLM
from fednano.wire.coordinator_pb2 import SubmitHead
from fednano.wire.run_config import RunConfig
from pydantic import SecretStr

from tests.client.serving import PRIVATE, served
from tests.coordinator.conftest import ADMIN, settings_of
from tests.coordinator.federation import same_bytes
from tests.redis_server import RedisServer

NAMES = ("site-1", "site-2")
LOADING = threading.Lock()  # while a model is loaded, torch's default dtype is another


class Crashed(Exception):
    """What a killed process is here."""


@dataclass
class Platform:
    """A coordinator, an LLM service, and clients in threads of their own."""

    server: CoordinatorServer
    coordinator: str
    llm: str
    edge: Path
    folder: Path

    def client(self, name: str) -> Client:
        settings = ClientSettings(
            coordinator=self.coordinator,
            llm=self.llm,
            token=SecretStr(ADMIN),
            edge=self.edge,
            id=name,
            once=True,
            cache_dir=self.folder / name,
        )
        client = Client.connect(settings)
        load = client._edge_half

        def alone(llm: RemoteLanguageModel) -> EdgeHalf:
            with LOADING:
                return load(llm)

        client._edge_half = alone
        return client

    async def finish(self, run: str, doomed: str = "", **changes: object) -> Tensors:
        """The last adapter of a run of three rounds; one client crashes in the second round, when it
        has trained, and is started again."""
        await self.server.store.create_run(config_of(run, **changes), "test")
        threads = [threading.Thread(target=self._live, args=(n, n == doomed)) for n in NAMES]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join, 60)
        assert (await self.server.store.run(run)).state == "finished"
        return (await self.server.store.adapter_of_round(run, 3)).tensors

    def _live(self, name: str, doomed: bool) -> None:
        client = self.client(name)
        if doomed:
            client.coordinator.submit = crash_in_round_2(client.coordinator.submit)
            with pytest.raises(Crashed):
                client.run()
            client.close()
            client = self.client(name)
        client.run()
        client.close()


def config_of(run: str, **changes: object) -> RunConfig:
    values: dict[str, object] = {
        "name": run,
        "clients": 2,
        "rounds": 3,
        "deterministic": True,
        "adapter": {"rank": 4},
        "data": {"limit": 10},
        "evaluation": {"own_data": "never"},
    }
    return RunConfig.model_validate({**values, **changes})


def crash_in_round_2(submit: Callable[..., Any]) -> Callable[..., Any]:
    def doomed(head: SubmitHead, *tensors: Tensors) -> Any:
        if head.header.round == 2:
            raise Crashed
        return submit(head, *tensors)

    return doomed


@pytest.fixture
async def platform(
    redis_server: RedisServer, frozen: FrozenLLM, halves: Path, tmp_path: Path
) -> AsyncIterator[Platform]:
    settings = settings_of(redis_server.url, session_key=PRIVATE.decode())
    server = CoordinatorServer(settings)
    ports = await server.start()
    with served(frozen) as llm:
        places = (f"127.0.0.1:{port}" for port in (ports.grpc, llm.port))
        yield Platform(server, *places, halves / "edge", tmp_path)
    await server.stop()


async def test_scaffolds_controls_outlive_a_client(platform: Platform) -> None:
    calm = await platform.finish("calm", strategy={"name": "scaffold"})
    rough = await platform.finish("rough", doomed="site-2", strategy={"name": "scaffold"})
    plain = await platform.finish("plain", strategy={"name": "fedavg"})
    assert same_bytes(calm, rough)
    assert not same_bytes(calm, plain)
    assert not list(platform.folder.glob("*/controls.*"))  # forgotten with their runs


async def test_floras_adapter_grows_by_what_clients_of_their_own_ranks_add(
    platform: Platform,
) -> None:
    adapter = {"rank": 4, "ranks": [2, 4]}
    tensors = await platform.finish("growing", strategy={"name": "flora"}, adapter=adapter)
    assert tensors["image.down"].shape == (3 * (2 + 4), 128)
    assert tensors["text.up"].shape == (128, 3 * (2 + 4))
    assert tensors["image.up"].any(axis=0).all()


async def test_clients_of_their_own_ranks_share_one_adapter(platform: Platform) -> None:
    adapter = {"rank": 4, "ranks": [2, 4]}
    tensors = await platform.finish("unequal", strategy={"name": "product"}, adapter=adapter)
    assert tensors["image.down"].shape == (4, 128)
    rounds, _ = await platform.server.store.rounds("unequal")
    assert [round_.clients.submitted for round_ in rounds[1:]] == [NAMES] * 3
