"""SCAFFOLD's server, by hand and against a problem whose optimum is known."""

from __future__ import annotations

import numpy as np
import pytest
from fednano.coordinator.records import Tensors
from fednano.coordinator.strategies import FedAvg, Scaffold, State, Update, strategy_of
from fednano.wire.run_config import StrategyConfig

CURVATURES, CENTRES = np.array([1.0, 4.0, 0.5, 2.0]), np.array([3.0, -1.0, 5.0, 0.0])
OPTIMUM = (CURVATURES * CENTRES).sum() / CURVATURES.sum()
STEPS, RATE = 10, 0.05


def number(value: float) -> np.ndarray:
    return np.array([[value]], np.float32)


def update(client: str, samples: int, theta: float, moved: float) -> Update:
    return Update(client, samples, {"t": number(theta)}, {"control.t": number(moved)})


def test_the_control_moves_by_the_share_of_members_who_sent_something() -> None:
    before = State({"t": number(0)}, {"control.t": number(1)})
    updates = [update("a", 1, 4, 2), update("b", 3, 8, 4)]
    after = Scaffold(members=4).advance(before, updates)
    assert after.adapter["t"].item() == 7  # samples weigh
    assert after.moments["control.t"].item() == 1 + (2 + 4) / 4  # and don't here
    assert after.handed.keys() == {"control.t"}
    everybody = Scaffold().advance(State(before.adapter), updates)
    assert everybody.moments["control.t"].item() == (2 + 4) / 2  # c was 0


def local(client: int, theta: float, correction: float) -> tuple[float, float]:
    """Gradient descent on curvature/2 (theta - centre)^2; and the mean gradient on the way."""
    gradients = []
    for _ in range(STEPS):
        gradients.append(CURVATURES[client] * (theta - CENTRES[client]))
        theta -= RATE * (gradients[-1] + correction)
    return theta, float(np.mean(gradients))


def rounds_of(cohort: int, rounds: int) -> tuple[Tensors, float, list[float]]:
    """The adapter that SCAFFOLD ends with, c, and every c_i."""
    rng, own = np.random.default_rng(0), [0.0] * len(CENTRES)
    state, strategy = State({"t": number(0)}), Scaffold(len(CENTRES))
    for _ in range(rounds):
        updates = []
        theta = state.adapter["t"].item()
        control = state.moments.get("control.t", number(0)).item()
        for client in sorted(rng.choice(len(CENTRES), cohort, replace=False)):
            trained, gradient = local(client, theta, control - own[client])
            updates.append(update(f"c{client}", 1, trained, gradient - own[client]))
            own[client] = gradient
        state = strategy.advance(state, updates)
    return state.adapter, state.moments["control.t"].item(), own


@pytest.mark.parametrize("cohort", [4, 2])
def test_many_local_steps_still_end_in_everybodys_optimum(cohort: int) -> None:
    adapter, control, own = rounds_of(cohort, 300)
    assert adapter["t"].item() == pytest.approx(OPTIMUM, abs=1e-3)
    assert control == pytest.approx(float(np.mean(own)), abs=1e-4)
    theta = 0.0
    for _ in range(300):
        updates = [update(f"c{n}", 1, local(n, theta, 0.0)[0], 0) for n in range(len(CENTRES))]
        theta = FedAvg().aggregate(updates)["t"].item()
    assert abs(theta - OPTIMUM) > 0.2  # where the mean of the clients' own ways ends


def test_a_run_tells_its_strategy_how_many_members_it_has() -> None:
    config = StrategyConfig(name="scaffold")
    assert strategy_of(config, 7) == Scaffold(7)
    assert strategy_of(config).auxiliary(["text.up"]) == ("control.text.up",)
