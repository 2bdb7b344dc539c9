"""The coordinator's process: gRPC, HTTP and the leader in one asyncio loop."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
import yaml
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from pydantic import ValidationError

from fednano import logs
from fednano.coordinator.auth import Authenticator
from fednano.coordinator.leader import Leader
from fednano.coordinator.metrics import Metrics
from fednano.coordinator.servicer import Servicer
from fednano.coordinator.settings import CoordinatorSettings
from fednano.coordinator.store import Store
from fednano.settings import invalid
from fednano.wire import coordinator_pb2, coordinator_pb2_grpc
from fednano.wire.channels import check_exposure, listen, make_server
from fednano.wire.errors import Conflict, FedNanoError, InvalidRequest, Unavailable
from fednano.wire.run_config import RunConfig
from fednano.wire.sessions import Identity, SessionSigner

log = logging.getLogger(__name__)

SERVICE = coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"].full_name
_REDIS_SECONDS = 60.0  # to wait for it at start
_REDIS_LOOK = 0.25
_CONNECTIONS = 1000  # over HTTP at a time, twice as many as event streams; more get a 503
_IDLE_SECONDS = 5


@dataclass(frozen=True)
class Ports:
    """Where the coordinator listens."""

    grpc: int
    http: int


class HttpServer(uvicorn.Server):
    """uvicorn within our loop: signals are ours."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class CoordinatorServer:
    """Serves until it is stopped."""

    def __init__(self, settings: CoordinatorSettings) -> None:
        self._settings = settings
        self._store = Store.connect(
            settings.redis_url,
            client_seconds=settings.client_seconds,
            admin_token=settings.admin_token.get_secret_value(),
        )
        self._metrics = Metrics()
        self._servicer = Servicer(
            self._store,
            _signer(settings),
            self._metrics,
            settings.max_update_norm,
            settings.message_mebibytes << 20,
        )
        self._server = make_server(Authenticator(self._store).authenticate)
        self._health = health.aio.HealthServicer()
        self._leader = Leader(self._store, self._metrics, settings.lease_seconds)
        self._leading: asyncio.Task[None] | None = None
        self._stack = AsyncExitStack()

    @property
    def store(self) -> Store:
        return self._store

    @property
    def metrics(self) -> Metrics:
        return self._metrics

    async def start(self) -> Ports:
        """Binds both listeners. Raises InvalidRequest where that would expose tokens in the clear,
        Conflict for a newer schema, Unavailable where Redis doesn't come up."""
        settings, tls = self._settings, self._settings.server_tls()
        check_exposure("host", settings.host, tls, settings.insecure)
        check_exposure("http_host", settings.http_host, tls, settings.insecure)
        self._stack.push_async_callback(self._store.close)
        await self._prepare()
        await self._stack.enter_async_context(self._store.listening())
        grpc_port = await self._start_grpc()
        http_port = await self._start_http()
        self._leading = asyncio.create_task(self._leader.serve())
        self._stack.push_async_callback(_cancel, self._leading)
        return Ports(grpc_port, http_port)

    def works(self) -> bool:
        """False once the task that leads, or waits to, has ended: nothing may be advanced then."""
        return self._leading is None or not self._leading.done()

    async def stop(self) -> None:
        """Gives the lease back, lets running calls finish, and closes; the reverse of start."""
        await self._stack.aclose()

    async def _prepare(self) -> None:
        """Redis may come up after us. What was asked for at start is applied once it has."""
        waited = 0.0
        while True:
            try:
                await self._store.prepare()
                break
            except Unavailable:
                if waited >= _REDIS_SECONDS:
                    raise
                await asyncio.sleep(_REDIS_LOOK)
                waited += _REDIS_LOOK
        if self._settings.run_file is not None:
            await apply_run_file(self._store, self._settings.run_file)

    async def _start_grpc(self) -> int:
        settings = self._settings
        coordinator_pb2_grpc.add_CoordinatorServicer_to_server(self._servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        port = listen(self._server, settings.host, settings.grpc_port, settings.server_tls())
        await self._server.start()
        self._stack.push_async_callback(self._stop_grpc)
        for service in ("", SERVICE):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        return port

    async def _stop_grpc(self) -> None:
        await self._health.enter_graceful_shutdown()
        self._servicer.close()
        await self._server.stop(self._settings.drain_seconds)

    async def _start_http(self) -> int:
        from fednano.coordinator.rest import make_app

        app = make_app(
            store=self._store, settings=self._settings, metrics=self._metrics, works=self.works
        )
        listener = bind(self._settings.http_host, self._settings.http_port)
        server = HttpServer(_uvicorn_config(app, self._settings))
        task = asyncio.create_task(server.serve(sockets=[listener]))

        async def stop() -> None:
            app.state.streams.close()
            self._store.database.ring_all()
            server.should_exit = True
            await task

        self._stack.push_async_callback(stop)
        while not server.started and not task.done():  # noqa: ASYNC110 (uvicorn has no event)
            await asyncio.sleep(0.01)
        return int(listener.getsockname()[1])


def _signer(settings: CoordinatorSettings) -> SessionSigner:
    """Raises InvalidRequest where there is no usable key: the LLM service could verify nothing."""
    key = settings.session_key.get_secret_value()
    try:
        signer = SessionSigner(key.encode(), settings.session_seconds)
        signer.issue(Identity("", ""))
    except Exception:
        field = "session_key"
        wanted = "an Ed25519 private key, PEM (FEDNANO_COORDINATOR_SESSION_KEY_FILE)"
        raise InvalidRequest.of(field, wanted, "nothing" if not key else "another text") from None
    return signer


def _uvicorn_config(app: Any, settings: CoordinatorSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_keep_alive=_IDLE_SECONDS,
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
        timeout_graceful_shutdown=max(1, int(settings.drain_seconds)),
    )


def bind(host: str, port: int) -> socket.socket:
    """A listening address (0: any free port). Raises FedNanoError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise FedNanoError(f"can't listen on {host}:{port} for HTTP: {error}") from error
    return listener


def read_run_file(path: Path) -> RunConfig:
    """Raises InvalidRequest."""
    try:
        return RunConfig.model_validate(yaml.safe_load(path.read_text()))
    except ValidationError as error:
        raise invalid(error) from None
    except (OSError, yaml.YAMLError) as error:
        raise InvalidRequest(f"run_file can't be read: {error}") from None


async def apply_run_file(store: Store, path: Path) -> None:
    """Creates the run of a run.yaml, once. One of that name with other settings stays as it is."""
    try:
        await store.create_run(read_run_file(path), by="run-file")
    except Conflict as error:
        log.error("run file not applied", extra={"file": str(path), "reason": error.detail})


async def _cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def run(settings: CoordinatorSettings) -> None:
    """Serves until SIGTERM or SIGINT. Raises FedNanoError where that can't begin."""
    logs.configure(settings.service, settings.log_json, settings.log_level)
    asyncio.run(serve(settings))


async def serve(settings: CoordinatorSettings) -> None:
    server = CoordinatorServer(settings)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    starting = asyncio.create_task(server.start())
    stopped = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            return await _cancel(starting)  # told to stop while it waits for Redis
        ports = await starting
        log.info("coordinator ready", extra={"port": ports.grpc, "http_port": ports.http})
        if settings.ready_file is not None:
            announce(ports, settings.ready_file)
        await stopped
        log.info("coordinator stopping", extra={"drain_seconds": settings.drain_seconds})
    finally:
        stopped.cancel()
        await server.stop()
        log.info("coordinator stopped")


def announce(ports: Ports, ready_file: Path) -> None:
    """The ports, whole in a file for whoever started us."""
    part = ready_file.with_name(f".{ready_file.name}.{os.getpid()}")
    part.write_text(json.dumps({"grpc_port": ports.grpc, "http_port": ports.http}) + "\n")
    part.replace(ready_file)
