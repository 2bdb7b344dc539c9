"""Merging, against numbers worked by hand and for what must hold for any numbers."""

from __future__ import annotations

import numpy as np
import pytest
from fednano.coordinator.strategies import (
    FedAvg,
    FisherMerging,
    Update,
    initial_adapter,
    strategy_of,
)
from fednano.wire.run_config import StrategyConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays


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


def test_the_configuration_chooses_the_strategy() -> None:
    assert isinstance(strategy_of(StrategyConfig(name="fedavg")), FedAvg)
    raw = strategy_of(StrategyConfig(name="fednano", fisher="raw", damping=0.5))
    assert raw == FisherMerging(0.5, scaled=False)
    assert raw.auxiliary(["text.up"]) == ("fisher.text.up",)


def test_the_first_adapter_changes_nothing_and_depends_on_seed_and_modality_alone() -> None:
    one = initial_adapter(("image", "text"), 4, 16, seed=3)
    other = initial_adapter(("text",), 4, 16, seed=3)
    assert sorted(one) == ["image.down", "image.up", "text.down", "text.up"]
    assert one["text.up"].shape == (16, 4)
    assert not one["text.up"].any()
    assert np.abs(one["text.down"]).max() <= 0.25
    assert (one["text.down"] == other["text.down"]).all()
    assert (one["text.down"] != one["image.down"]).any()
