"""Who takes part in a round: pure functions of the run's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from fednano.wire.run_config import RunConfig

T = TypeVar("T")


def sample_cohort(
    candidates: Sequence[T], config: RunConfig, number: int, attempt: int = 1
) -> list[T]:
    """`config.cohort` of the candidates (0: all) and the spares, in their order, by a generator of
    seed, round and attempt."""
    size = config.cohort + config.spares or len(candidates)
    if size >= len(candidates):
        return list(candidates)
    rng = np.random.default_rng([config.seed, number, attempt])
    drawn = rng.choice(len(candidates), size, replace=False)
    return [candidates[index] for index in sorted(drawn)]


def wanted_updates(sampled: int, config: RunConfig) -> int:
    """After how many updates of so many sampled members their round merges."""
    if config.asynchronous is not None:
        return min(sampled, config.asynchronous.buffer)
    return min(sampled, config.cohort) if config.spares else sampled


def evaluating_roles(config: RunConfig, number: int) -> frozenset[str]:
    """Which roles evaluate this round: the evaluator, the trainers on their own data."""
    evaluation = config.evaluation
    ends = number in (0, config.rounds)
    roles = set()
    if ends or number % evaluation.every == 0:
        roles.add("evaluator")
    if evaluation.own_data == "always" or (evaluation.own_data == "ends" and ends):
        roles.add("trainer")
    return frozenset(roles)


def evaluation_seconds(config: RunConfig, number: int) -> float:
    """Deadline of a merged round's evaluation: of its adapter and each shadow's and, after the last
    round, of clients that train once more by themselves."""
    alone = config.round_seconds if config.personal != "none" and number == config.rounds else 0.0
    return config.evaluation.seconds * len(config.strategies) + alone
