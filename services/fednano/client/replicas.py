"""The LLM's replicas: one channel for each address behind a name, used in turn."""

from __future__ import annotations

import itertools
import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from fednano.wire.channels import ClientTls, make_channel
from fednano.wire.errors import InvalidRequest, Unavailable
from fednano.wire.llm_pb2 import DESCRIPTOR, ForwardBackwardReply, ForwardBackwardRequest
from fednano.wire.llm_pb2_grpc import LanguageModelStub

log = logging.getLogger(__name__)

SERVICE = f"/{DESCRIPTOR.services_by_name['LanguageModel'].full_name}"
_RESOLVE_SECONDS = 5.0  # a new replica is found, and a name that fails asked for, so soon


@dataclass(frozen=True)
class Replica:
    address: str
    channel: grpc.Channel
    stub: LanguageModelStub
    step_in_one: Callable[..., ForwardBackwardReply]
    """ForwardBackward with one message each way. Declared as a stream or not, a call is the same on
    the wire; but the requests of a stream take a thread, for each call a new one."""


def parse_target(target: str) -> tuple[str, int]:
    """host:port; raises InvalidRequest."""
    host, _, port = target.rpartition(":")
    if not host or not port.isdigit():
        raise InvalidRequest.of("address", "host:port", repr(target))
    return host.strip("[]"), int(port)


class Replicas:
    """Resolves a (headless) service's name and holds one channel per replica."""

    def __init__(self, target: str, tls: ClientTls | None = None) -> None:
        self._host, self._port = parse_target(target)
        # Certificates name the service, not its replicas' addresses.
        self._tls = tls and ClientTls(tls.ca, tls.server_name or self._host)
        self._replicas: dict[str, Replica] = {}
        self._turn = itertools.count()
        self._resolved_at = float("-inf")
        self._lock = threading.Lock()

    def next(self) -> Replica:
        """The replica whose turn it is. Raises Unavailable where the name can't be resolved."""
        with self._lock:
            if time.monotonic() - self._resolved_at > _RESOLVE_SECONDS or not self._replicas:
                self._resolve()
            known = list(self._replicas.values())
            return known[next(self._turn) % len(known)]

    def at(self, address: str) -> Replica | None:
        """The replica at an address, if it is still there."""
        with self._lock:
            return self._replicas.get(address)

    def every(self) -> list[Replica]:
        """All that are known."""
        with self._lock:
            return list(self._replicas.values())

    def failed(self) -> None:
        """A call failed: the next one looks the name up again."""
        with self._lock:
            self._resolved_at = float("-inf")

    def close(self) -> None:
        with self._lock:
            for replica in self._replicas.values():
                replica.channel.close()
            self._replicas.clear()

    def _resolve(self) -> None:
        self._resolved_at = time.monotonic()
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except OSError as error:
            if not self._replicas:
                raise Unavailable(f"{self._host} can't be resolved: {error}") from None
            return
        ipv4 = [info for info in found if info[0] is socket.AF_INET] or found
        addresses = {_join(str(info[4][0]), self._port) for info in ipv4}
        for gone in self._replicas.keys() - addresses:
            del self._replicas[gone]  # not closed: another thread may be at a call
        for address in sorted(addresses - self._replicas.keys()):
            channel = make_channel(address, self._tls)
            self._replicas[address] = _replica(address, channel)


def _replica(address: str, channel: grpc.Channel) -> Replica:
    step_in_one: Any = channel.unary_unary(
        f"{SERVICE}/ForwardBackward",
        request_serializer=ForwardBackwardRequest.SerializeToString,
        response_deserializer=ForwardBackwardReply.FromString,
    )
    return Replica(address, channel, LanguageModelStub(channel), step_in_one)


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
