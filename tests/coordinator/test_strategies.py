"""Merging, against numbers worked by hand and for what must hold for any numbers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import redis
from fednano.coordinator import keys
from fednano.coordinator.records import Tensors
from fednano.coordinator.store import Store
from fednano.coordinator.store_updates import (
    StoredUpdate,
    StoredUpdates,
    UpdateMeta,
    packed_update,
)
from fednano.coordinator.strategies import (
    Adaptive,
    FedAvg,
    FisherMerging,
    Krum,
    Merging,
    ServerOptimizer,
    Span,
    State,
    Update,
    blocks,
    initial_adapter,
    strategy_of,
)
from fednano.wire.errors import InvalidRequest, Unavailable
from fednano.wire.run_config import StrategyConfig, StrategyName
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.redis_server import RedisServer

STRATEGIES = (
    FedAvg(),
    FisherMerging(0.1, scaled=True),
    FisherMerging(0.0, scaled=True),
    FisherMerging(0.0, scaled=False),
)


def update(client: str, samples: int, theta: list[float], fisher: list[float] | None = None):
    auxiliary = {} if fisher is None else {"fisher.text.up": np.array(fisher, np.float32)}
    return Update(client, samples, {"text.up": np.array(theta, np.float32)}, auxiliary)


def merged(strategy: FedAvg | FisherMerging, *updates: Update) -> list[float]:
    return strategy.aggregate(list(updates))["text.up"].tolist()


def test_fedavg_weighs_by_samples() -> None:
    assert merged(FedAvg(), update("a", 1, [0.0, 4.0]), update("b", 3, [4.0, 8.0])) == [3.0, 7.0]


def test_raw_fisher_merges_as_worked_by_hand() -> None:
    # n F theta: a 2*(1,0)*(1,2) = (2,0); b 1*(4,1)*(7,5) = (28,5); weights (2+4, 0+1).
    a, b = update("a", 2, [1, 2], [1, 0]), update("b", 1, [7, 5], [4, 1])
    assert merged(FisherMerging(0.0, scaled=False), a, b) == [5.0, 5.0]


def test_damping_is_added_to_every_fisher_value() -> None:
    # a 1*(1+1)*0 = 0, weight 2; b 1*(5+1)*4 = 24, weight 6.
    a, b = update("a", 1, [0], [1]), update("b", 1, [4], [5])
    assert merged(FisherMerging(1.0, scaled=False), a, b) == [3.0]


def test_scaled_fisher_is_divided_by_its_mean_for_each_client() -> None:
    # a's (1,3) becomes (0.5,1.5), b's (200,200) becomes (1,1): b does not drown a.
    a, b = update("a", 1, [3, 2], [1, 3]), update("b", 1, [0, 7], [200, 200])
    assert merged(FisherMerging(0.0, scaled=True), a, b) == [1.0, 4.0]


def test_where_nobody_has_fisher_the_raw_form_takes_the_weighted_mean() -> None:
    a, b = update("a", 1, [0, 1], [0, 1]), update("b", 3, [4, 9], [0, 0])
    assert merged(FisherMerging(0.0, scaled=False), a, b) == [3.0, 1.0]


def test_a_client_without_images_does_not_pull_the_image_adapter() -> None:
    a, b = update("a", 5, [1, 2], [2, 2]), update("b", 5, [9, 9], [0, 0])
    assert merged(FisherMerging(0.0, scaled=True), a, b) == [1.0, 2.0]


@pytest.mark.parametrize("scaled", [True, False])
def test_the_first_round_has_no_fisher_for_a_and_merges_to_the_mean(scaled: bool) -> None:
    a, b = update("a", 1, [1, 3], [0, 0]), update("b", 1, [3, 5], [0, 0])
    assert merged(FisherMerging(0.0, scaled), a, b) == [2.0, 4.0]
    assert merged(FisherMerging(0.1, scaled), a, b) == pytest.approx([2.0, 4.0])


def test_one_step_of_one_client_merges_to_itself() -> None:
    assert merged(FisherMerging(0.1, True), update("a", 7, [1.5, -2.0], [0, 3])) == [1.5, -2.0]


finite = st.floats(-1e6, 1e6, width=32)
squares = st.floats(0, 2.0**100, width=32)
clients = st.lists(
    st.tuples(
        st.integers(1, 10_000),
        arrays(np.float32, (2, 3), elements=finite),
        arrays(np.float32, (2, 3), elements=squares),
    ),
    min_size=1,
    max_size=4,
)


def as_updates(drawn: list[tuple[int, np.ndarray, np.ndarray]]) -> list[Update]:
    return [
        Update(f"c{index}", samples, {"t": theta}, {"fisher.t": fisher})
        for index, (samples, theta, fisher) in enumerate(drawn)
    ]


@settings(max_examples=60, deadline=None)
@given(clients, st.sampled_from([0.0, 0.1]), st.booleans())
def test_merging_is_never_nan_and_stays_between_the_clients(
    drawn: list[tuple[int, np.ndarray, np.ndarray]], damping: float, scaled: bool
) -> None:
    result = FisherMerging(damping, scaled).aggregate(as_updates(drawn))["t"]
    thetas = np.stack([theta for _, theta, _ in drawn])
    slack = 1e-6 * np.abs(thetas).max() + 1e-30
    assert np.isfinite(result).all()
    assert (result >= thetas.min(axis=0) - slack).all()
    assert (result <= thetas.max(axis=0) + slack).all()


@settings(max_examples=40, deadline=None)
@given(clients, st.booleans())
def test_equal_fisher_is_fedavg(
    drawn: list[tuple[int, np.ndarray, np.ndarray]], scaled: bool
) -> None:
    same = [(samples, theta, np.full((2, 3), 2, np.float32)) for samples, theta, _ in drawn]
    fisher = FisherMerging(0.1, scaled).aggregate(as_updates(same))["t"]
    mean = FedAvg().aggregate(as_updates(same))["t"]
    np.testing.assert_allclose(fisher, mean, rtol=1e-6, atol=1e-30)


@settings(max_examples=40, deadline=None)
@given(clients, st.randoms(use_true_random=False))
def test_the_order_of_updates_does_not_matter(
    drawn: list[tuple[int, np.ndarray, np.ndarray]], random: st.randoms
) -> None:
    updates = as_updates(drawn)
    shuffled = random.sample(updates, len(updates))
    for strategy in (FedAvg(), FisherMerging(0.1, True)):
        one, other = strategy.aggregate(updates)["t"], strategy.aggregate(shuffled)["t"]
        largest = max(float(np.abs(theta).max()) for _, theta, _ in drawn)
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6 * largest + 1e-30)


def in_one_piece(strategy: Merging, updates: list[Update]) -> Tensors:
    """What merging is by definition, tensor by tensor, with everything in memory."""
    samples = sum(update.samples for update in updates)
    merged = {}
    for name in updates[0].adapter:
        plain = [u.samples * u.adapter[name].astype(np.float64) for u in updates]
        result = summed(plain) / samples
        if isinstance(strategy, FisherMerging):
            weights = [
                u.samples * importance(strategy, u.auxiliary["fisher." + name]) for u in updates
            ]
            products = [
                w * u.adapter[name].astype(np.float64)
                for w, u in zip(weights, updates, strict=True)
            ]
            safe = summed(weights) > 0
            quotient = summed(products) / np.where(safe, summed(weights), 1)
            result = np.where(safe, quotient, result)
        merged[name] = result.astype(np.float32)
    return merged


def importance(strategy: FisherMerging, fisher: np.ndarray) -> np.ndarray:
    values = fisher.astype(np.float64)
    if strategy.scaled:
        values = values / values.mean() if values.mean() > 0 else np.zeros_like(values)
    return values + strategy.damping


def summed(values: list[np.ndarray]) -> np.ndarray:
    total = values[0].copy()
    for value in values[1:]:
        total += value
    return total


def drawn_updates(count: int, seed: int = 0) -> list[Update]:
    """Three tensors of odd sizes, with zeros of both signs and one Fisher that is all zero."""
    rng = np.random.default_rng(seed)
    shapes = {"image.down": (3, 50), "image.up": (50, 3), "text.up": (7, 11, 2)}
    updates = []
    for index in range(count):
        adapter = {
            name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()
        }
        fisher = {f"fisher.{n}": rng.gamma(0.3, 1, s).astype(np.float32) for n, s in shapes.items()}
        adapter["text.up"][0] = -0.0
        fisher["fisher.image.up"][:, 0] = 0
        if index == 1:
            fisher["fisher.image.down"][:] = 0
        updates.append(Update(f"c{index}", int(rng.integers(1, 99)), adapter, fisher))
    return updates


def same_bytes(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(
        (one[name].shape, one[name].tobytes()) == (other[name].shape, other[name].tobytes())
        for name in one
    )


@pytest.mark.parametrize("block", [1, 100, 151, 1 << 20])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_merging_by_blocks_gives_the_bytes_of_merging_in_one_piece(
    strategy: Merging, block: int
) -> None:
    updates = drawn_updates(4)
    assert same_bytes(strategy.aggregate(updates, block), in_one_piece(strategy, updates))


@pytest.mark.parametrize("strategy", [FedAvg(), FisherMerging(0.1, True), FisherMerging(0.0, True)])
@pytest.mark.parametrize("count", [64, 77])
def test_the_mean_of_many_is_as_exact_as_its_result(strategy: Merging, count: int) -> None:
    """It adds up some of them in float32; with 77 the last group is not a whole one."""
    updates = drawn_updates(count)
    updates[3].auxiliary["fisher.text.up"][:] *= np.float32(1e-38)  # its mean is no normal float32
    whole, blocks = (strategy.aggregate(updates, block) for block in (1 << 16, 100))
    assert same_bytes(whole, blocks)
    for name, exact in in_one_piece(strategy, updates).items():
        largest = max(np.abs(update.adapter[name]).max() for update in updates)
        np.testing.assert_allclose(whole[name], exact, rtol=0, atol=2e-7 * largest)


def test_blocks_cover_every_element_once_and_cross_tensors() -> None:
    found = [list(block) for block in blocks({"b": (2, 3), "a": (4,)}, 5)]
    assert found == [[Span("a", 0, 4), Span("b", 0, 1)], [Span("b", 1, 6)]]


PLACE = ("trial", 1, 1)


async def stored(store: Store, updates: list[Update]) -> dict[str, UpdateMeta]:
    """The updates in Redis, as they lie there once they were accepted."""
    accepted = {}
    for update in updates:
        tensors = {**update.adapter, **update.auxiliary}
        meta = UpdateMeta(update.samples, auxiliary=list(update.auxiliary))
        accepted[update.client], data = packed_update(tensors, meta)
        await store.database.call("SET", keys.update(*PLACE, update.client), data)
    return accepted


@pytest.mark.parametrize("block", [100, 151, 1 << 18])
@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_what_redis_holds_merges_to_the_same_bytes(
    store: Store, strategy: Merging, block: int
) -> None:
    updates = drawn_updates(4)
    accepted = await stored(store, updates)
    with store.updates.reading(*PLACE, accepted) as readable:
        merged = await asyncio.to_thread(strategy.aggregate, readable, block)
    assert same_bytes(merged, in_one_piece(strategy, updates))


async def test_a_mean_that_was_not_kept_is_computed(store: Store) -> None:
    """An update that an earlier version accepted."""
    updates = drawn_updates(3)
    accepted = {c: replace(m, means={}) for c, m in (await stored(store, updates)).items()}
    strategy = FisherMerging(0.1, scaled=True)
    with store.updates.reading(*PLACE, accepted) as readable:
        merged = await asyncio.to_thread(strategy.aggregate, readable, 100)
    assert same_bytes(merged, in_one_piece(strategy, updates))


async def test_an_update_is_read_in_ranges_and_never_whole(
    store: Store, redis_server: RedisServer
) -> None:
    accepted = await stored(store, drawn_updates(3))
    with redis_server.client() as watcher, watcher.monitor() as monitor:
        with store.updates.reading(*PLACE, accepted) as readable:
            await asyncio.to_thread(FisherMerging(0.1, True).aggregate, readable, 200)
        asked = [line.split() for line in commands(monitor, watcher)]
    reads = [(int(c[2]), int(c[3])) for c in asked if c[0] == "GETRANGE"]
    assert max(stop + 1 - start for start, stop in reads) == 200 * 4
    assert len(reads) == 3 * 3 * 2  # 454 elements are 3 blocks; of 3 clients, adapter and Fisher
    assert not [c for c in asked if c[0] == "GET"]


def commands(monitor: redis.client.Monitor, watcher: redis.Redis) -> list[str]:
    """What was asked of Redis since the monitor began."""
    watcher.echo("the end")
    found = []
    for line in monitor.listen():
        if line["command"] == "ECHO the end":
            return found
        found.append(line["command"])
    raise AssertionError("the monitor ended")


async def test_an_expired_update_is_told_by_its_client(store: Store) -> None:
    accepted = await stored(store, drawn_updates(2))
    await store.database.call("DEL", keys.update(*PLACE, "c1"))
    expected = pytest.raises(InvalidRequest, match="the update of 'c1'")
    with store.updates.reading(*PLACE, accepted) as readable, expected:
        await asyncio.to_thread(FedAvg().aggregate, readable)


async def test_a_merge_that_nobody_waits_for_ends(store: Store) -> None:
    """A coordinator that is stopped doesn't wait for a large one."""
    accepted = await stored(store, drawn_updates(3))
    with store.updates.reading(*PLACE, accepted) as readable:
        merging = asyncio.create_task(asyncio.to_thread(FedAvg().aggregate, Slowly(readable), 1))
        await asyncio.sleep(0.1)
        readable.stop()
        with pytest.raises(Unavailable, match="given up"):
            await asyncio.wait_for(merging, 5)


class Slowly:
    """Updates that would be merged for minutes."""

    def __init__(self, updates: StoredUpdates) -> None:
        self._updates = updates

    def __iter__(self) -> Iterator[StoredUpdate]:
        for update in self._updates:
            time.sleep(0.05)
            yield update


def test_the_configuration_chooses_the_strategy() -> None:
    assert strategy_of(StrategyConfig(name="fedavg")) == FedAvg()
    raw = strategy_of(StrategyConfig(name="fednano", fisher="raw", damping=0.5))
    assert raw == FisherMerging(0.5, scaled=False)
    assert raw.auxiliary(["text.up"]) == ("fisher.text.up",)
    assert strategy_of(StrategyConfig(name="multi-krum", byzantine=2, selected=3)) == Krum(2, 3)
    adam = Adaptive("fedadam", 0.01, 1e-3, 0.5, 0.99)
    assert strategy_of(StrategyConfig(name="fedadam", momentum=0.5)) == ServerOptimizer(adam)


@pytest.mark.parametrize("name", get_args(StrategyName))
def test_every_strategy_advances_a_first_round_by_any_blocks_to_the_same_bytes(name: str) -> None:
    strategy = strategy_of(StrategyConfig(name=name))
    rng = np.random.default_rng(1)
    before = initial_adapter(("image", "text"), 3, 10, seed=0)
    updates = [
        Update(
            f"c{number}",
            number + 1,
            {n: (t + rng.normal(0, 0.1, t.shape)).astype(np.float32) for n, t in before.items()},
            {
                f"{kind}.{n}": rng.gamma(1, 1, t.shape).astype(np.float32)
                for kind in ("fisher", "control")
                for n, t in before.items()
            },
        )
        for number in range(6)
    ]
    whole = strategy.advance(State(before), updates)
    for block in (1, 7, 64):
        parts = strategy.advance(State(before), updates, block)
        assert same_bytes(whole.adapter, parts.adapter)
        assert same_bytes(whole.moments, parts.moments)
    if name != "flora":  # whose rank grows
        shapes = {n: t.shape for n, t in before.items()}
        assert {n: t.shape for n, t in whole.adapter.items()} == shapes
    assert whole.adapter["text.up"].any()


def test_the_first_adapter_changes_nothing_and_depends_on_seed_and_modality_alone() -> None:
    one = initial_adapter(("image", "text"), 4, 16, seed=3)
    other = initial_adapter(("text",), 4, 16, seed=3)
    assert sorted(one) == ["image.down", "image.up", "text.down", "text.up"]
    assert one["text.up"].shape == (16, 4)
    assert not one["text.up"].any()
    assert np.abs(one["text.down"]).max() <= 0.25
    assert (one["text.down"] == other["text.down"]).all()
    assert (one["text.down"] != one["image.down"]).any()
