"""The life of the LLM service's process: load, listen, serve, drain."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server
from transformers.utils.logging import disable_progress_bar

from fednano import __version__, logs
from fednano.llm.base_files import BaseFiles
from fednano.llm.bases import BaseStore
from fednano.llm.batcher import Batcher
from fednano.llm.beside import Beside, page_locked
from fednano.llm.exchange import Exchange
from fednano.llm.metrics import Metrics
from fednano.llm.ranks import LeadingLLM, follow, kept_together
from fednano.llm.requests import Limits
from fednano.llm.servicer import LanguageModelServicer
from fednano.llm.settings import LlmSettings
from fednano.llm.uploads import Uploads
from fednano.llm.worker import Worker
from fednano.models.activations import Activations
from fednano.models.compute import Compute
from fednano.models.frozen import FrozenLLM
from fednano.models.parallel import Spread, rank
from fednano.wire import llm_pb2, llm_pb2_grpc
from fednano.wire.channels import check_exposure, listen, make_server
from fednano.wire.errors import FedNanoError
from fednano.wire.sessions import Identity

log = logging.getLogger(__name__)

Engine = TypeVar("Engine", bound=FrozenLLM)
SERVICE = llm_pb2.DESCRIPTOR.services_by_name["LanguageModel"].full_name


@dataclass(frozen=True)
class Ports:
    """Where the service listens; metrics is -1 where it doesn't."""

    grpc: int
    metrics: int


_LAST_WORDS = 0.2
"""Seconds in which the status of a call that has just ended reaches its caller."""


class LlmServer:
    """Serves a loaded model until it is stopped."""

    def __init__(self, settings: LlmSettings, engine: FrozenLLM, replica: str = "local") -> None:
        self._settings = settings
        self._engine = engine
        self._replica = replica
        self._metrics = Metrics()
        batcher = Batcher(batch_tokens(settings, engine), settings.generations)
        beside = Beside(engine.device)
        self._worker = Worker(settings.queue, batcher, self._metrics.batch, beside.wait)
        self._exchange = Exchange(
            engine.fingerprint, limits_of(settings, engine), self._worker, self._metrics, beside
        )
        self._bases = bases_of(settings, self._metrics, beside)
        self._verifier = settings.verifier()
        self._health = health.aio.HealthServicer()
        self._server = make_server(self._authenticate)
        self._metrics_server: tuple[Any, Thread] | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._uploads: Uploads | None = None

    @property
    def worker(self) -> Worker:
        return self._worker

    @property
    def metrics(self) -> Metrics:
        return self._metrics

    async def start(self) -> Ports:
        """Binds both listeners. Raises what check_listeners raises."""
        settings = self._settings
        check_listeners(settings)
        self._register()
        port = listen(self._server, settings.host, settings.port, settings.server_tls())
        metrics_port = self._listen_for_metrics()
        self._worker.start()
        self._sweeper = asyncio.create_task(self._sweep())
        await self._server.start()
        for service in ("", SERVICE):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        return Ports(port, metrics_port)

    async def wait(self) -> None:
        """Until somebody stops the service."""
        await self._server.wait_for_termination()

    async def stop(self, drain: float | None = None) -> None:
        """Takes no new calls, gives the running ones `drain` seconds, and closes."""
        seconds = self._settings.drain_seconds if drain is None else drain
        await self._health.enter_graceful_shutdown()
        await self._drain(seconds)
        await self._worker.close()
        self._exchange.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._bases is not None:
            await asyncio.to_thread(self._bases.close)
        if self._metrics_server is not None:
            await asyncio.to_thread(_close, *self._metrics_server)

    async def _drain(self, seconds: float) -> None:
        """Ends when the last call of ours has, however long others watch health or reflection."""
        stopping = asyncio.create_task(self._server.stop(seconds))
        while self._metrics.in_progress and not stopping.done():
            await asyncio.wait({stopping}, timeout=0.05)
        await asyncio.wait({stopping}, timeout=_LAST_WORDS)
        await self._server.stop(None)
        await stopping

    def _register(self) -> None:
        engine, metrics = self._engine, self._metrics
        servicer = LanguageModelServicer(
            engine,
            self._worker,
            self._exchange,
            metrics,
            self._replica,
            self._bases,
            joined_tokens(self._settings, engine),
        )
        self._uploads = servicer.uploads
        llm_pb2_grpc.add_LanguageModelServicer_to_server(servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )
        metrics.describe(__version__, engine.device.type, engine.precision, engine.parameters)
        metrics.watch(lambda: self._worker.depth, lambda: len(engine.activations))

    def _listen_for_metrics(self) -> int:
        """Prometheus reads over TLS where gRPC does."""
        settings = self._settings
        if settings.metrics_port < 0:
            return -1
        try:
            self._metrics_server = start_http_server(
                settings.metrics_port,
                settings.metrics_host,
                self._metrics.registry,
                certfile=str(settings.tls_certificate) if settings.tls_certificate else None,
                keyfile=str(settings.tls_key) if settings.tls_key else None,
            )
        except OSError as error:
            where = f"{settings.metrics_host}:{settings.metrics_port}"
            raise FedNanoError(f"can't listen on {where} for metrics: {error}") from error
        return int(self._metrics_server[0].server_port)

    async def _authenticate(self, token: str) -> Identity:
        return self._verifier.verify(token)

    async def _sweep(self) -> None:
        """Frees activations and bases that nobody came back for."""
        seconds = self._settings.base_seconds
        while True:
            await asyncio.sleep(min(self._settings.activation_seconds, seconds) / 2)
            self._engine.activations.expire()
            if self._bases is not None and self._uploads is not None:
                await asyncio.to_thread(self._bases.expire)
                self._uploads.expire(seconds)


def check_listeners(settings: LlmSettings) -> None:
    """Raises InvalidRequest where a listener would be open to a network in the clear."""
    tls = settings.server_tls()
    check_exposure("host", settings.host, tls, settings.insecure)
    if settings.metrics_port >= 0:
        check_exposure("metrics_host", settings.metrics_host, tls, settings.insecure)


def batch_tokens(settings: LlmSettings, engine: FrozenLLM) -> int:
    """Enough to keep the device busy; what lies beyond only makes others wait."""
    if settings.batch_tokens >= 0:
        return settings.batch_tokens
    return 1024 if engine.device.type == "cpu" else 8192


def joined_tokens(settings: LlmSettings, engine: FrozenLLM) -> int:
    """Of a client-side loss's passes. On a CPU computing forward again costs more than company spares;
    on a GPU a smaller request takes as long as one of some 1,000 tokens."""
    if not batch_tokens(settings, engine):
        return 0
    if settings.join_backward_tokens >= 0:
        return settings.join_backward_tokens
    return 0 if engine.device.type == "cpu" else 1024


def bases_of(settings: LlmSettings, metrics: Metrics, beside: Beside) -> BaseStore | None:
    """None where the factored wire is not offered. Raises InvalidRequest for a directory that can't
    be used."""
    if not settings.base_mebibytes:
        return None
    files = None
    if settings.base_directory is not None:
        files = BaseFiles(settings.base_directory, settings.base_disk_mebibytes << 20)
    memory = settings.base_mebibytes << 20
    store = BaseStore(
        memory,
        settings.base_seconds,
        files,
        looked_up=metrics.looked_up,
        placed=page_locked if beside.apart else lambda data: data,
    )
    metrics.hold(store)
    return store


def limits_of(settings: LlmSettings, engine: FrozenLLM) -> Limits:
    """The operator's limits, within the model's."""
    return Limits(
        hidden=engine.hidden_size,
        vocabulary=engine.vocabulary,
        table_rows=engine.table_rows,
        tokens_per_sample=min(
            settings.tokens_per_sample or engine.max_positions,
            engine.max_positions,
            settings.tokens_per_request,
        ),
        tokens_per_request=settings.tokens_per_request,
        samples_per_request=settings.samples_per_request,
        new_tokens=settings.new_tokens,
        message_bytes=settings.message_mebibytes << 20,
    )


def run(settings: LlmSettings) -> None:
    """Serves until SIGTERM or SIGINT. Raises FedNanoError where that can't begin, or not go on."""
    check_listeners(settings)
    settings.verifier()
    spread, compute = spread_of(settings), compute_of(settings)
    spread.check(settings.device)
    compute.check(spread)
    logs.configure(settings.service, settings.log_json, settings.log_level)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    disable_progress_bar()
    replica = settings.name or f"{socket.gethostname()}-{uuid.uuid4().hex[:6]}"
    if not settings.tensor_parallel:
        asyncio.run(_serve(settings, load(FrozenLLM, settings, replica), replica))
    elif rank() == 0:
        _lead(settings, load(LeadingLLM, settings, replica), replica)
    else:
        follow(load(FrozenLLM, settings, replica))


def spread_of(settings: LlmSettings) -> Spread:
    return Spread(settings.device_map, settings.tensor_parallel)


def compute_of(settings: LlmSettings) -> Compute:
    return Compute(
        settings.attention, settings.weights, settings.gradient_checkpointing, settings.compile
    )


def load(kind: type[Engine], settings: LlmSettings, replica: str) -> Engine:
    """The model that `settings` name, as they say. Raises what FrozenLLM.load raises."""
    return kind.load(
        settings.model,
        settings.device,
        settings.dtype,
        activations=Activations(replica, settings.activation_tokens, settings.activation_seconds),
        spread=spread_of(settings),
        compute=compute_of(settings),
    )


def _lead(settings: LlmSettings, engine: LeadingLLM, replica: str) -> None:
    """Serves for all ranks, and lets the others end when that is over."""
    try:
        asyncio.run(_serve(settings, engine, replica))
    finally:
        engine.dismiss()


async def _serve(settings: LlmSettings, engine: FrozenLLM, replica: str) -> None:
    server = LlmServer(settings, engine, replica)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    ports = await server.start()
    _log_ready(ports, engine, replica)
    announce(ports, settings.ready_file)
    leader = engine if isinstance(engine, LeadingLLM) else None
    async with kept_together(leader, server.worker, stopping.set):
        await stopping.wait()
    drain = 0 if leader is not None and leader.lost else settings.drain_seconds
    log.info("llm service stopping", extra={"drain_seconds": drain})
    await server.stop(drain)
    log.info("llm service stopped")


def _log_ready(ports: Ports, engine: FrozenLLM, replica: str) -> None:
    log.info(
        "llm service ready",
        extra={
            "port": ports.grpc,
            "metrics_port": ports.metrics,
            "model": engine.name,
            "fingerprint": engine.fingerprint,
            "device": str(engine.device),
            "dtype": engine.precision,
            "replica": replica,
        },
    )


def announce(ports: Ports, ready_file: Path | None) -> None:
    """One line of JSON for whoever started us: on standard output, or whole in a file."""
    ready = {"event": "ready", "port": ports.grpc, "metrics_port": ports.metrics}
    line = json.dumps(ready) + "\n"
    if ready_file is None:
        sys.stdout.write(line)
        sys.stdout.flush()
        return
    part = ready_file.with_name(f".{ready_file.name}.{os.getpid()}")
    part.write_text(line)
    part.replace(ready_file)


def _close(server: Any, thread: Thread) -> None:
    server.shutdown()
    server.server_close()
    thread.join()
