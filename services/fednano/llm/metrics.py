"""What Prometheus sees of the LLM service. No label takes values from a request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
)

from fednano.llm.bases import BaseStore
from fednano.llm.batches import Batch, Joined, Single
from fednano.llm.jobs import Kind as Priority
from fednano.wire import llm_pb2
from fednano.wire.errors import FedNanoError

Kind = Literal["embeddings", "gradients", "logits", "adapters", "bases", "control"]
_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_RPCS = tuple(llm_pb2.DESCRIPTOR.services_by_name["LanguageModel"].methods_by_name)
_WATCHED = ("OK", "INTERNAL", "RESOURCE_EXHAUSTED")


class Metrics:
    """One service's own registry, so that several may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.in_progress = 0  # calls
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "fednano_llm_requests",
            "Calls that carried a valid token, by outcome",
            ["rpc", "status"],
            registry=self.registry,
        )
        self._step_seconds = Histogram(
            "fednano_llm_step_seconds",
            "Time on the device, per call",
            ["rpc"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._queue_seconds = Histogram(
            "fednano_llm_queue_seconds",
            "Time in the queue before the first turn on the device",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._batch_requests = Histogram(
            "fednano_llm_batch_requests",
            "Requests that shared a batch, by kind of work: train, score, write",
            ["kind"],
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=self.registry,
        )
        self._batch_padding = Histogram(
            "fednano_llm_batch_padding",
            "Share of a batch that is padding; of train and score",
            buckets=(0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75),
            registry=self.registry,
        )
        self._tokens = Counter(
            "fednano_llm_tokens",
            "Tokens computed: received ones, and for Generate also written ones",
            ["rpc"],
            registry=self.registry,
        )
        self._bytes = Counter(
            "fednano_bytes",
            "Bytes of messages, by what they hold",
            ["kind", "direction"],
            registry=self.registry,
        )
        self._base_lookups = Counter(
            "fednano_llm_base_lookups",
            "Bases that requests named: held (hit), or asked for again (miss)",
            ["result"],
            registry=self.registry,
        )
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """A series that is born with its first event shows Prometheus no increase."""
        for rpc in _RPCS:
            for status in _WATCHED:
                self._requests.labels(rpc, status)
        for work in get_args(Priority):
            self._batch_requests.labels(work)
        for kind in get_args(Kind):
            for direction in ("sent", "received"):
                self._bytes.labels(kind, direction)
        for result in ("hit", "miss"):
            self._base_lookups.labels(result)

    def describe(self, version: str, device: str, dtype: str, parameters: int) -> None:
        """Constants of this process."""
        build = Info("fednano_build", "What is running", registry=self.registry)
        build.info({"service": "llm", "version": version, "device": device, "dtype": dtype})
        count = Gauge(
            "fednano_llm_model_parameters", "Parameters of the LLM", registry=self.registry
        )
        count.set(parameters)

    def watch(self, depth: Callable[[], float], activations: Callable[[], float]) -> None:
        """Values that are read when they are asked for."""
        waiting = Gauge(
            "fednano_llm_queue_depth", "Calls that wait for the device", registry=self.registry
        )
        waiting.set_function(depth)
        running = Gauge(
            "fednano_llm_calls", "Calls in progress, waiting ones too", registry=self.registry
        )
        running.set_function(lambda: self.in_progress)
        kept = Gauge(
            "fednano_llm_activations",
            "Forward passes kept for their Backward",
            registry=self.registry,
        )
        kept.set_function(activations)

    def hold(self, store: BaseStore) -> None:
        """What there is of uploaded bases, read when it is asked for."""
        entries = Gauge("fednano_llm_bases", "Bases that are held", registry=self.registry)
        entries.set_function(lambda: len(store))
        held = Gauge(
            "fednano_llm_base_bytes", "Bytes of the bases held", ["kind"], registry=self.registry
        )
        held.labels("memory").set_function(lambda: store.memory_bytes)
        held.labels("disk").set_function(lambda: store.disk_bytes)

    def looked_up(self, hits: int, misses: int) -> None:
        self._base_lookups.labels("hit").inc(hits)
        self._base_lookups.labels("miss").inc(misses)

    def allow(self, waiting: int) -> None:
        """How many calls may wait before more are refused."""
        limit = Gauge(
            "fednano_llm_queue_limit", "Calls that may wait for the device", registry=self.registry
        )
        limit.set(waiting)

    @contextmanager
    def request(self, rpc: str) -> Iterator[None]:
        """Counts a call with the status that it ends with."""
        status = "INTERNAL"
        self.in_progress += 1
        try:
            yield
            status = "OK"
        except FedNanoError as error:
            status = error.status.name
            raise
        except (asyncio.CancelledError, GeneratorExit):
            status = "CANCELLED"
            raise
        finally:
            self.in_progress -= 1
            self._requests.labels(rpc, status).inc()

    def computed(self, rpc: str, queue_seconds: float, compute_seconds: float) -> None:
        self._queue_seconds.observe(queue_seconds)
        self._step_seconds.labels(rpc).observe(compute_seconds)

    def batch(self, batch: Batch) -> None:
        """One that was run."""
        if not isinstance(batch, Single):
            self._batch_requests.labels(batch.kind).observe(len(batch.jobs))
        if isinstance(batch, Joined):
            self._batch_padding.observe(batch.padding)

    def tokens(self, rpc: str, count: int) -> None:
        self._tokens.labels(rpc).inc(count)

    def received(self, kind: Kind, size: int) -> None:
        self._bytes.labels(kind, "received").inc(size)

    def sent(self, kind: Kind, size: int) -> None:
        self._bytes.labels(kind, "sent").inc(size)
