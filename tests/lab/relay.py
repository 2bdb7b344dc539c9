"""A TCP relay that asks the kernel how much its clients sent and received."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType

_ACKED, _RECEIVED = 120, 128  # where struct tcp_info has tcpi_bytes_acked, tcpi_bytes_received
_PIECE = 1 << 16


@dataclass(frozen=True)
class Counted:
    """Bytes of TCP's payload, as the clients see them."""

    sent: int = 0
    received: int = 0

    def __add__(self, other: Counted) -> Counted:
        return Counted(self.sent + other.sent, self.received + other.received)

    @classmethod
    def of(cls, connection: socket.socket) -> Counted:
        """Of the end of a connection that its client does not hold."""
        told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        (acked,) = struct.unpack_from("=Q", told, _ACKED)
        (received,) = struct.unpack_from("=Q", told, _RECEIVED)
        return cls(received, acked)


class Relay:
    """To a port of this machine, from another one; a context manager."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._open: set[socket.socket] = set()
        self._ended = Counted()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Relay:
        self._thread.start()
        listening = asyncio.start_server(self._connected, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(listening, self._loop).result(10)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def counted(self) -> Counted:
        """Over all connections, those that have ended too."""

        async def look() -> Counted:
            return sum(map(Counted.of, self._open), self._ended)

        return asyncio.run_coroutine_threadsafe(look(), self._loop).result(10)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A descriptor of its own: the writer's may be closed under us, and then tells nothing.
        near = socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno()))
        self._open.add(near)
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
            with closing(far_writer):
                await asyncio.gather(_carry(reader, far_writer), _carry(far_reader, writer))
        except ConnectionRefusedError:
            pass  # nobody listens there yet: the client sees its connection end, and tries again
        finally:
            self._ended += Counted.of(near)
            self._open.discard(near)
            near.close()
            writer.close()

    async def _end(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


async def _carry(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    """Until the source ends or the target has gone."""
    try:
        while piece := await source.read(_PIECE):
            target.write(piece)
            await target.drain()
        target.write_eof()
    except ConnectionError:
        target.close()
