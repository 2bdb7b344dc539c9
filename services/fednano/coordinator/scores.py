"""A round's metrics, from what the clients measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from fednano.coordinator.records import ShadowRecord
from fednano.coordinator.store_updates import EvaluationMeta, UpdateMeta


def train_metrics(
    accepted: Mapping[str, UpdateMeta], asynchronous: bool = False
) -> dict[str, float]:
    """The updates' train_loss, weighted by samples, and of an asynchronous round their mean
    staleness."""
    pairs = [
        (meta.samples, {"train_loss": meta.metrics["train_loss"]})
        for meta in accepted.values()
        if "train_loss" in meta.metrics
    ]
    found = _weighted(pairs)
    if asynchronous:
        found["staleness"] = fmean(meta.staleness for meta in accepted.values())
    return found


def mean_metrics(answers: Mapping[str, EvaluationMeta], digest: str) -> dict[str, float]:
    """The evaluators' metrics of an adapter, weighted by samples where there are several."""
    return _weighted(
        [
            (answer.samples.get(digest, 1), answer.metrics[digest])
            for answer in answers.values()
            if answer.role == "evaluator" and digest in answer.metrics
        ]
    )


def own_metrics(answers: Mapping[str, EvaluationMeta], digest: str) -> dict[str, dict[str, float]]:
    """What each trainer measured on its own data."""
    return {
        client: answer.metrics[digest]
        for client, answer in answers.items()
        if answer.role == "trainer" and digest in answer.metrics
    }


def scored(
    shadows: Sequence[ShadowRecord], answers: Mapping[str, EvaluationMeta]
) -> tuple[ShadowRecord, ...]:
    """The shadows with what was measured of their adapters."""
    return tuple(
        replace(
            shadow,
            metrics=mean_metrics(answers, shadow.adapter_digest),
            own=own_metrics(answers, shadow.adapter_digest),
        )
        for shadow in shadows
    )


def _weighted(pairs: Iterable[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Each metric's mean over those that have it."""
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    for samples, metrics in pairs:
        weight = max(samples, 1)
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + weight * value
            weights[name] = weights.get(name, 0.0) + weight
    return {name: sums[name] / weights[name] for name in sorted(sums)}
