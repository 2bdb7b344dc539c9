"""Strategies that average products of low rank, against whole [d, d] matrices."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from fednano.coordinator.records import Tensors
from fednano.coordinator.strategies import (
    FrozenDown,
    ProductMean,
    Stack,
    State,
    Update,
    initial_adapter,
)

from tests.coordinator.test_strategies import same_bytes

D = 24


def client(number: int, rank: int, samples: int = 1) -> Update:
    rng = np.random.default_rng([7, number])
    adapter = {
        "text.down": rng.normal(0, 1, (rank, D)).astype(np.float32),
        "text.up": rng.normal(0, 1, (D, rank)).astype(np.float32),
    }
    return Update(f"c{number}", samples, adapter, {})


def start(rank: int) -> State:
    return State(initial_adapter(("text",), rank, D, seed=0))


def product(adapter: Tensors) -> np.ndarray:
    return adapter["text.up"].astype(np.float64) @ adapter["text.down"]


def mean_product(updates: list[Update]) -> np.ndarray:
    total = sum(update.samples for update in updates)
    return sum(update.samples / total * product(update.adapter) for update in updates)


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@pytest.mark.parametrize("clients", [1, 3, 30], ids="{} clients".format)
def test_the_mean_of_products_is_cut_to_its_largest_parts(clients: int) -> None:
    # 30 clients' ranks are more than 2 d together, which has to be condensed on the way.
    updates = [client(n, rank=2 + n % 3, samples=1 + n) for n in range(clients)]
    merged = ProductMean().advance(start(4), updates).adapter
    assert (merged["text.down"].shape, merged["text.up"].shape) == ((4, D), (D, 4))
    wanted = truncated(mean_product(updates), 4)
    np.testing.assert_allclose(product(merged), wanted, rtol=1e-5, atol=1e-5)


def test_many_clients_take_no_more_memory_than_some() -> None:
    peaks = []
    for count in (60, 600):
        updates = [client(0, 4)] * count
        tracemalloc.start()
        ProductMean().advance(start(4), updates)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_products_that_fit_the_rank_are_averaged_exactly() -> None:
    updates = [client(0, 2, samples=3), client(1, 2)]
    merged = ProductMean().advance(start(4), updates).adapter
    np.testing.assert_allclose(product(merged), mean_product(updates), rtol=1e-5, atol=1e-6)
    apart = {name: np.mean([u.adapter[name] for u in updates], axis=0) for name in merged}
    assert np.abs(product(apart) - mean_product(updates)).max() > 1  # what merging A and B would do


def test_rows_of_a_without_a_singular_value_stay_what_they_were() -> None:
    before = start(4)
    merged = ProductMean().advance(before, [client(0, 3)]).adapter
    assert (merged["text.down"][3] == before.adapter["text.down"][3]).all()
    assert not merged["text.up"][:, 3].any()
    untouched = Update("c", 5, before.adapter, {})  # B is still 0
    assert same_bytes(ProductMean().advance(before, [untouched]).adapter, before.adapter)


def test_rows_of_a_have_length_one_and_a_positive_largest_element() -> None:
    down = ProductMean().advance(start(4), [client(n, 4) for n in range(3)]).adapter["text.down"]
    np.testing.assert_allclose(np.linalg.norm(down, axis=1), 1, rtol=1e-6)
    assert (np.abs(down).max(axis=1) == down.max(axis=1)).all()


@pytest.mark.parametrize(("clients", "ranks"), [(3, [4, 8]), (12, [18, D])], ids=["few", "many"])
def test_a_stack_adds_the_mean_of_products_exactly_and_its_rank_ends_at_d(
    clients: int, ranks: list[int]
) -> None:
    """Clients have ranks 1 and 2 in turn; the adapter before any training adds none."""
    state, wanted = start(4), np.zeros((D, D))
    for number, rank in enumerate(ranks):
        updates = [client(n + 20 * number, 1 + n % 2, n + 1) for n in range(clients)]
        state = Stack().advance(state, updates)
        wanted += mean_product(updates)
        np.testing.assert_allclose(product(state.adapter), wanted, rtol=1e-4, atol=1e-4)
        assert state.adapter["text.down"].shape == (rank, D)
        assert state.adapter["text.up"].shape == (D, rank)


def test_no_client_can_read_anothers_factors_out_of_a_stack() -> None:
    updates = [client(n, 2) for n in range(3)]
    rows = Stack().advance(start(4), updates).adapter["text.down"]
    theirs = np.concatenate([update.adapter["text.down"] for update in updates])
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    alike = np.abs(theirs @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T)
    assert alike.max() < 0.99


def test_a_stack_above_its_limit_loses_its_smallest_parts() -> None:
    updates = [client(n, 4) for n in range(3)]
    adapter = Stack(most=5).advance(start(4), updates).adapter
    assert adapter["text.down"].shape == (5, D)
    wanted = truncated(mean_product(updates), 5)
    np.testing.assert_allclose(product(adapter), wanted, rtol=1e-4, atol=1e-4)


def test_a_stack_of_nothing_is_an_adapter_that_does_nothing() -> None:
    """Where nobody has data of a modality."""
    idle = Update("c", 1, start(4).adapter, {})
    adapter = Stack().advance(start(4), [idle]).adapter
    assert adapter["text.down"].shape == (1, D)
    assert not adapter["text.up"].any()


def test_with_a_frozen_the_product_of_means_is_the_mean_of_products() -> None:
    before = start(4)
    own = {"text.down": before.adapter["text.down"]}
    updates = [client(n, 4, samples=n + 1) for n in range(3)]
    updates = [Update(u.client, u.samples, u.adapter | own, {}) for u in updates]
    merged = FrozenDown().advance(before, updates).adapter
    np.testing.assert_allclose(product(merged), mean_product(updates), rtol=1e-5, atol=1e-6)


def test_a_client_that_changed_a_frozen_factor_changes_nothing() -> None:
    before, updates = start(4), [client(0, 4), client(1, 4)]
    merged = FrozenDown().advance(before, updates).adapter
    assert (merged["text.down"] == before.adapter["text.down"]).all()
    means = np.mean([update.adapter["text.up"] for update in updates], axis=0)
    np.testing.assert_allclose(merged["text.up"], means, rtol=1e-6)
