"""Ranges of values in Redis, over blocking connections, each straight into memory of its own.

A client library can't know how long an answer will be: it receives small pieces, gathers and copies
them. Who asks for a range does know, so here the socket writes to where the bytes are wanted.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import redis
from numpy.typing import NDArray
from redis.backoff import NoBackoff
from redis.retry import Retry

from fednano.coordinator.database import ANSWER_SECONDS

ByteRange = tuple[int, int]  # the first byte, and the one after the last
Bytes = NDArray[np.uint8]

_ADDRESS = ("host", "port", "path", "db", "username", "password", "socket_connect_timeout")
_END = b"\r\n"


class RangeReader:
    """Reads from the server of an asyncio client, for any number of threads, and gives up as early."""

    def __init__(self, served: redis.asyncio.Redis) -> None:
        pool = served.connection_pool
        known: dict[str, Any] = pool.connection_kwargs
        given = {n: known[n] for n in known if n in _ADDRESS or n.startswith("ssl_")}
        given |= {"protocol": 2, "socket_timeout": ANSWER_SECONDS}
        given["retry"] = Retry(NoBackoff(), 0)  # the leader tries again, and tells
        self._given = given
        self._kind = _KINDS[pool.connection_class.__name__]
        self._idle: deque[_Connection] = deque()

    def read(self, key: str, ranges: Sequence[ByteRange]) -> list[Bytes]:
        """Those bytes of a value; fewer where it ends before. Raises redis's errors and OSError."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._kind(**self._given)
        commands = [("GETRANGE", key, start, stop - 1) for start, stop in ranges]
        try:
            connection.send_packed_command(connection.pack_commands(commands))
            found = [connection.answer(stop - start) for start, stop in ranges]
        except _Unexpected:
            connection.disconnect()  # what is still to come was not read
            found = [self._any(connection, command) for command in commands]
        except BaseException:
            connection.disconnect()
            raise
        self._idle.append(connection)
        return found

    def close(self) -> None:
        while self._idle:
            self._idle.pop().disconnect()

    @staticmethod
    def _any(connection: _Connection, command: tuple[Any, ...]) -> Bytes:
        """What the library makes of an answer: an error, or a value that is shorter."""
        try:
            connection.send_command(*command)
            return np.frombuffer(connection.read_response(), np.uint8)
        except BaseException:
            connection.disconnect()
            raise


class _Unexpected(Exception):
    """The answer is not the one of so many bytes."""


class _Connection(redis.connection.AbstractConnection):
    """One that the library opens, and closes."""

    def answer(self, size: int) -> Bytes:
        """The next answer. Raises _Unexpected when it is any other than so many bytes."""
        head, began = b"$%d%s" % (size, _END), b""
        while began != head:
            began += self._receive(len(head) - len(began))
            if not head.startswith(began):
                raise _Unexpected
        body = np.empty(size + len(_END), np.uint8)
        view = body.data
        while view:
            view = view[self._receive_into(view) :]
        return body[:size]

    def _receive(self, most: int) -> bytes:
        data = bytearray(most)
        return bytes(data[: self._receive_into(memoryview(data))])

    def _receive_into(self, view: memoryview) -> int:
        assert isinstance(self._sock, socket.socket)
        count = self._sock.recv_into(view)
        if not count:
            raise redis.ConnectionError("Redis closed the connection")
        return count


class _Tcp(_Connection, redis.Connection):
    pass


class _Tls(_Connection, redis.SSLConnection):
    pass


class _Unix(_Connection, redis.UnixDomainSocketConnection):
    pass


_KINDS: dict[str, Callable[..., _Connection]] = {
    "Connection": _Tcp,
    "SSLConnection": _Tls,
    "UnixDomainSocketConnection": _Unix,
}
