"""StrategyConfig: which strategy merges the updates of a run, and what it is told."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from fednano.wire.section import Section

_SHOWN = 40  # characters of a bad value

StrategyName = Literal[
    "fedavg",
    "fedavgm",
    "fedadagrad",
    "fedadam",
    "fedyogi",
    "fedprox",
    "fednano",
    "fednano-ef",
    "median",
    "trimmed-mean",
    "krum",
    "multi-krum",
    "product",
    "ffa",
    "scaffold",
    "flora",
]
_FISHER: dict[str, str | float] = {"fisher": "scaled", "damping": 0.1}
_ADAPTIVE: dict[str, str | float] = {"server_learning_rate": 0.01, "adaptivity": 1e-3}
_MOMENTS: dict[str, str | float] = {"momentum": 0.9, "second_momentum": 0.99}
_SETTINGS: dict[str, dict[str, str | float]] = {
    "fedavgm": {"momentum": 0.9},
    "fedadagrad": _ADAPTIVE,
    "fedadam": _ADAPTIVE | _MOMENTS,
    "fedyogi": _ADAPTIVE | _MOMENTS,
    "fedprox": {"mu": 0.01},
    "fednano": _FISHER,
    "fednano-ef": _FISHER,
    "trimmed-mean": {"trim": 0.2},
    "krum": {"byzantine": 1},
    "multi-krum": {"byzantine": 1, "selected": 0},
    "flora": {"max_rank": 0},
}  # what a strategy can be told, with the defaults; nothing else


class StrategyConfig(Section):
    """How updates are merged. A setting that the strategy doesn't have is left out."""

    name: StrategyName = "fednano-ef"
    fisher: Literal["scaled", "raw"] | None = Field(
        None,
        description="fednano, fednano-ef: scaled (the default), each tensor's Fisher divided by its"
        " mean, per client; or raw",
    )
    damping: float | None = Field(
        None,
        ge=0,
        le=1e6,
        description="fednano, fednano-ef: lambda, added to every Fisher value; 0.1",
    )
    mu: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="fedprox: pull of a client towards the round's adapter; 0.01",
    )
    server_learning_rate: float | None = Field(
        None, gt=0, le=100, description="fedadagrad, fedadam, fedyogi: of the server's step; 0.01"
    )
    momentum: float | None = Field(
        None, ge=0, lt=1, description="fedavgm, fedadam, fedyogi: of the server's step; 0.9"
    )
    second_momentum: float | None = Field(
        None, gt=0, lt=1, description="fedadam, fedyogi: decay of the second moment; 0.99"
    )
    adaptivity: float | None = Field(
        None,
        ge=1e-9,
        le=1,
        description="fedadagrad, fedadam, fedyogi: tau, added to the root of the second moment;"
        " 0.001",
    )
    trim: float | None = Field(
        None, ge=0.001, le=0.49, description="trimmed-mean: share left out at either end; 0.2"
    )
    byzantine: int | None = Field(
        None, ge=1, le=10_000, description="krum, multi-krum: bad updates that it withstands; 1"
    )
    selected: int | None = Field(
        None, ge=0, le=100_000, description="multi-krum: updates averaged; 0: all but byzantine"
    )
    max_rank: int | None = Field(
        None,
        ge=0,
        le=1 << 20,
        description="flora: rank above which the merged adapter loses its smallest parts; 0: none",
    )

    @model_validator(mode="before")
    @classmethod
    def _settles(cls, given: Any) -> Any:
        """Fills in the strategy's defaults and refuses the settings of others."""
        return settled(given, "strategy")

    @model_serializer(mode="wrap")
    def _own(self, write: SerializerFunctionWrapHandler):  # type: ignore[no-untyped-def]
        """Without what the strategy doesn't have. No return type: the schema stays the fields'."""
        return {name: value for name, value in write(self).items() if value is not None}

    @property
    def label(self) -> str:
        """The name, with the settings that aren't the defaults: `krum (byzantine 2)`."""
        told = [
            f"{field} {value}"
            for field, default in _SETTINGS.get(self.name, {}).items()
            if (value := getattr(self, field)) != default
        ]
        return f"{self.name} ({', '.join(told)})" if told else self.name

    @property
    def least_updates(self) -> int:
        """Below which merging would be impossible, or withstand nothing."""
        if self.name == "median":
            return 3  # the median of two is their mean
        if self.trim is not None:
            return math.ceil(1 / self.trim - 1e-9)  # so that one is left out at either end
        if self.byzantine is not None:
            return max(2 * self.byzantine + 3, (self.selected or 1) + self.byzantine)
        return 1


def settled(given: Any, place: str) -> Any:
    """A strategy with its defaults filled in. Raises ValueError, which tells its place, for the
    settings of others."""
    if not isinstance(given, dict):
        return given
    name = given.get("name") or "fednano-ef"
    values = {field: value for field, value in given.items() if value is not None}
    if name not in get_args(StrategyName):
        return values  # refused by its name
    own = _SETTINGS.get(name, {})
    if name == "fedavg":  # with which 0.1.0 wrote these down
        values = {f: v for f, v in values.items() if (f, v) not in _FISHER.items()}
    for field in sorted(values.keys() & _owners().keys() - own.keys()):
        has = ", ".join(_owners()[field])
        raise ValueError(
            f"{place}.{field}: expected nothing for {name!r}, as it is a setting of {has}"
            f" alone, got {str(values[field])[:_SHOWN]}"
        )
    return own | values


def _owners() -> dict[str, list[str]]:
    """Which strategies have a setting."""
    fields = {field for settings in _SETTINGS.values() for field in settings}
    return {
        field: [name for name, settings in _SETTINGS.items() if field in settings]
        for field in fields
    }
