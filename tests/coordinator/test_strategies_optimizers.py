"""Server optimisers, against numbers worked by hand and the papers' algorithms on plain numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from fednano.coordinator.strategies import (
    Adaptive,
    FedAvg,
    FedAvgM,
    FisherMerging,
    Median,
    ServerOptimizer,
    State,
    Update,
)
from safetensors.numpy import load, save

from tests.coordinator.test_strategies import drawn_updates, same_bytes

ALL = (
    FedAvgM(0.9),
    Adaptive("fedadagrad", 0.1, 1e-3),
    Adaptive("fedadam", 0.1, 1e-3, 0.9, 0.99),
    Adaptive("fedyogi", 0.1, 1e-3, 0.9, 0.99),
)


def towards(target: float) -> list[Update]:
    return [Update("a", 1, {"t": np.array([target], np.float32)}, {})]


def at(value: float) -> State:
    return State({"t": np.array([value], np.float32)})


def test_fedavgm_keeps_moving_where_it_moved_before() -> None:
    strategy = ServerOptimizer(FedAvgM(0.5))
    one = strategy.advance(at(1), towards(3))  # v = 2
    assert (one.adapter["t"].item(), one.moments["momentum.t"].item()) == (3, 2)
    two = strategy.advance(one, towards(4))  # v = 0.5 * 2 + 1
    assert (two.adapter["t"].item(), two.moments["momentum.t"].item()) == (5, 2)


def test_without_momentum_fedavgm_is_fedavg() -> None:
    updates, strategy = drawn_updates(3), ServerOptimizer(FedAvgM(0.0))
    zero = State({name: np.zeros_like(t) for name, t in updates[0].adapter.items()})
    merged = FedAvg().aggregate(updates)
    found = strategy.advance(zero, updates).adapter
    assert all((found[name] == merged[name]).all() for name in merged)


def by_the_paper(rule: Adaptive, targets: list[float]) -> float:
    """Algorithm 2 of "Adaptive Federated Optimization" for one number."""
    x, m, v = 0.0, 0.0, rule.adaptivity**2
    for target in targets:
        delta = target - x
        m = rule.momentum * m + (1 - rule.momentum) * delta
        if rule.kind == "fedadagrad":
            v = v + delta**2
        elif rule.kind == "fedyogi":
            v = v - (1 - rule.second_momentum) * delta**2 * math.copysign(1, v - delta**2)
        else:
            v = rule.second_momentum * v + (1 - rule.second_momentum) * delta**2
        x = x + rule.learning_rate * m / (math.sqrt(v) + rule.adaptivity)
    return x


@pytest.mark.parametrize("rule", ALL[1:], ids=lambda rule: rule.kind)
def test_adaptive_rules_step_as_the_paper_s_algorithm(rule: Adaptive) -> None:
    targets = [0.5, -0.2, 0.01, 3.0, 0.3, 0.3]
    state, strategy = at(0), ServerOptimizer(rule)
    for target in targets:
        state = strategy.advance(state, towards(target))
    assert state.adapter["t"].item() == pytest.approx(by_the_paper(rule, targets), rel=1e-4)


@pytest.mark.parametrize("rule", ALL)
def test_a_round_repeated_from_what_was_kept_ends_in_the_same_bytes(rule: FedAvgM) -> None:
    strategy, updates = ServerOptimizer(rule), drawn_updates(3)
    before = strategy.advance(State(drawn_updates(1, seed=7)[0].adapter), updates)
    kept = State(load(save(before.adapter)), load(save(before.moments)))
    once, again = strategy.advance(before, updates), strategy.advance(kept, updates, 100)
    assert same_bytes(once.adapter, again.adapter)
    assert same_bytes(once.moments, again.moments)
    assert not same_bytes(before.moments, once.moments)  # it was not changed in place, and counts


def test_any_merging_can_be_held() -> None:
    fisher = ServerOptimizer(FedAvgM(0.9), FisherMerging(0.1, scaled=True))
    assert fisher.auxiliary(["t"]) == ("fisher.t",)
    updates = [*towards(1), *towards(2), *towards(90)]
    median = ServerOptimizer(FedAvgM(0.9), Median())
    assert median.advance(at(0), updates).adapter["t"].item() == 2
