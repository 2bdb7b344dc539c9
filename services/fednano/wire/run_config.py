"""RunConfig: what a federated run is asked to do. REST body, run.yaml and `--set key=value` alike."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    field_validator,
    model_serializer,
    model_validator,
)

from fednano.wire.participation import (
    MOST_CLIENTS,
    AsynchronousConfig,
    check_participation,
    most_at_once,
)
from fednano.wire.partition import SMALLEST_SHARE, TRAINING_IMAGES, Partition, most_clients
from fednano.wire.ranks import check_ranks
from fednano.wire.section import Section
from fednano.wire.shadows import MOST_SHADOWS, check_shadows

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
Modality = Literal["image", "text"]

_MONTH = 30 * 24 * 3600
_MOST_RANK = 1024
_KRUM_CLIENTS = 2000  # its matrix has the square of that in numbers
_SHOWN = 40  # characters of a bad value


class AdapterConfig(Section):
    """The NanoAdapters: a_m(x) = x + scale B_m A_m x, one per modality."""

    rank: int = Field(16, ge=1, le=_MOST_RANK, description="rank r of A [r, d] and B [d, r]")
    ranks: tuple[Annotated[int, Field(ge=1, le=_MOST_RANK)], ...] = Field(
        (),
        max_length=1000,
        description="product, flora: the members' own ranks, dealt out in turn in the order of their"
        " ids; none is above rank. Empty: rank, for all",
    )
    scale: float = Field(2.0, gt=0, le=100, description="s, the same for every rank")
    modalities: tuple[Modality, ...] = Field(("image", "text"), min_length=1)

    @model_validator(mode="after")
    def _within(self) -> AdapterConfig:
        if self.ranks and max(self.ranks) > self.rank:
            raise ValueError(
                f"adapter.ranks: expected at most adapter.rank ({self.rank}), got {max(self.ranks)}"
            )
        return self

    def rank_of(self, member: int) -> int:
        """The rank that the member of this index trains."""
        return self.ranks[member % len(self.ranks)] if self.ranks else self.rank


class TrainingConfig(Section):
    """What a client does in one round."""

    epochs: int = Field(1, ge=1, le=1000, description="local epochs in a round")
    batch_size: int = Field(16, ge=1, le=4096)
    learning_rate: float = Field(5e-3, gt=0, le=10, description="of AdamW")
    weight_decay: float = Field(0.0, ge=0, le=10)
    max_grad_norm: float = Field(1.0, ge=0, le=1e6, description="0: gradients are not clipped")
    loss: Literal["server", "client"] = Field(
        "server",
        description="where the loss is computed: in one round trip, or from logits on the client",
    )
    wire_dtype: Literal["fp32", "fp16", "bf16", "int8"] = Field(
        "fp32", description="of embeddings and gradients on the wire"
    )
    wire: Literal["dense", "factored"] = Field(
        "dense",
        description="factored: what never changes is uploaded to the LLM service once and kept there",
    )

    @model_validator(mode="after")
    def _crosses(self) -> TrainingConfig:
        if self.wire == "factored" and self.loss == "client":
            raise ValueError(
                "training.wire: expected dense where training.loss is client, got factored"
            )
        return self


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
        return _settled(given, "strategy")

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


def _settled(given: Any, place: str) -> Any:
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


class DataConfig(Section):
    """Whose data the clients train on."""

    source: Literal["digits", "scenes", "own"] = Field(
        "digits",
        description="digits, scenes: a built-in task, dealt out in shards; own: each client's",
    )
    partition: str = Field(
        "dirichlet:0.5",
        description="how a built-in task is dealt out: iid, dirichlet:ALPHA (labels),"
        " quantity:ALPHA (sizes) or feature:STRENGTH (scanners)",
    )
    limit: int = Field(0, ge=0, description="at most this many images per client; 0: all")
    evaluation_limit: int = Field(0, ge=0, description="at most this many test images; 0: all")

    @property
    def dealt(self) -> bool:
        """Whether the run deals its data out, in shards."""
        return self.source != "own"

    @field_validator("partition")
    @classmethod
    def _deals(cls, partition: str) -> str:
        try:
            Partition.read(partition)
        except ValueError as error:
            raise ValueError(f"data.partition: {error}") from None
        return partition


class EvaluationConfig(Section):
    """Who evaluates which rounds. Round 0 is the adapter before any training."""

    every: int = Field(1, ge=1, description="the evaluator scores every so many rounds")
    evaluators: int = Field(
        0,
        ge=0,
        le=1000,
        description="enrolment waits for so many, too, until enrol_seconds at the latest",
    )
    own_data: Literal["never", "ends", "always"] = Field(
        "ends",
        description="clients score on their own data: in the first and last round, or in all",
    )
    seconds: float = Field(
        120.0,
        gt=0,
        le=_MONTH,
        description="deadline of a round's evaluation; so much again for each of the run's shadows",
    )
    max_new_tokens: int = Field(8, ge=1, le=4096)


class RetentionConfig(Section):
    rounds: int = Field(20, ge=1, description="adapters kept besides the first, best and last one")


class RunConfig(Section):
    """One federated run."""

    name: Name
    clients: int = Field(
        4, ge=1, le=MOST_CLIENTS, description="enrolment closes with so many members"
    )
    min_clients: int = Field(2, ge=1, description="updates below which a round fails")
    rounds: int = Field(10, ge=1, le=1_000_000)
    seed: int = Field(0, ge=0, lt=2**63)
    enrol_seconds: float = Field(
        120.0, gt=0, le=_MONTH, description="enrolment closes after this time"
    )
    enrol_quiet_seconds: float = Field(
        0.0,
        ge=0,
        le=_MONTH,
        description="enrolment closes earlier once min_clients are in and nobody new has come for"
        " so long; 0: it waits",
    )
    round_seconds: float = Field(
        300.0, gt=0, le=_MONTH, description="deadline for a round's updates"
    )
    max_attempts: int = Field(3, ge=1, description="tries of a round before the run fails")
    cohort: int = Field(0, ge=0, description="members sampled per round; 0: all that are alive")
    spares: int = Field(
        0,
        ge=0,
        description="members sampled beyond cohort: the round merges the first cohort updates and"
        " doesn't wait for the others",
    )
    late_joiners: bool = Field(
        False,
        description="data.source own: whoever asks to join once the run has begun becomes a member,"
        " from the next round on",
    )
    asynchronous: AsynchronousConfig | None = Field(
        None, description="fedavg: a round merges the updates of whoever is ready"
    )
    deterministic: bool = Field(False, description="equal runs give equal bytes; whole cohort")
    fingerprint: str = Field("", description="of the model; empty: the first member's")
    strategy: StrategyConfig = StrategyConfig()
    shadows: tuple[StrategyConfig, ...] = Field(
        (),
        max_length=MOST_SHADOWS,
        description="further strategies that merge the same updates each round, one step from the"
        " adapter of the one that leads, and are evaluated beside it; they don't change the run",
    )
    adapter: AdapterConfig = AdapterConfig()
    training: TrainingConfig = TrainingConfig()
    data: DataConfig = DataConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    retention: RetentionConfig = RetentionConfig()

    @field_validator("shadows", mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        """A setting of another strategy is told by its place among the shadows."""
        for index, one in enumerate(given if isinstance(given, list | tuple) else ()):
            _settled(one, f"shadows.{index}")
        return given

    @model_validator(mode="after")
    def _fits(self) -> RunConfig:
        if self.min_clients > self.clients:
            raise ValueError(
                f"min_clients: expected at most clients ({self.clients}), got {self.min_clients}"
            )
        check_participation(self)
        check_shadows(self.strategy, self.shadows)
        check_ranks(self)
        self._suits("strategy", self.strategy)
        for index, shadow in enumerate(self.shadows):
            self._suits(f"shadows.{index}", shadow)
        source = self.data.source
        if self.data.dealt and self.clients > most_clients(source):
            raise ValueError(
                f"clients: expected at most {most_clients(source)} for data.source {source}"
                f" ({TRAINING_IMAGES[source]} training images, at least {SMALLEST_SHARE} each),"
                f" got {self.clients}"
            )
        return self

    def _suits(self, field: str, strategy: StrategyConfig) -> None:
        """A round must get as many updates as the strategy needs, and no more than it can take."""
        if self.min_clients < strategy.least_updates:
            raise ValueError(
                f"min_clients: expected at least {strategy.least_updates} updates for"
                f" {field}.name {strategy.name} as it is set, got {self.min_clients}"
            )
        at_once = most_at_once(self)
        if strategy.byzantine is not None and at_once > _KRUM_CLIENTS:
            bound = "cohort" if self.cohort or self.late_joiners else "clients"
            raise ValueError(
                f"{bound}: expected at most {_KRUM_CLIENTS} in a round for {field}.name"
                f" {strategy.name}, which compares each update with each, got {at_once}"
            )

    @property
    def strategies(self) -> tuple[StrategyConfig, ...]:
        """All that merge a round: the one that leads, then its shadows."""
        return self.strategy, *self.shadows
