"""What happens to an update: accepted, duplicate, late, refused with the reason, or nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest
from fednano.coordinator import keys
from fednano.coordinator.records import RoundRecord, Tensors
from fednano.coordinator.submission import started_from
from fednano.wire.codec import spec_of
from fednano.wire.coordinator_pb2 import Costs, NextTaskReply, SubmitReply, SubmitRequest
from fednano.wire.errors import BadTensor, FedNanoError, InvalidRequest, SessionEnded
from fednano.wire.tensor_pb2 import BF16, FP16, FP32, INT8

from tests.coordinator.conftest import ADMIN, Running
from tests.coordinator.federation import FakeClient, config_of, same_bytes, step
from tests.redis_server import RedisServer

NAMES = ["image.down", "image.up", "text.down", "text.up"]


class Table:
    """A run of two clients that are both asked to train round 1."""

    def __init__(self, running: Running, clients: list[FakeClient], task: NextTaskReply) -> None:
        self.running = running
        self.one, self.other = clients
        self.task = task
        self.base = self.one.adapter(digest=task.train.adapter)

    def trained(self, client: FakeClient) -> tuple[Tensors, Tensors]:
        return step(self.base, client.id, 1)

    def submit(self, adapter: Tensors, fisher: Tensors, **changes: object) -> SubmitReply:
        base = str(changes.pop("base", self.task.train.adapter))
        return self.one.submit(1, 1, base, adapter, fisher, **changes)

    async def round(self) -> RoundRecord:
        return await self.running.store.round("trial", 1)


async def wait_for_task(client: FakeClient, kind: str) -> NextTaskReply:
    for _ in range(40):
        task = await asyncio.to_thread(client.next_task, 500)
        if task.HasField(kind):
            return task
    raise AssertionError(f"no {kind} task came: {task}")


@pytest.fixture
async def table(coordinator: Running) -> AsyncIterator[Table]:
    config = config_of(clients=2, rounds=2, strategy={"name": "fednano"})
    await coordinator.store.create_run(config, "test")
    clients = [FakeClient(coordinator.port, ADMIN, name) for name in ("c0", "c1")]
    for client in clients:
        for _ in range(40):
            if (await asyncio.to_thread(client.join)).HasField("member"):
                break
            await asyncio.sleep(0.05)
    task = await wait_for_task(clients[0], "train")
    yield await asyncio.to_thread(Table, coordinator, clients, task)
    for client in clients:
        client.close()


async def test_a_good_update_is_accepted_and_a_second_one_is_a_duplicate(table: Table) -> None:
    first = await asyncio.to_thread(table.submit, *table.trained(table.one))
    again = await asyncio.to_thread(table.submit, *table.trained(table.one))
    assert (first.result, again.result) == (SubmitReply.ACCEPTED, SubmitReply.DUPLICATE)
    assert (await table.round()).clients.submitted == ("c0",)
    # What the second one cost was spent all the same.
    assert (await table.running.store.ledger_totals("trial")).sent == {"adapters": 200}


@pytest.mark.parametrize("dtype", [FP16, BF16, INT8])
async def test_smaller_dtypes_are_accepted_too(table: Table, dtype: int) -> None:
    adapter, fisher = table.trained(table.one)
    reply = await asyncio.to_thread(lambda: table.submit(adapter, fisher, dtype=dtype))
    assert reply.result == SubmitReply.ACCEPTED


def without_fisher(adapter: Tensors, fisher: Tensors) -> tuple[Tensors, Tensors, dict]:
    return adapter, {}, {}


def with_nan(adapter: Tensors, fisher: Tensors) -> tuple[Tensors, Tensors, dict]:
    return {**adapter, "text.up": np.full_like(adapter["text.up"], np.nan)}, fisher, {}


def with_negative_fisher(adapter: Tensors, fisher: Tensors) -> tuple[Tensors, Tensors, dict]:
    return adapter, {name: -value for name, value in fisher.items()}, {}


def too_far(adapter: Tensors, fisher: Tensors) -> tuple[Tensors, Tensors, dict]:
    return {**adapter, "text.up": adapter["text.up"] + np.float32(1e6)}, fisher, {}


def misnamed(adapter: Tensors, fisher: Tensors) -> tuple[Tensors, Tensors, dict]:
    return {**adapter, "audio.up": adapter["text.up"]}, fisher, {}


def misshaped(adapter: Tensors, fisher: Tensors) -> tuple[Tensors, Tensors, dict]:
    return {**adapter, "text.up": adapter["text.up"].T}, fisher, {}


def of_whole_numbers(adapter: Tensors, fisher: Tensors) -> tuple[Tensors, Tensors, dict]:
    whole = {"text.up": np.zeros((8, 2), np.int64)}
    specs = [spec_of(name, {**adapter, **whole}[name]) for name in adapter]
    return {**adapter, **whole}, fisher, {"dtype": None, "tensors": specs}


def of_another_base(adapter: Tensors, fisher: Tensors) -> tuple[Tensors, Tensors, dict]:
    return adapter, fisher, {"base": "f" * 64}


def with_another_digest(adapter: Tensors, fisher: Tensors) -> tuple[Tensors, Tensors, dict]:
    return adapter, fisher, {"digest": "0" * 64}


def without_samples(adapter: Tensors, fisher: Tensors) -> tuple[Tensors, Tensors, dict]:
    return adapter, fisher, {"samples": 0}


def with_a_bad_metric(adapter: Tensors, fisher: Tensors) -> tuple[Tensors, Tensors, dict]:
    return adapter, fisher, {"metrics": {"train_loss": float("nan")}}


REFUSALS = {
    without_fisher: f"auxiliary: expected {['fisher.' + n for n in NAMES]}, got none",
    with_nan: "text.up: expected finite numbers, got NaN or infinity",
    with_negative_fisher: "fisher.image.down: expected squares, so 0 or more, got negative numbers",
    too_far: "norm of (update - base): expected at most 10000, got 4e+06",
    misnamed: f"tensors: expected {NAMES}, got {['audio.up', *NAMES]}",
    misshaped: "text.up.shape: expected [8, 2], got [2, 8]",
    of_whole_numbers: "text.up.dtype: expected one of FP32, FP16, BF16, INT8, got INT64",
    of_another_base: f"base: expected the digest BASE, got {'f' * 64}",
    with_another_digest: f"digest: expected {'0' * 64}, got ",
    without_samples: "samples: expected 1 to 1099511627776, got 0",
    with_a_bad_metric: "metrics.train_loss: expected a finite number, got nan",
}


@pytest.mark.parametrize("spoil", REFUSALS, ids=lambda spoil: spoil.__name__)
async def test_a_bad_update_is_refused_with_the_reason(table: Table, spoil) -> None:
    adapter, fisher, changes = spoil(*table.trained(table.one))
    reply = await asyncio.to_thread(lambda: table.submit(adapter, fisher, **changes))
    assert reply.result == SubmitReply.REFUSED
    assert REFUSALS[spoil].replace("BASE", table.task.train.adapter) in reply.reason
    round_ = await table.round()
    assert (round_.clients.refused, round_.clients.submitted) == (("c0",), ())
    events = await table.running.store.events("trial")
    told = [event.data for event in events if event.kind == "update"]
    assert [(data["result"], data["reason"]) for data in told] == [("refused", reply.reason)]


def endless(requests: Iterator[SubmitRequest]) -> Iterator[SubmitRequest]:
    """A client that would send for longer than a call may take."""
    yield next(requests)
    for _ in range(3000):
        time.sleep(0.01)
        yield SubmitRequest(chunk=b"")


@pytest.mark.parametrize(
    "spoil",
    [without_fisher, misnamed, misshaped, of_another_base, without_samples, with_a_bad_metric],
)
async def test_nothing_is_received_for_a_head_that_won_t_do(table: Table, spoil) -> None:
    adapter, fisher, changes = spoil(*table.trained(table.one))
    reply = await asyncio.to_thread(lambda: table.submit(adapter, fisher, parts=endless, **changes))
    assert reply.result == SubmitReply.REFUSED


async def test_nothing_is_received_of_a_client_that_has_submitted(table: Table) -> None:
    await asyncio.to_thread(table.submit, *table.trained(table.one))
    again = lambda: table.submit(*table.trained(table.one), parts=endless)  # noqa: E731
    assert (await asyncio.to_thread(again)).result == SubmitReply.DUPLICATE


async def test_a_tensor_announced_twice_is_refused(table: Table) -> None:
    adapter, fisher = table.trained(table.one)
    specs = [spec_of(name, adapter[name], FP32) for name in [*adapter, "text.up"]]
    reply = await asyncio.to_thread(lambda: table.submit(adapter, fisher, tensors=specs))
    assert reply.reason == "tensors: expected each tensor once, got one of them twice"


async def test_a_long_reason_is_cut_before_it_is_kept(table: Table) -> None:
    adapter, fisher = table.trained(table.one)
    more = {f"x{number}": adapter["text.up"] for number in range(1000)}
    reply = await asyncio.to_thread(lambda: table.submit({**adapter, **more}, fisher))
    assert (len(reply.reason), reply.reason[-3:]) == (500, "...")
    events = await table.running.store.events("trial")
    assert events[-1].data["reason"] == reply.reason


async def test_costs_are_of_rounds_that_were_and_no_more_than_can_be(table: Table) -> None:
    def beat(number: int, **costs: object) -> None:
        table.one.heartbeat(number, costs=Costs(**costs))

    for number, costs in (
        (2, {"client_seconds": 1.0}),
        (1, {"client_seconds": 1e300}),
        (1, {"sent_bytes": {"adapters": 1 << 41}}),
        (1, {"sent_bytes": {"mine": 1 << 40, "yours": 1}}),
    ):
        with pytest.raises(InvalidRequest, match=r"header\.round|costs\."):
            await asyncio.to_thread(lambda n=number, c=costs: beat(n, **c))
    rows, _ = await table.running.store.ledger("trial")
    assert rows == []
    await asyncio.to_thread(lambda: beat(1, sent_bytes={"adapters": 7}))
    assert (await table.round()).bytes == {"adapters": 7}


async def test_a_counter_that_is_full_costs_nobody_an_update(
    table: Table, redis_server: RedisServer
) -> None:
    with redis_server.client() as client:
        client.hset(keys.ledger_totals("trial"), "sent:adapters", 2**63 - 1)
    reply = await asyncio.to_thread(table.submit, *table.trained(table.one))
    assert reply.result == SubmitReply.ACCEPTED
    assert (await table.round()).clients.submitted == ("c0",)


async def test_a_claim_that_fails_midway_claims_nothing(
    table: Table, redis_server: RedisServer
) -> None:
    with redis_server.client() as client:
        client.set(keys.ledger_index("trial"), "damaged")
    with pytest.raises(FedNanoError):
        await asyncio.to_thread(table.submit, *table.trained(table.one))
    assert (await table.round()).clients.submitted == ()
    with redis_server.client() as client:
        assert not client.exists(keys.update("trial", 1, 1, "c0"))


async def test_a_refused_client_may_send_a_better_update(table: Table) -> None:
    adapter, fisher = table.trained(table.one)
    await asyncio.to_thread(lambda: table.submit(adapter, {}))
    reply = await asyncio.to_thread(table.submit, adapter, fisher)
    assert reply.result == SubmitReply.ACCEPTED
    assert (await table.round()).clients.refused == ()


async def test_a_stream_that_ends_early_leaves_nothing(table: Table) -> None:
    def cut(requests: Iterator[SubmitRequest]) -> Iterator[SubmitRequest]:
        yield next(requests)
        chunk = next(requests).chunk
        yield SubmitRequest(chunk=chunk[:-1])

    adapter, fisher = table.trained(table.one)
    with pytest.raises(BadTensor, match="as announced"):
        await asyncio.to_thread(lambda: table.submit(adapter, fisher, parts=cut))
    round_ = await table.round()
    assert (round_.clients.submitted, round_.clients.refused) == ((), ())
    assert (await table.running.store.ledger_totals("trial")).sent == {}


async def test_chunks_without_a_head_are_the_callers_fault(table: Table) -> None:
    def headless(requests: Iterator[SubmitRequest]) -> Iterator[SubmitRequest]:
        next(requests)
        yield from requests

    with pytest.raises(InvalidRequest, match="must be its head"):
        await asyncio.to_thread(lambda: table.submit(*table.trained(table.one), parts=headless))


async def test_an_update_for_an_attempt_that_never_was_is_refused(table: Table) -> None:
    for client in (table.one, table.other):
        await asyncio.to_thread(client.train, await wait_for_task(client, "train"))
    after = await wait_for_task(table.other, "train")
    assert after.train.round == 2
    reply = await asyncio.to_thread(table.submit, *table.trained(table.one))
    assert reply.result == SubmitReply.DUPLICATE  # also once its round is over
    reply = await asyncio.to_thread(
        lambda: table.one.submit(1, 7, table.task.train.adapter, *table.trained(table.one))
    )
    assert (reply.result, reply.reason) == (
        SubmitReply.REFUSED,
        "this client is not in the cohort of that attempt",
    )


async def test_the_merged_adapter_comes_by_round_and_last(table: Table) -> None:
    for client in (table.one, table.other):
        await asyncio.to_thread(client.train, await wait_for_task(client, "train"))
    task = await wait_for_task(table.other, "train")
    by_digest = await asyncio.to_thread(lambda: table.one.adapter(digest=task.train.adapter))
    by_round = await asyncio.to_thread(lambda: table.one.adapter(round=1))
    last = await asyncio.to_thread(lambda: table.one.adapter(last=True))
    assert same_bytes(by_digest, by_round)
    assert same_bytes(by_digest, last)


async def test_a_second_process_with_the_same_id_fences_the_first(table: Table) -> None:
    twin = FakeClient(table.running.port, ADMIN, "c0", run="trial")
    assert (await asyncio.to_thread(twin.join)).HasField("member")
    with pytest.raises(SessionEnded, match="another process joined"):
        await asyncio.to_thread(table.submit, *table.trained(table.one))
    with pytest.raises(SessionEnded):
        await asyncio.to_thread(table.one.heartbeat)
    task = await wait_for_task(twin, "train")
    assert (await asyncio.to_thread(twin.train, task)).result == SubmitReply.ACCEPTED
    twin.close()


async def test_a_heartbeat_says_stop_when_the_run_was_stopped(table: Table) -> None:
    going = await asyncio.to_thread(lambda: table.one.heartbeat(1, 1, progress=0.5, doing="step"))
    assert not going.stop
    record = next(c for c in await table.running.store.clients("trial") if c.id == "c0")
    assert (record.progress, record.doing) == (0.5, "step")
    await table.running.store.command("trial", "stop", "test")
    told = await asyncio.to_thread(lambda: table.one.heartbeat(1, 1))
    assert (told.stop, told.reason) == (True, "the run is stopped")
    finished = await wait_for_task(table.one, "finished")
    assert finished.finished.run_state == "stopped"
    assert (await table.round()).failure == "the run was stopped"


async def test_a_heartbeat_says_stop_when_the_round_has_moved_on(table: Table) -> None:
    told = await asyncio.to_thread(lambda: table.one.heartbeat(1, 2))
    assert (told.stop, told.reason) == (True, "the round has moved on")


def test_what_flora_sends_has_the_adapters_width_even_at_a_rank_above_it() -> None:
    base = {
        "text.down": np.zeros((256, 128), np.float32),
        "text.up": np.zeros((128, 256), np.float32),
    }
    config = config_of(strategy={"name": "flora"}, adapter={"rank": 256, "modalities": ["text"]})
    wanted = started_from(base, config, 0)
    assert {name: tensor.shape for name, tensor in wanted.items()} == {
        "text.down": (256, 128),
        "text.up": (128, 256),
    }
