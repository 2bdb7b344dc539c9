"""Ranges read from a real Redis: straight into memory, whatever the answer, whatever the connection."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import redis
from fednano.coordinator.database import Database
from fednano.coordinator.store_ranges import RangeReader
from fednano.lab.processes import Processes
from fednano.lab.redis_server import redis_binary

from tests.certificates import make_certificate
from tests.redis_server import RedisServer

VALUE = np.random.default_rng(0).bytes(3 << 20)
RANGES = [(0, 1), (5, 5 + (1 << 20)), (1 << 20, 3 << 20)]


@pytest.fixture
def reader(redis_server: RedisServer) -> Iterator[RangeReader]:
    with redis_server.client() as client:
        client.set("value", VALUE)
        client.rpush("list", "item")
    reader = RangeReader(Database(redis_server.url, time.time).redis)
    yield reader
    reader.close()


def check(reader: RangeReader) -> None:
    found = reader.read("value", RANGES)
    assert [data.tobytes() for data in found] == [VALUE[start:stop] for start, stop in RANGES]


def test_ranges_are_read_exactly(reader: RangeReader) -> None:
    check(reader)
    check(reader)


@pytest.mark.parametrize(("key", "expected"), [("value", VALUE[-10:]), ("nothing", b"")])
def test_a_value_that_ends_before_is_shorter(
    reader: RangeReader, key: str, expected: bytes
) -> None:
    end = len(VALUE)
    found = reader.read(key, [(end - 10, end + 90), (end - 10, end + 90)])
    assert [data.tobytes() for data in found] == [expected] * 2
    check(reader)


def test_an_error_is_redis_own_and_the_next_read_is_in_step(reader: RangeReader) -> None:
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        reader.read("list", [(0, 10), (10, 1000)])
    check(reader)


def test_threads_have_a_connection_each_and_none_stays_open(
    reader: RangeReader, redis_server: RedisServer
) -> None:
    async def read() -> None:
        await asyncio.gather(*(asyncio.to_thread(check, reader) for _ in range(20)))

    with redis_server.client() as client:
        before = len(client.client_list())
        asyncio.run(read())
        assert before < len(client.client_list()) <= before + 20
        reader.close()
        patience = time.monotonic() + 10  # Redis hears of a closed connection when it looks there
        while len(client.client_list()) > before and time.monotonic() < patience:
            time.sleep(0.01)
        assert len(client.client_list()) == before


def test_a_redis_that_went_away_is_told_and_found_again(
    reader: RangeReader, redis_server: RedisServer
) -> None:
    check(reader)
    with redis_server.client() as client:
        client.client_kill_filter(_type="normal", skipme=True)
    with pytest.raises((redis.ConnectionError, OSError)):
        check(reader)
    check(reader)


async def test_behind_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    with Processes(tmp_path) as processes:
        command = [redis_binary(), "--port", "0", "--unixsocket", str(path), "--save", ""]
        processes.start("redis", [*command, "--dir", str(tmp_path)])
        processes.wait_until(path.exists, "the start of Redis")
        await check_over(f"unix://{path}")


async def test_over_tls(redis_server: RedisServer, tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    async with relayed(redis_server, context) as port:
        address = f"127.0.0.1:{port}/0?ssl_ca_certs={certificate}"
        await check_over(f"rediss://{address}")


async def check_over(url: str) -> None:
    served = Database(url, time.time).redis
    await served.set("value", VALUE)
    reader = RangeReader(served)
    await asyncio.to_thread(check, reader)
    reader.close()
    await served.aclose()


@asynccontextmanager
async def relayed(server: RedisServer, context: ssl.SSLContext) -> AsyncIterator[int]:
    """TLS in front of a Redis that has none; its port."""

    async def carry(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(1 << 16):
            target.write(data)
            await target.drain()
        target.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, to_redis = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(carry(reader, to_redis), carry(behind, writer))

    listening = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with listening:
        yield listening.sockets[0].getsockname()[1]
