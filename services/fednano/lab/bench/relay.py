"""A slow link on one machine: a TCP relay with a rate and a delay in each direction.

It runs as a process of its own. Bytes leave one after the other at the rate and arrive half a round
trip later. It listens at the far end of a cable that has the rate, then its own is infinite, or on
loopback. TCP's slow start over the round trip is not part of it; HTTP/2's windows are.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fednano.lab.bench.cable import Cable, listening

_AHEAD = 0.01
"""Seconds of bytes that the link's own buffer takes; then the sender waits."""
_TICK = 0.002
"""Seconds that a piece takes at the rate: what arrives together."""
_MOST = 1 << 16


@dataclass
class Direction:
    """One way through the link, for all connections together."""

    rate: float  # bytes/s
    delay: float  # seconds
    free_at: float = 0.0  # when the last byte of what was taken has left

    async def carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        """Until the source ends."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        delivering = asyncio.create_task(_deliver(under_way, target))
        clock = asyncio.get_running_loop().time
        most = int(max(1024, min(_MOST, self.rate * _TICK)))
        with suppress(ConnectionError):
            while piece := await source.read(most):
                self.free_at = max(clock(), self.free_at) + len(piece) / self.rate
                under_way.put_nowait((self.free_at + self.delay, piece))
                if (ahead := self.free_at - clock() - _AHEAD) > 0:
                    await asyncio.sleep(ahead)
        under_way.put_nowait((clock() + self.delay, b""))
        await delivering


async def _deliver(
    under_way: asyncio.Queue[tuple[float, bytes]], target: asyncio.StreamWriter
) -> None:
    """Each piece when it is due; an empty one ends this direction, and not the other."""
    clock = asyncio.get_running_loop().time
    with suppress(ConnectionError):
        while True:
            due, piece = await under_way.get()
            if (early := due - clock()) > 0:
                await asyncio.sleep(early)
            if not piece:
                target.write_eof()
                return
            target.write(piece)
            await target.drain()


@dataclass(frozen=True)
class Link:
    """To a port of this machine, with a rate and a delay each way."""

    port: int
    there: Direction
    back: Direction

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.port)
        except ConnectionError:
            writer.close()
            return
        try:
            await asyncio.gather(
                self.there.carry(reader, far_writer), self.back.carry(far_reader, writer)
            )
        finally:
            far_writer.close()
            writer.close()


async def serve(port: int, rate: float, delay: float, ready: Path, at: Cable | None = None) -> None:
    """Writes the host:port that it listens on into `ready`, at once and whole."""
    link = Link(port, Direction(rate, delay), Direction(rate, delay))
    own = listening(at) if at is not None else socket.create_server(("127.0.0.1", 0))
    server = await asyncio.start_server(link.connected, sock=own)
    unfinished = ready.with_suffix(".part")
    unfinished.write_text(":".join(map(str, own.getsockname())))
    unfinished.replace(ready)
    await server.serve_forever()


if __name__ == "__main__":
    _port, _rate, _delay, _ready, *_cable = sys.argv[1:]
    _at = Cable(*_cable) if _cable else None
    asyncio.run(serve(int(_port), float(_rate), float(_delay), Path(_ready), _at))
