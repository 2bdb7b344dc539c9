"""RunConfig: what a federated run is asked to do. REST body, run.yaml and `--set key=value` alike."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from fednano.wire.participation import (
    MOST_CLIENTS,
    AsynchronousConfig,
    check_participation,
    most_at_once,
)
from fednano.wire.partition import SMALLEST_SHARE, TRAINING_IMAGES, Partition, most_clients
from fednano.wire.personal import Personal, check_personal
from fednano.wire.placements import PlacementName, check_placement
from fednano.wire.ranks import check_ranks
from fednano.wire.section import Section
from fednano.wire.shadows import MOST_SHADOWS, check_shadows
from fednano.wire.strategy_config import StrategyConfig as StrategyConfig
from fednano.wire.strategy_config import StrategyName as StrategyName
from fednano.wire.strategy_config import settled

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
    personal: Personal = Field(
        "none",
        description="once the last round is merged each client trains for another one by itself and"
        " keeps that adapter; fine-tuned: it answers with it; feddpa-f: it mixes both, by question",
    )
    placement: PlacementName = Field(
        "nano-adapters",
        description="which weights are trained: NanoAdapters beside the split; connector: the"
        " checkpoint's own connector, whole, at the client; lora: LoRA of adapter.rank inside the LLM,"
        " for clients that have it whole (--llm-half)",
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
            settled(one, f"shadows.{index}")
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
        check_personal(self)
        check_placement(self)
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
