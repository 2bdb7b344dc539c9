"""What monitoring is made of, as files and as running services."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from fednano.coordinator.server import CoordinatorServer
from fednano.models.frozen import FrozenLLM
from fednano.wire.sessions import make_keys
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.coordinator.conftest import settings_of
from tests.llm.caller import Caller
from tests.llm.conftest import serving
from tests.models.causal import build

ROOT = Path(__file__).parents[2]
OBSERVE = ROOT / "docker" / "observe"
RULES = OBSERVE / "alerts.yml"
RATE_INTERVAL = "1m"  # what Grafana would put for its variable
_SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
_WORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}
_NOT_NAMES = re.compile(
    r"""\{[^}]*\}                                  # matchers
      | \[[^\]]*\]                                 # ranges
      | \b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)
      | \boffset\s+\w+""",
    re.VERBOSE,
)


def metric_names(expression: str) -> set[str]:
    """The metrics that a PromQL expression reads. No string in ours holds a bracket."""
    bare = _NOT_NAMES.sub(" ", expression)
    found = re.findall(r"(?<![\w:.])[a-zA-Z_:][\w:]*(?!\s*\(|[\w:])", bare)
    return {name for name in found if name.lower() not in _WORDS}


def selectors(expression: str) -> set[str]:
    """Every `name{matchers}` of an expression."""
    return set(re.findall(r"[a-zA-Z_:][\w:]*\{[^}]*\}", expression))


def panels() -> dict[str, list[str]]:
    """The dashboard's expressions by the panel's title, as Grafana would send them."""
    board = json.loads((OBSERVE / "grafana/dashboards/fednano.json").read_text())
    return {
        panel["title"]: [
            target["expr"].replace("$__rate_interval", RATE_INTERVAL) for target in panel["targets"]
        ]
        for panel in board["panels"]
        if panel["type"] != "row"
    }


def alerts() -> dict[str, dict[str, Any]]:
    """The rules by the alert's name."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def sample_names(families: Iterable[Metric]) -> set[str]:
    """What can be asked for: a counter only with `_total`, a histogram only by its parts."""
    return {
        family.name + suffix for family in families for suffix in _SUFFIXES.get(family.type, ("",))
    }


@dataclass
class Services:
    """A coordinator and an LLM service that run, and the token that Prometheus has."""

    coordinator: CoordinatorServer
    grpc_port: int
    http_port: int
    llm: Caller
    engine: FrozenLLM
    viewer: str

    async def scrape(self) -> dict[str, list[Metric]]:
        """What Prometheus would read, by job."""
        targets = {"llm": self.llm.metrics_port, "coordinator": self.http_port}
        found = {}
        async with httpx.AsyncClient(trust_env=False) as http:
            for job, port in targets.items():
                headers = {"Authorization": f"Bearer {self.viewer}"} if job != "llm" else {}
                reply = await http.get(f"http://127.0.0.1:{port}/metrics", headers=headers)
                found[job] = list(text_string_to_metric_families(reply.raise_for_status().text))
        return found


@asynccontextmanager
async def running(redis_url: str) -> AsyncIterator[Services]:
    """Both services, each listening on free ports."""
    engine = await asyncio.to_thread(lambda: FrozenLLM(build(), "mark", "small"))
    server = CoordinatorServer(settings_of(redis_url))
    ports = await server.start()
    try:
        _, viewer = await server.store.create_token("prometheus", "viewer")
        async with serving(make_keys(), engine, metrics_port=0) as llm:
            yield Services(server, ports.grpc, ports.http, llm, engine, viewer)
    finally:
        await server.stop()
