"""The connection to Redis: its errors translated once, guarded commits, and what rings the bells.

A ring is pub/sub: the channel is a run's, the payload the kind of change. Each of the coordinators
that serve from one Redis hears every ring, its own too.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any, cast

import redis.asyncio as aioredis
from redis import exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from fednano.coordinator import keys, scripts
from fednano.coordinator.batches import Batches
from fednano.coordinator.bells import LOOK_AGAIN_SECONDS, Bell, Bells
from fednano.wire.errors import Busy, FedNanoError, InvalidRequest, Unavailable

log = logging.getLogger(__name__)

EVENTS_KEPT = 10_000
ANSWER_SECONDS = 10.0  # that Redis has for one command
TROUBLES = ("unreachable", "read_only", "disk", "memory")
_ARGUMENTS = 1000  # per command: Lua can't unpack any number
_CONNECTIONS = 32  # more at a time are slower, and each costs as much as twenty commands


class LeaseLost(FedNanoError):
    """Another coordinator may be leading now; this one must not advance anything."""


class Raced(FedNanoError):
    """What was read has changed meanwhile: read again."""


class Commit:
    """Writes that happen together, if every expectation holds."""

    def __init__(self, lease: str = "") -> None:
        self._lease = lease
        self._guards: list[str] = []
        self._writes: list[str | bytes | int | float] = []

    def expect(self, key: str, field: str, value: str) -> Commit:
        """That the hash's field has this value; "" where it must not exist."""
        self._guards += [key, field, value]
        return self

    def expect_size(self, key: str, size: int) -> Commit:
        """That the hash has so many fields."""
        return self.expect(key, "", str(size))

    def do(self, *command: str | bytes | int | float) -> Commit:
        self._writes += [len(command), *command]
        return self

    def add_many(self, command: str, key: str, values: list[str]) -> Commit:
        """A command of any number of values, in parts."""
        for start in range(0, len(values), _ARGUMENTS):
            self.do(command, key, *values[start : start + _ARGUMENTS])
        return self

    def set_fields(self, key: str, fields: dict[str, str]) -> Commit:
        return self.do("HSET", key, *(part for pair in fields.items() for part in pair))

    def tell(self, run: str, kind: str, data: str, ring: str = "") -> Commit:
        """The event that goes with the writes; it rings for its kind, or for `ring`."""
        stream = keys.events(run)
        self.do("XADD", stream, "MAXLEN", "~", EVENTS_KEPT, "*", "kind", kind, "data", data)
        return self.ring(run, ring or kind)

    def ring(self, run: str, kind: str) -> Commit:
        return self.do("PUBLISH", keys.bell(run), kind)

    def arguments(self) -> list[str | bytes | int | float]:
        return [self._lease, len(self._guards) // 3, *self._guards, *self._writes]


class Database:
    """Redis as the store's parts see it."""

    def __init__(self, url: str, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.reachable_since = clock()  # before that, nobody's sign of life was recorded
        self.errors: Counter[str] = Counter()  # by one of TROUBLES, since they were last looked at
        self.redis = _connection(url)
        self._scripts = {
            name: self.redis.register_script(getattr(scripts, name))
            for name in scripts.__dict__
            if name.isupper() and not name.startswith("_")
        }
        self.bells = Bells()
        self._batches = Batches(self.redis, ANSWER_SECONDS)

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Raises our errors for Redis's."""
        try:
            yield
        except (exceptions.ConnectionError, exceptions.TimeoutError, OSError) as error:
            self.reachable_since = self.clock()
            self.errors["unreachable"] += 1
            log.warning("redis can't be reached", extra={"reason": type(error).__name__})
            raise Unavailable("the coordinator's store can't be reached now") from error
        except exceptions.ReadOnlyError as error:
            self.errors["read_only"] += 1
            raise Unavailable("the coordinator's store takes no writes now") from error
        except exceptions.ResponseError as error:
            if "MISCONF" in str(error):
                self.errors["disk"] += 1
                raise Unavailable("the coordinator's store can't write to its disk") from error
            if "OOM" in str(error):
                self.errors["memory"] += 1
                raise Busy("the coordinator's store is out of memory") from error
            raise

    @asynccontextmanager
    async def bounded(self) -> AsyncIterator[None]:
        """`translated`, and Unavailable for what takes too long."""
        with self.translated():
            async with asyncio.timeout(ANSWER_SECONDS):
                yield

    async def call(self, command: str, *arguments: Any) -> Any:
        """One command."""
        async with self.bounded():
            return await self.redis.execute_command(command, *arguments)

    async def pipeline(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        """Several commands in one round trip, not atomic."""
        if not commands:
            return []
        async with self.bounded():
            pipe = self.redis.pipeline(transaction=False)
            for command in commands:
                pipe.execute_command(*command)
            return await pipe.execute()

    async def small(self, *command: Any) -> Any:
        """One command that is quickly done and answered, in a round trip with other callers'."""
        with self.translated():
            return await self._batches.execute(*command)

    async def small_script(self, name: str, names: list[str], arguments: list[Any]) -> Any:
        """Like `small`, for one of `scripts`."""
        digest = self._scripts[name].sha
        try:
            return await self.small("EVALSHA", digest, len(names), *names, *arguments)
        except exceptions.NoScriptError:
            return await self.script(name, names, arguments)

    async def script(self, name: str, names: list[str], arguments: list[Any]) -> Any:
        """Runs one of `scripts` on these keys."""
        async with self.bounded():
            return await self._scripts[name](keys=names, args=arguments)

    async def commit(self, commit: Commit) -> None:
        """Raises Raced or LeaseLost, and then has written nothing."""
        result = await self.script("COMMIT", [keys.LEADER], commit.arguments())
        if result == -1:
            raise LeaseLost("the leader's lease is gone")
        if result == 0:
            raise Raced("it changed meanwhile")

    async def setting(self, name: str) -> str:
        """One of Redis's settings; empty where it won't tell, as hosted ones often don't."""
        try:
            found = await self.call("CONFIG GET", name)
        except exceptions.ResponseError:
            return ""
        return text_of(found.get(name, found.get(name.encode(), "")))

    async def hash(self, key: str) -> dict[str, str]:
        """All fields of a hash; empty where there is none."""
        return text_pairs(await self.call("HGETALL", key))

    async def hashes(self, names: list[str]) -> list[dict[str, str]]:
        found = await self.pipeline([("HGETALL", name) for name in names])
        return [text_pairs(item) for item in found]

    def bell(
        self, run: str, kinds: Collection[str] = (), patience: float = LOOK_AGAIN_SECONDS
    ) -> AbstractContextManager[Bell]:
        """A bell for changes of `run` of these kinds; of all, if none is given. Take it before
        looking, so that no change falls in between."""
        return self.bells.hung(run, kinds, patience)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Rings the bells meanwhile."""
        task = asyncio.create_task(self._listen())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _listen(self) -> None:
        while True:
            try:
                with self.translated():
                    async with self.redis.pubsub() as channel:
                        await channel.psubscribe(keys.BELLS)
                        while True:
                            self._ring(await channel.get_message(timeout=LOOK_AGAIN_SECONDS))
            except FedNanoError:
                await asyncio.sleep(0.2)

    def _ring(self, message: dict[str, Any] | None) -> None:
        if not message:
            return
        if message["type"] == "psubscribe":
            self.ring_all()  # what was told before this subscription went unheard
        elif message["type"] == "pmessage":
            run = message["channel"].decode().removeprefix(keys.ACTIVE_BELL)
            self.bells.ring(run, message["data"].decode())

    def ring_all(self) -> None:
        """Wakes everybody who waits for a change."""
        self.bells.ring_all()

    async def close(self) -> None:
        await self._batches.close()
        await self.redis.aclose()


def _connection(url: str) -> aioredis.Redis:
    """Connects when first used. Raises InvalidRequest, without the password that may be in there."""
    try:
        pool = aioredis.BlockingConnectionPool.from_url(
            url,
            max_connections=_CONNECTIONS,
            timeout=ANSWER_SECONDS,
            protocol=2,
            socket_timeout=None,  # ours is `bounded`: redis-py's wait_for may swallow a cancellation
            socket_connect_timeout=2,
            retry=Retry(NoBackoff(), 0),
            retry_on_error=[],
        )
        return aioredis.Redis.from_pool(pool)
    except ValueError:
        wanted = "redis://HOST:PORT/DATABASE, rediss://... or unix://PATH"
        raise InvalidRequest.of("redis_url", wanted, "another text") from None


def text_of(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def text_pairs(found: Any) -> dict[str, str]:
    """A hash's reply as text."""
    pairs = found.items() if isinstance(found, dict) else zip(found[::2], found[1::2], strict=True)
    return {cast(bytes, name).decode(): cast(bytes, value).decode() for name, value in pairs}
