"""What a client reports to a real coordinator: all of it, once, in the round where it was spent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from fednano.client.coordination import CoordinatorClient, Membership
from fednano.coordinator.records import LedgerRow
from fednano.coordinator.server import CoordinatorServer
from fednano.wire import coordinator_pb2 as pb
from fednano.wire.errors import Unavailable

from tests.coordinator.conftest import ADMIN, settings_of
from tests.coordinator.federation import FINGERPRINT, HIDDEN, config_of
from tests.redis_server import RedisServer


class Site:
    """A client of a run of its own, and the coordinator's store."""

    def __init__(self, server: CoordinatorServer, port: int) -> None:
        self.store, self.metrics = server.store, server.metrics
        self.client = CoordinatorClient(f"127.0.0.1:{port}", ADMIN, "ward", retry_seconds=3)
        self.meter = self.client.meter

    def join(self) -> None:
        who = {"header": self.client.header(), "fingerprint": FINGERPRINT, "hidden_size": HIDDEN}
        request = pb.JoinRequest(role=pb.TRAINER, **who)
        while (joined := self.client.join(request)).WhichOneof("outcome") != "member":
            time.sleep(0.05)
        reply = joined.member
        self.member = Membership(reply.run, reply.session, config_of(), "", 0, 1)
        while (task := self.client.next_task(self.member, 1000)).WhichOneof("task") != "train":
            pass
        self.task = task.train

    def beat(self, task: pb.TrainTask | None = None) -> None:
        self.client.heartbeat(self.member, task, 0.0, "", report=True)

    def submit(self, **tensors: np.ndarray) -> pb.SubmitReply:
        header = self.client.header(self.member, self.task)
        head = pb.SubmitHead(header=header, base=self.task.adapter, samples=1)
        base = self.client.adapter(pb.GetAdapterRequest(header=header, digest=head.base))
        return self.client.submit(head, {**base.tensors, **tensors}, {})

    async def row(self) -> LedgerRow:
        """Of the first round."""
        (row,), _ = await self.store.ledger("trial", number=1)
        return row

    def seen_by_prometheus(self, kind: str) -> Any:
        labels = {"kind": kind, "direction": "sent"}
        return self.metrics.registry.get_sample_value("fednano_bytes_total", labels)


@pytest.fixture
async def site(redis_server: RedisServer) -> AsyncIterator[Site]:
    server = CoordinatorServer(settings_of(redis_server.url))
    ports = await server.start()
    config = config_of(clients=1, min_clients=1, rounds=1, strategy={"name": "fedavg"})
    await server.store.create_run(config, "test")
    found = Site(server, ports.grpc)
    await asyncio.to_thread(found.join)
    yield found
    found.client.close()
    await server.stop()


async def test_refused_updates_cost_as_much_as_accepted_ones(site: Site) -> None:
    broken = {"text.up": np.full((HIDDEN, 2), np.nan, np.float32)}
    first = await asyncio.to_thread(lambda: site.submit(**broken))
    again = await asyncio.to_thread(lambda: site.submit(**broken))
    assert first.result == again.result == pb.SubmitReply.REFUSED
    await asyncio.to_thread(site.beat)
    size = sum(t.nbytes for t in (await site.store.adapter_of_round("trial", 0)).tensors.values())
    row = await site.row()
    assert (row.sent_bytes["adapters"], row.received_bytes["adapters"]) == (2 * size, 2 * size)
    assert site.seen_by_prometheus("adapters") == row.sent_bytes["adapters"]
    assert row.client_seconds > 0


async def test_costs_that_were_counted_but_not_answered_count_once(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    beat = site.store.members.beat

    async def cut(*arguments: Any) -> bool:
        await beat(*arguments)
        raise Unavailable("cut off")

    site.meter.add("sent", "embeddings", 1000)
    with monkeypatch.context() as patch:
        patch.setattr(site.store.members, "beat", cut)
        with pytest.raises(Unavailable):
            await asyncio.to_thread(site.beat)
    site.meter.add("sent", "embeddings", 100)
    for _ in range(3):
        await asyncio.to_thread(site.beat, site.task)
    assert (await site.row()).sent_bytes["embeddings"] == 1100


async def test_a_submission_that_never_arrived_is_told_of_later(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: Any) -> None:
        raise Unavailable("away")

    site.meter.add("sent", "embeddings", 1000)
    with monkeypatch.context() as patch:
        patch.setattr(site.store.updates, "claim", away)
        with pytest.raises(Unavailable):
            await asyncio.to_thread(site.submit)
    await asyncio.to_thread(site.beat, site.task)
    size = sum(t.nbytes for t in (await site.store.adapter_of_round("trial", 0)).tensors.values())
    sent = (await site.row()).sent_bytes
    assert sent["embeddings"] == 1000
    assert sent["adapters"] >= 2 * size  # every try


async def test_an_ended_run_s_costs_are_not_the_next_one_s(site: Site) -> None:
    site.meter.add("sent", "embeddings", 1000)
    site.client.forget_costs()
    await asyncio.to_thread(site.beat)
    assert "embeddings" not in (await site.row()).sent_bytes
