"""The one place that makes gRPC channels and servers: TLS, message sizes, keep-alive."""

from __future__ import annotations

import ipaddress
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from fednano import tracing
from fednano.wire.errors import RETRYABLE, FedNanoError, InvalidRequest, from_rpc_error
from fednano.wire.headers import ids_of
from fednano.wire.interceptors import (
    Authenticate,
    AuthInterceptor,
    ErrorInterceptor,
    LogInterceptor,
    TraceInterceptor,
    bearer,
)
from fednano.wire.tensor_pb2 import Header

log = logging.getLogger(__name__)

# A chunk and its frame; everything larger is a stream of chunks.
_MAX_MESSAGE = 4 << 20
_MOST_CALLS = 4096  # at a time; each client of a coordinator may hold one open while it waits
_COMMON = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE),
    ("grpc.max_send_message_length", _MAX_MESSAGE),
)
_CLIENT = (
    *_COMMON,
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.use_local_subchannel_pool", 1),
)
_SERVER = (
    *_COMMON,
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 60_000),  # callers that vanished are noticed
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


@dataclass(frozen=True)
class ServerTls:
    """PEM files of a listening service."""

    certificate: Path
    key: Path

    def credentials(self) -> grpc.ServerCredentials:
        pair = (self.key.read_bytes(), self.certificate.read_bytes())
        return grpc.ssl_server_credentials([pair])


@dataclass(frozen=True)
class ClientTls:
    """How a caller checks the service: by this CA, or by the system's where there is none."""

    ca: Path | None = None
    server_name: str | None = None  # where it differs from the address that is dialled


def is_loopback(host: str) -> bool:
    """True for localhost and loopback addresses."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(field: str, host: str, tls: object | None, insecure: bool) -> None:
    """Tokens and data must not cross a network in the clear unless somebody said so.

    Raises InvalidRequest.
    """
    if tls is None and not insecure and not is_loopback(host):
        raise InvalidRequest.of(
            field, "a loopback address, TLS, or --insecure for a trusted network", repr(host)
        )


def make_channel(target: str, tls: ClientTls | None = None) -> grpc.Channel:
    """A channel to host:port; it connects when first used."""
    options: Sequence[tuple[str, object]] = _CLIENT
    if is_loopback(target.rpartition(":")[0]):
        options = (*options, ("grpc.enable_http_proxy", 0))
    if tls is None:
        return grpc.insecure_channel(target, options)
    if tls.server_name:
        options = (*options, ("grpc.ssl_target_name_override", tls.server_name))
    roots = tls.ca.read_bytes() if tls.ca else None
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(roots), options)


def make_server(authenticate: Authenticate, most_calls: int = _MOST_CALLS) -> grpc.aio.Server:
    """An asyncio server that refuses unauthenticated calls and reports our errors as statuses.

    Beyond `most_calls` at a time callers get RESOURCE_EXHAUSTED and may try again.
    """
    interceptors = [LogInterceptor(), ErrorInterceptor(), AuthInterceptor(authenticate)]
    return grpc.aio.server(
        interceptors=[*interceptors, TraceInterceptor()] if tracing.on() else interceptors,
        options=_SERVER,
        maximum_concurrent_rpcs=most_calls,
    )


def listen(server: grpc.aio.Server, host: str, port: int, tls: ServerTls | None) -> int:
    """Binds host:port (0: any free one) and returns the port."""
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, tls.credentials())
    except RuntimeError as error:
        raise FedNanoError(f"can't listen on {address}: {error}") from error


@contextmanager
def translated() -> Iterator[None]:
    """Raises our own errors for gRPC's."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


@contextmanager
def calling(method: str, header: Header, token: str) -> Iterator[tuple[tuple[str, str], ...]]:
    """Around one try of a call with that header, up to its last reply; yields its metadata.

    Raises our own errors for gRPC's.
    """
    started, status = time.perf_counter(), grpc.StatusCode.OK
    about = {**ids_of(header), "rpc": method}
    try:
        with tracing.calling(method, ids_of(header)) as traced, translated():
            yield (*bearer(token), *traced)
    except FedNanoError as error:
        status = error.status
        # Those that are tried again are told by whoever tries.
        level = logging.DEBUG if isinstance(error, RETRYABLE) else logging.INFO
        log.log(level, "call failed", extra={**about, "reason": error.detail})
        raise
    finally:
        seconds = round(time.perf_counter() - started, 4)
        log.debug("call made", extra={**about, "seconds": seconds, "status": status.name})
