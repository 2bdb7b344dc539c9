"""The coordinator's Prometheus metrics, in a registry of its own per instance."""

from __future__ import annotations

import platform

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

import fednano
from fednano.coordinator.database import TROUBLES, Database
from fednano.coordinator.fields import StoredRun
from fednano.coordinator.records import RoundState, RunState
from fednano.coordinator.store import Store
from fednano.coordinator.store_members import Spent

_SECONDS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 14400)
RESULTS = ("accepted", "duplicate", "late", "refused")
KINDS = (
    *("embeddings", "gradients", "logits", "adapters", "bases", "control"),  # messages, counted
    "framing",  # what HTTP/2 and gRPC put around them, estimated by the client
    "other",  # a kind that this version doesn't know
)


class Metrics:
    """Counters live in the process; gauges of what Redis holds are refreshed when asked for."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
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
        self.compute_seconds = Counter(
            "fednano_compute_seconds",
            "Seconds that clients report: of their own CPUs, and of the LLM service for them",
            ["where"],
            registry=self.registry,
        )
        self.redis_errors = Counter(
            "fednano_redis_errors",
            "Commands that Redis did not carry out: unreachable, read_only, disk, memory",
            ["reason"],
            registry=self.registry,
        )
        self.runs = self._gauge("fednano_runs", "Runs by state", "state")
        self.leader = self._gauge("fednano_leader", "1 while this coordinator advances the rounds")
        self.clients_alive = self._gauge("fednano_clients_alive", "Clients of runs not ended")
        self.round_age = self._gauge(
            "fednano_round_age_seconds",
            "How long the slowest running run is at its present round, failed attempts included",
        )
        self.memory = self._gauge("fednano_redis_memory_bytes", "What Redis uses")
        self.memory_limit = self._gauge("fednano_redis_memory_limit_bytes", "maxmemory; 0: none")
        info = self._gauge("fednano_build_info", "1", "version", "python")
        info.labels(fednano.__version__, platform.python_version()).set(1)
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """A series that is born with its first event shows Prometheus no increase."""
        for state in RunState:
            self.runs.labels(state.value).set(0)
        for result in RESULTS:
            self.updates.labels(result)
        for reason in TROUBLES:
            self.redis_errors.labels(reason)
        for where in ("client", "llm"):
            self.compute_seconds.labels(where)
        for kind in KINDS:
            for direction in ("sent", "received"):
                self.bytes.labels(kind, direction)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def spent(self, spent: Spent) -> None:
        """Counts what a client reports."""
        self.compute_seconds.labels("client").inc(spent.client_seconds)
        self.compute_seconds.labels("llm").inc(spent.server_seconds)
        for direction, amounts in (("sent", spent.sent_bytes), ("received", spent.received_bytes)):
            for kind, amount in amounts.items():
                self.bytes.labels(kind, direction).inc(amount)

    async def refresh(self, store: Store) -> None:
        """Reads what Redis holds; before a scrape. Raises Unavailable."""
        self._count_errors(store.database)
        use = await store.memory()
        self.memory.set(use.used_bytes)
        self.memory_limit.set(use.max_bytes)
        for state, count in (await store.run_store.count_states()).items():
            self.runs.labels(state.value).set(count)
        alive, ages = 0, [0.0]
        for run in await store.run_store.active():
            alive += len((await store.members.presence(run.name)).alive)
            ages.append(await _age(store, run))
        self.clients_alive.set(alive)
        self.round_age.set(max(ages))

    def _count_errors(self, database: Database) -> None:
        """The database counts by itself, as it is there before us."""
        for reason, count in database.errors.items():
            self.redis_errors.labels(reason).inc(count)
        database.errors.clear()


async def _age(store: Store, run: StoredRun) -> float:
    """Seconds that a running run is at its present round, since the first attempt; else 0."""
    if run.state is not RunState.RUNNING:
        return 0.0
    now = store.database.clock()
    round_ = await store.round_store.get(run.name, run.round)
    if round_ is None:
        return now - (run.started_at or now)
    since = round_.opened_at
    if round_.state is RoundState.DONE or round_.attempt > 1:
        last = await store.round_store.get(run.name, run.last_round or 0)
        since = (last.finished_at if last else None) or since
    return now - since
