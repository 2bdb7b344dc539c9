"""RunConfig: what a federated run is asked to do. REST body, run.yaml and `--set key=value` alike."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
Modality = Literal["image", "text"]

_MONTH = 30 * 24 * 3600
_PARTITION = re.compile(r"iid|dirichlet:([0-9]*\.?[0-9]+)")
_MOST_ALPHA = 1_000_000
_SHOWN = 40  # characters of a bad value
_DIGITS_IMAGES, _DIGITS_SHARE = 1077, 8
DIGITS_CLIENTS = _DIGITS_IMAGES // _DIGITS_SHARE


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class AdapterConfig(_Section):
    """The NanoAdapters: a_m(x) = x + scale B_m A_m x, one per modality."""

    rank: int = Field(16, ge=1, le=1024, description="rank r of A [r, d] and B [d, r]")
    scale: float = Field(2.0, gt=0, le=100, description="s, the same for every rank")
    modalities: tuple[Modality, ...] = Field(("image", "text"), min_length=1)


class TrainingConfig(_Section):
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


class StrategyConfig(_Section):
    """How updates are merged."""

    name: Literal["fedavg", "fednano", "fednano-ef"] = "fednano-ef"
    fisher: Literal["scaled", "raw"] = Field(
        "scaled", description="scaled: each tensor's Fisher divided by its mean, per client"
    )
    damping: float = Field(0.1, ge=0, le=1e6, description="lambda, added to every Fisher value")


class DataConfig(_Section):
    """Whose data the clients train on."""

    source: Literal["digits", "own"] = Field(
        "digits", description="digits: the built-in task, dealt out in shards; own: each client's"
    )
    partition: str = Field(
        "dirichlet:0.5",
        description="how the built-in task is dealt out: iid or dirichlet:ALPHA",
    )
    limit: int = Field(0, ge=0, description="at most this many images per client; 0: all")
    evaluation_limit: int = Field(0, ge=0, description="at most this many test images; 0: all")

    @field_validator("partition")
    @classmethod
    def _deals(cls, partition: str) -> str:
        found = _PARTITION.fullmatch(partition)
        alpha = float(found[1] or 1) if found else 0.0
        if not 0 < alpha <= _MOST_ALPHA:
            shown = repr(partition[:_SHOWN])
            wanted = f"iid or dirichlet:ALPHA with ALPHA above 0, at most {_MOST_ALPHA}"
            raise ValueError(f"data.partition: expected {wanted}, got {shown}")
        return partition


class EvaluationConfig(_Section):
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
    seconds: float = Field(120.0, gt=0, le=_MONTH, description="deadline of a round's evaluation")
    max_new_tokens: int = Field(8, ge=1, le=4096)


class RetentionConfig(_Section):
    rounds: int = Field(20, ge=1, description="adapters kept besides the first, best and last one")


class RunConfig(_Section):
    """One federated run."""

    name: Name
    clients: int = Field(4, ge=1, le=100_000, description="enrolment closes with so many members")
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
    deterministic: bool = Field(False, description="equal runs give equal bytes; whole cohort")
    fingerprint: str = Field("", description="of the model; empty: the first member's")
    strategy: StrategyConfig = StrategyConfig()
    adapter: AdapterConfig = AdapterConfig()
    training: TrainingConfig = TrainingConfig()
    data: DataConfig = DataConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    retention: RetentionConfig = RetentionConfig()

    @model_validator(mode="after")
    def _fits(self) -> RunConfig:
        if self.min_clients > self.clients:
            raise ValueError(
                f"min_clients: expected at most clients ({self.clients}), got {self.min_clients}"
            )
        if self.cohort and not self.min_clients <= self.cohort <= self.clients:
            raise ValueError(
                f"cohort: expected 0 or {self.min_clients} to {self.clients}, got {self.cohort}"
            )
        if self.data.source == "digits" and self.clients > DIGITS_CLIENTS:
            raise ValueError(
                f"clients: expected at most {DIGITS_CLIENTS} for data.source digits "
                f"({_DIGITS_IMAGES} training images, at least {_DIGITS_SHARE} each), "
                f"got {self.clients}"
            )
        return self
