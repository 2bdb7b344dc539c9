"""The coordinator's Prometheus metrics, in a registry of its own per instance."""

from __future__ import annotations

import platform

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

import fednano
from fednano.coordinator.records import RunState
from fednano.coordinator.store import Store
from fednano.coordinator.store_members import Spent

_SECONDS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 14400)
KINDS = ("embeddings", "gradients", "logits", "adapters", "control", "other")


class Metrics:
    """Counters live in the process; gauges of what Redis holds are refreshed when asked for."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.round_seconds = Histogram(
            "fednano_round_seconds",
            "From opening a round to its end",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.updates = Counter(
            "fednano_updates",
            "Updates by result: accepted, duplicate, late, refused",
            ["result"],
            registry=self.registry,
        )
        self.bytes = Counter(
            "fednano_bytes",
            "Bytes that clients report, by kind, sent or received by them",
            ["kind", "direction"],
            registry=self.registry,
        )
        self.runs = self._gauge("fednano_runs", "Runs by state", "state")
        self.leader = self._gauge("fednano_leader", "1 while this coordinator advances the rounds")
        self.clients_alive = self._gauge("fednano_clients_alive", "Clients of runs not ended")
        self.memory = self._gauge("fednano_redis_memory_bytes", "What Redis uses")
        self.memory_limit = self._gauge("fednano_redis_memory_limit_bytes", "maxmemory; 0: none")
        info = self._gauge("fednano_build_info", "1", "version", "python")
        info.labels(fednano.__version__, platform.python_version()).set(1)
        for state in RunState:
            self.runs.labels(state.value).set(0)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def spent(self, spent: Spent) -> None:
        """Counts a client's bytes."""
        for direction, amounts in (("sent", spent.sent_bytes), ("received", spent.received_bytes)):
            for kind, amount in amounts.items():
                self.bytes.labels(kind, direction).inc(amount)

    async def refresh(self, store: Store) -> None:
        """Reads what Redis holds; before a scrape. Raises Unavailable."""
        use = await store.memory()
        self.memory.set(use.used_bytes)
        self.memory_limit.set(use.max_bytes)
        for state, count in (await store.run_store.count_states()).items():
            self.runs.labels(state.value).set(count)
        alive = 0
        for run in await store.run_store.active():
            alive += len((await store.members.presence(run.name)).alive)
        self.clients_alive.set(alive)
