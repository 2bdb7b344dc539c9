"""What seeds say: mean and spread, and a paired test for every "better"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t


@dataclass(frozen=True)
class Spread:
    """Of one figure over seeds."""

    mean: float
    deviation: float | None  # of the sample; None for a single one
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        deviation = stdev(values) if len(values) > 1 else None
        return cls(fmean(values), deviation, len(values))

    def __str__(self) -> str:
        spread = "" if self.deviation is None else f" ± {self.deviation:.3f}"
        return f"{self.mean:.3f}{spread}"


@dataclass(frozen=True)
class Paired:
    """One method less another, pair by pair: the same seed, so the same data and start."""

    difference: float
    low: float  # of the 95 % interval
    high: float
    p: float  # two-sided, of Student's paired t-test
    pairs: int

    @classmethod
    def of(cls, ones: Sequence[float], others: Sequence[float]) -> Paired | None:
        """None where fewer than three pairs can't tell."""
        differences = [one - other for one, other in zip(ones, others, strict=True)]
        count = len(differences)
        if count < 3:
            return None
        mean, error = fmean(differences), stdev(differences) / count**0.5
        if error == 0:
            return cls(mean, mean, mean, 1.0 if mean == 0 else 0.0, count)
        margin = float(t.ppf(0.975, count - 1)) * error
        p = 2 * float(t.sf(abs(mean) / error, count - 1))
        return cls(mean, mean - margin, mean + margin, p, count)


def holm(ps: Sequence[float]) -> list[float]:
    """p values for several tests at once, adjusted by Holm's method (Scandinavian Journal of
    Statistics 6, 1979): below 0.05 comes by chance at most so often, in any of them."""
    order = sorted(range(len(ps)), key=ps.__getitem__)
    adjusted, largest = [0.0] * len(ps), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - place) * ps[index]))
        adjusted[index] = largest
    return adjusted
