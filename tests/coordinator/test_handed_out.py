"""What clients get beside the adapter, and what must come back: controls, and ranks of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import numpy as np
import pytest
from fednano.coordinator.records import Tensors
from fednano.wire.coordinator_pb2 import NextTaskReply, SubmitReply
from fednano.wire.errors import NotFound

from tests.coordinator.conftest import ADMIN, Running
from tests.coordinator.federation import FakeClient, config_of, work
from tests.coordinator.test_submit import wait_for_task

Seats = list[tuple[FakeClient, NextTaskReply]]


@pytest.fixture
async def seated(coordinator: Running) -> AsyncIterator[Callable[..., Awaitable[Seats]]]:
    """Opens a run of two clients, who are then asked to train round 1."""
    clients = [FakeClient(coordinator.port, ADMIN, name) for name in ("c0", "c1")]

    async def seat(**changes: object) -> Seats:
        await coordinator.store.create_run(config_of(clients=2, rounds=3, **changes), "test")
        for client in clients:
            for _ in range(40):
                if (await asyncio.to_thread(client.join)).HasField("member"):
                    break
                await asyncio.sleep(0.05)
        return [(client, await wait_for_task(client, "train")) for client in clients]

    yield seat
    for client in clients:
        client.close()


def send(
    client: FakeClient, task: NextTaskReply, change: Callable[[Tensors], Tensors]
) -> SubmitReply:
    """A round's update whose auxiliary tensors are changed before."""
    base = client.adapter(digest=task.train.adapter)
    place = client.id, task.train.round, task.train.rank
    adapter, auxiliary = work(client.config, base, {}, *place)
    place = task.train.round, task.train.attempt, task.train.adapter
    return client.submit(*place, adapter, change(auxiliary))


async def test_a_control_may_be_negative_but_not_absurd(
    seated: Callable[..., Awaitable[Seats]],
) -> None:
    (client, task), _ = await seated(strategy={"name": "scaffold"})
    huge = lambda controls: {n: t * np.float32(1e6) for n, t in controls.items()}  # noqa: E731
    reply = await asyncio.to_thread(send, client, task, huge)
    assert reply.result == SubmitReply.REFUSED
    assert reply.reason.startswith("norm of control.*: expected at most 10000, got ")
    reply = await asyncio.to_thread(send, client, task, lambda controls: controls)
    assert reply.result == SubmitReply.ACCEPTED


async def test_what_was_handed_out_is_gone_once_its_round_is_merged(
    seated: Callable[..., Awaitable[Seats]],
) -> None:
    seats = await seated(strategy={"name": "scaffold"})
    assert [list(task.train.auxiliary) for _, task in seats] == [[], []]  # c is 0
    digests = []
    for number in (2, 3):
        for client, task in seats:
            await asyncio.to_thread(client.train, task)
        seats = [(client, await wait_for_task(client, "train")) for client, _ in seats]
        client, task = seats[0]
        assert task.train.round == number
        digests += task.train.auxiliary
        handed = await asyncio.to_thread(lambda: client.adapter(digest=digests[-1]))  # noqa: B023
        assert sorted(handed) == [f"control.{n}" for n in ("image.down", "image.up", "text.down",
                                                           "text.up")]  # fmt: skip
    assert len(set(digests)) == 2
    with pytest.raises(NotFound, match="no adapter with the digest"):
        await asyncio.to_thread(lambda: client.adapter(digest=digests[0]))


async def test_a_client_sends_an_adapter_of_its_own_rank(
    seated: Callable[..., Awaitable[Seats]],
) -> None:
    ranks = {"rank": 2, "ranks": [1, 2]}
    (small, task), (large, other) = await seated(strategy={"name": "product"}, adapter=ranks)
    assert (task.train.rank, other.train.rank) == (1, 2)
    small.fisher = large.fisher = False
    reply = await asyncio.to_thread(small.train, other)
    assert reply.result == SubmitReply.REFUSED
    assert "shape: expected [1, 8], got [2, 8]" in reply.reason
    for client, its in ((small, task), (large, other)):
        assert (await asyncio.to_thread(client.train, its)).result == SubmitReply.ACCEPTED
