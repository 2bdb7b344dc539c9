"""Small commands of many callers in one round trip.

A thousand clients that are woken at once would otherwise need a thousand round trips, and as many
connections. Nobody waits for company: what comes while a batch is under way makes up the next one.
"""

from __future__ import annotations

import asyncio
from typing import Any

import redis.asyncio as aioredis

_LARGEST = 200  # commands: replies are parsed in one go, and others want the loop, too

Command = tuple[Any, ...]
Waiting = tuple[Command, asyncio.Future[Any]]


class Batches:
    """Over one connection. Commands of one batch are neither atomic nor in a promised order."""

    def __init__(self, connection: aioredis.Redis, seconds: float) -> None:
        self._redis = connection
        self._seconds = seconds  # that Redis has for one batch
        self._waiting: list[Waiting] = []
        self._sender: asyncio.Task[None] | None = None

    async def execute(self, *command: Any) -> Any:
        """The command's reply. Raises what redis-py raises, or TimeoutError."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((command, future))
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send())
        return await future

    async def close(self) -> None:
        """Nobody may be waiting any more."""
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.gather(self._sender, return_exceptions=True)

    async def _send(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:_LARGEST], self._waiting[_LARGEST:]
            wanted = [item for item in batch if not item[1].done()]  # some have hung up
            if not wanted:
                continue
            try:
                replies = await self._replies([command for command, _ in wanted])
            except Exception as error:
                # Whoever came meanwhile has waited as long, and would wait in vain.
                wanted, self._waiting = [*wanted, *self._waiting], []
                replies = [error] * len(wanted)
            except BaseException:  # the loop ends: nobody is left waiting
                for _, future in [*wanted, *self._waiting]:
                    future.cancel()
                raise
            for (_, future), reply in zip(wanted, replies, strict=True):
                _settle(future, reply)

    async def _replies(self, commands: list[Command]) -> list[Any]:
        async with asyncio.timeout(self._seconds):
            pipe = self._redis.pipeline(transaction=False)
            for command in commands:
                pipe.execute_command(*command)
            return await pipe.execute(raise_on_error=False)


def _settle(future: asyncio.Future[Any], reply: Any) -> None:
    if future.done():
        return
    if isinstance(reply, Exception):
        future.set_exception(reply)
    else:
        future.set_result(reply)
