"""A real Prometheus with our rules reads running services, and answers what the dashboard asks."""

from __future__ import annotations

import asyncio
import math
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import yaml
from fednano.lab.redis_server import free_port
from fednano.models.language_model import Sampling

from tests.coordinator.conftest import ADMIN
from tests.coordinator.federation import Crowd, FakeClient, config_of, evaluator
from tests.deploy.observed import OBSERVE, RULES, Services, alerts, panels, running, selectors
from tests.llm.caller import generate_request, score_request
from tests.models.causal import packed, several_labels
from tests.redis_server import RedisServer

BINARY = shutil.which("prometheus")
pytestmark = [
    pytest.mark.skipif(
        BINARY is None, reason="no prometheus on PATH (Debian: apt-get install prometheus)"
    ),
    pytest.mark.asyncio(loop_scope="module"),
]
SECONDS = 60.0  # that anything may take
EMPTY_WHILE_ALL_IS_WELL = {"Firing alerts"}


@dataclass
class Prometheus:
    """Its HTTP API."""

    http: httpx.AsyncClient

    async def get(self, path: str, **params: str) -> Any:
        reply = await self.http.get(f"/api/v1/{path}", params=params)
        assert reply.status_code == 200, reply.text
        return reply.json()["data"]

    async def query(self, expression: str) -> list[Any]:
        return (await self.get("query", query=expression))["result"]

    async def until(self, ready: Callable[[], Awaitable[bool]], what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not await ready():
            assert time.monotonic() < deadline, f"{what} took longer than {SECONDS:.0f} s"
            await asyncio.sleep(0.2)

    async def scraped(self, times: int) -> None:
        """Until both services have been read so many times from now on."""
        since = time.time()

        async def done() -> bool:
            counts = await self.query(f"count_over_time(up[{math.ceil(time.time() - since)}s])")
            return len(counts) == 2 and all(int(one["value"][1]) >= times for one in counts)

        await self.until(done, "scraping")


def configured(folder: Path, services: Services) -> Path:
    """Our configuration, but for where the services are and how often they are read."""
    config = yaml.safe_load((OBSERVE / "prometheus.yml").read_text())
    config["global"] = dict.fromkeys(("scrape_interval", "evaluation_interval"), "1s")
    config["rule_files"] = [str(RULES)]
    token = folder / "viewer.token"
    token.write_text(services.viewer + "\n")
    ports = {"llm": services.llm.metrics_port, "coordinator": services.http_port}
    for job in config["scrape_configs"]:
        del job["dns_sd_configs"]
        job["static_configs"] = [{"targets": [f"127.0.0.1:{ports[job['job_name']]}"]}]
        if "authorization" in job:
            job["authorization"]["credentials_file"] = str(token)
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


@asynccontextmanager
async def prometheus(folder: Path, services: Services) -> AsyncIterator[Prometheus]:
    """Meanwhile it runs, on a free port."""
    address = f"127.0.0.1:{free_port()}"
    command = [
        str(BINARY),
        f"--config.file={configured(folder, services)}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (folder / "prometheus.log").open("wb") as output:
        process = await asyncio.create_subprocess_exec(*command, stdout=output, stderr=output)
    try:
        async with httpx.AsyncClient(base_url=f"http://{address}", trust_env=False) as http:
            made = Prometheus(http)

            async def ready() -> bool:
                assert process.returncode is None, (folder / "prometheus.log").read_text()
                try:
                    return (await http.get("/-/ready")).status_code == 200
                except httpx.TransportError:
                    return False

            await made.until(ready, "the start of Prometheus")
            yield made
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 20)


async def federate(services: Services) -> None:
    """A whole run by light clients over gRPC."""
    await services.coordinator.store.create_run(config_of(), "admin")
    names = ["site-0", "site-1", "site-2"]
    clients = [FakeClient(services.grpc_port, ADMIN, name) for name in names]
    with Crowd([*clients, evaluator(services.grpc_port, ADMIN)]) as crowd:
        states = await asyncio.to_thread(crowd.wait)
    assert set(states.values()) == {"finished"}


async def compute(services: Services) -> None:
    """A step, a score and an answer."""
    llm, sequences, labels = services.llm, packed(services.engine), several_labels()
    await llm.step(sequences, labels, labels[:3].float())
    await llm.stream("Score", score_request(llm.header(), sequences, labels))
    answer = generate_request(llm.header(), sequences, Sampling(3, stop_ids=(1,)))
    await llm.stream("Generate", answer)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def watched(
    shared_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Prometheus]:
    """It has seen two services at work."""
    shared_redis.flush()
    with shared_redis.client() as client:
        client.config_set("maxmemory", "512mb")
    folder = tmp_path_factory.mktemp("prometheus")
    async with running(shared_redis.url) as services, prometheus(folder, services) as prom:
        await compute(services)
        await prom.scraped(2)
        await federate(services)
        await compute(services)
        await prom.scraped(3)
        yield prom


async def test_every_panel_shows_figures(watched: Prometheus) -> None:
    for title, expressions in panels().items():
        for expression in expressions:
            values = [float(one["value"][1]) for one in await watched.query(expression)]
            if title not in EMPTY_WHILE_ALL_IS_WELL:
                assert any(math.isfinite(value) for value in values), f"{title}: {expression}"


async def shown(prom: Prometheus, title: str, label: str) -> dict[str, float]:
    """A panel's figures by one of their labels."""
    (expression,) = panels()[title]
    found = await prom.query(expression)
    return {one["metric"].get(label, ""): float(one["value"][1]) for one in found}


async def test_what_happened_is_what_is_shown(watched: Prometheus) -> None:
    assert await shown(watched, "Services that answer", "job") == {"llm": 1, "coordinator": 1}
    assert await shown(watched, "Leaders", "") == {"": 1}
    runs = await shown(watched, "Runs by state", "state")
    assert {state: count for state, count in runs.items() if count} == {"finished": 1}
    updates = await shown(watched, "Updates by result", "result")
    assert {result for result, rate in updates.items() if rate} == {"accepted"}
    for title, label in (
        ("Step, median", "rpc"),
        ("Tokens per second", "rpc"),
        ("LLM service: received", "kind"),
        ("Calls per second by status", "status"),
    ):
        found = await shown(watched, title, label)
        assert any(value > 0 for value in found.values()), (title, found)


async def test_every_rule_is_evaluated_and_picks_something(watched: Prometheus) -> None:
    rules: dict[str, Any] = {}

    async def evaluated() -> bool:
        groups = (await watched.get("rules"))["groups"]
        rules.update({rule["name"]: rule for group in groups for rule in group["rules"]})
        return all(rule["health"] != "unknown" for rule in rules.values())

    await watched.until(evaluated, "evaluating the rules")
    assert rules.keys() == alerts().keys()
    for name, rule in rules.items():
        assert (rule["health"], rule.get("lastError", "")) == ("ok", ""), name
        assert rule["state"] == "inactive", name
        for selector in selectors(alerts()[name]["expr"]):
            assert await watched.query(selector), f"{name}: nothing is exported as {selector}"


async def test_a_service_that_is_gone_is_noticed(redis_server: RedisServer, tmp_path: Path) -> None:
    async with running(redis_server.url) as services, prometheus(tmp_path, services) as prom:
        await prom.scraped(1)
        await services.llm.server.stop(drain=0.1)

        async def noticed() -> bool:
            noted = {one["labels"]["alertname"] for one in (await prom.get("alerts"))["alerts"]}
            return {"FedNanoLlmDown", "FedNanoLlmReplicaDown"} == noted

        await prom.until(noticed, "noticing")
