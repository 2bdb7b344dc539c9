"""Median, trimmed mean and Krum: against their definitions, and against somebody who lies."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from fednano.coordinator.records import Tensors
from fednano.coordinator.store import Store
from fednano.coordinator.strategies import FedAvg, Krum, Median, Merging, Span, TrimmedMean, Update
from fednano.wire.errors import InvalidRequest
from scipy.stats import trim_mean

from tests.coordinator.test_strategies import PLACE, commands, drawn_updates, same_bytes, stored
from tests.redis_server import RedisServer

ROBUST = (Median(), TrimmedMean(0.2), Krum(1), Krum(1, 0), Krum(2, 3))


def of(*thetas: list[float]) -> list[Update]:
    return [Update(f"c{n}", 1, {"t": np.array(t, np.float32)}, {}) for n, t in enumerate(thetas)]


def flat(adapter: Tensors) -> np.ndarray:
    return np.concatenate([adapter[name].reshape(-1) for name in sorted(adapter)])


def test_the_median_is_the_middle_one_or_the_mean_of_the_middle_two() -> None:
    odd, even = of([1, 8], [9, 3], [2, -5]), of([1], [9], [4], [2])
    assert Median().aggregate(odd)["t"].tolist() == [2, 3]
    assert Median().aggregate(even)["t"].tolist() == [3]


def test_the_trimmed_mean_leaves_whole_updates_out_at_either_end() -> None:
    seven = of([1], [2], [3], [4], [5], [60], [-700])
    assert TrimmedMean(0.2).aggregate(seven)["t"].tolist() == [3]  # 1 of 7
    assert TrimmedMean(0.4).aggregate(seven)["t"].tolist() == [3]  # 2 of 7: 2, 3, 4
    assert TrimmedMean(0.1).aggregate(seven)["t"].tolist() == [np.float32(-625 / 7)]  # none


@pytest.mark.parametrize("count", [5, 6, 11])
def test_elements_are_ordered_as_numpy_and_scipy_do(count: int) -> None:
    updates = drawn_updates(count)
    thetas = np.stack([flat(update.adapter) for update in updates]).astype(np.float64)
    median = flat(Median().aggregate(updates, 100))
    np.testing.assert_allclose(median, np.median(thetas, axis=0), rtol=1e-7)
    trimmed = flat(TrimmedMean(0.2).aggregate(updates, 100))
    np.testing.assert_allclose(trimmed, trim_mean(thetas, 0.2, axis=0), rtol=1e-6, atol=1e-9)


def krum_by_definition(updates: list[Update], f: int, m: int) -> np.ndarray:
    thetas = [flat(update.adapter).astype(np.float64) for update in updates]
    scores = []
    for one in range(len(thetas)):
        apart = [np.sum((thetas[one] - t) ** 2) for n, t in enumerate(thetas) if n != one]
        scores.append(sum(sorted(apart)[: len(thetas) - f - 2]))
    best = sorted(range(len(thetas)), key=scores.__getitem__)[:m]
    return np.mean([thetas[index] for index in best], axis=0)


@pytest.mark.parametrize(("f", "m"), [(1, 1), (2, 1), (1, 4), (3, 6)])
def test_krum_chooses_as_its_definition_does(f: int, m: int) -> None:
    for seed in range(5):
        updates = drawn_updates(9, seed)
        chosen = flat(Krum(f, m).aggregate(updates, 151))
        np.testing.assert_allclose(chosen, krum_by_definition(updates, f, m), rtol=1e-6)


def test_krum_hands_on_one_update_as_it_came() -> None:
    updates = drawn_updates(5)
    merged = Krum(1).aggregate(updates)
    assert [same_bytes(merged, update.adapter) for update in updates].count(True) == 1


def test_of_equal_scores_krum_takes_the_first() -> None:
    # The two nearest others of 1 are at 1 and 1, and so are those of 2.
    assert Krum(1).aggregate(of([0.0], [1.0], [2.0], [3.0], [90.0]))["t"].tolist() == [1.0]


@pytest.mark.parametrize(("krum", "least"), [(Krum(1), 5), (Krum(2), 7), (Krum(1, 8), 9)])
def test_krum_of_too_few_is_refused_with_the_number_it_takes(krum: Krum, least: int) -> None:
    krum.aggregate(drawn_updates(least))
    with pytest.raises(InvalidRequest, match=rf"updates: expected at least {least} .* got"):
        krum.aggregate(drawn_updates(least - 1))


@pytest.mark.parametrize("strategy", ROBUST)
def test_a_claimed_number_of_samples_gives_no_weight(strategy: Merging) -> None:
    updates = drawn_updates(7)
    boast = [Update(u.client, 10**9, u.adapter, {}) if n == 3 else u for n, u in enumerate(updates)]
    assert same_bytes(strategy.aggregate(updates), strategy.aggregate(boast))


def attacked(how: float) -> tuple[list[Update], np.ndarray]:
    """Ten clients that nearly agree on a step, two of which turn it round and stretch it."""
    rng = np.random.default_rng(4)
    honest = [rng.normal(1, 0.1, 400) for _ in range(10)]
    sent = [step * how if number in (0, 6) else step for number, step in enumerate(honest)]
    return of(*(step.tolist() for step in sent)), np.mean(honest, axis=0)


@pytest.mark.parametrize("how", [-1.0, -100.0, 100.0])
@pytest.mark.parametrize(
    "strategy", [Median(), TrimmedMean(0.2), Krum(2), Krum(2, 0)], ids=["median", "trim", "1", "m"]
)
def test_two_liars_of_ten_move_the_mean_far_and_a_robust_strategy_little(
    strategy: Merging, how: float
) -> None:
    updates, honest = attacked(how)
    error = np.sqrt(np.mean((strategy.aggregate(updates)["t"] - honest) ** 2))
    fooled = np.sqrt(np.mean((FedAvg().aggregate(updates)["t"] - honest) ** 2))
    assert fooled > 0.39  # 2 of 10 steps of 1, turned to -1
    assert error < 0.15  # an honest step is 0.1 from the mean itself


@dataclass(frozen=True)
class Watched(Update):
    """Tells how much was asked for at a time."""

    asked: list[int] = field(default_factory=list)

    def read(self, spans: Sequence[Span]) -> Sequence[np.ndarray]:
        self.asked.append(sum(span.stop - span.start for span in spans))
        return super().read(spans)


@pytest.mark.parametrize("strategy", [Median(), Krum(1)])
def test_the_more_updates_the_less_of_each_is_held(strategy: Merging) -> None:
    theta, asked = {"t": np.arange(70_000, dtype=np.float32)}, []
    updates = [Watched(f"c{n}", 1, theta, {}, asked=asked) for n in range(150)]
    assert (strategy.aggregate(updates, 1 << 20)["t"] == theta["t"]).all()
    assert max(asked[:150]) * 150 <= 1 << 23  # what Krum chose is averaged one by one


@pytest.mark.parametrize("strategy", ROBUST)
async def test_what_redis_holds_is_judged_alike_and_read_in_ranges(
    store: Store, redis_server: RedisServer, strategy: Merging
) -> None:
    updates = drawn_updates(7)
    accepted = await stored(store, updates)
    with redis_server.client() as watcher, watcher.monitor() as monitor:
        with store.updates.reading(*PLACE, accepted) as readable:
            merged = await asyncio.to_thread(strategy.aggregate, readable, 100)
        asked = [line.split() for line in commands(monitor, watcher)]
    assert same_bytes(merged, strategy.aggregate(updates))
    assert "GETRANGE" in {line[0] for line in asked}
    assert "GET" not in {line[0] for line in asked}
