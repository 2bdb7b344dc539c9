"""What the coordinator knows, as plain values: read from Redis, shown by REST, streamed as events."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from fednano.wire.run_config import RunConfig, StrategyConfig

Tensors = dict[str, NDArray[np.float32]]


class RunState(StrEnum):
    CREATED = "created"
    ENROLLING = "enrolling"
    RUNNING = "running"
    PAUSED = "paused"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        return self in (RunState.FINISHED, RunState.STOPPED, RunState.FAILED)


class RoundState(StrEnum):
    OPEN = "open"
    COLLECTING = "collecting"
    MERGING = "merging"
    EVALUATING = "evaluating"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class RunRecord:
    """A run and where it stands. Times are Unix seconds."""

    name: str
    config: RunConfig
    state: RunState
    created_at: float
    created_by: str
    started_at: float | None = None  # enrolment closed
    finished_at: float | None = None
    round: int = 0  # the round being worked on; 0 is the first adapter, before any training
    members: tuple[str, ...] = ()
    best_round: int | None = None  # by the evaluator's accuracy
    last_round: int | None = None  # the newest finished one
    failure: str = ""
    fingerprint: str = ""  # of the model; empty until the first member joined


@dataclass(frozen=True)
class Participation:
    """Client ids of a round."""

    selected: tuple[str, ...] = ()
    submitted: tuple[str, ...] = ()
    late: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShadowRecord:
    """What one of the run's shadows made of a round's updates: a one-step counterfactual, from the
    adapter of the strategy that leads. Metrics are as a round's."""

    strategy: StrategyConfig
    adapter_digest: str
    metrics: dict[str, float] = field(default_factory=dict)
    own: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.strategy.label


@dataclass(frozen=True)
class RoundRecord:
    """A round. `metrics` are the evaluator's (accuracy, loss, accuracy of each kind of question) and
    train_loss, the sample-weighted mean over the updates; `own` are the clients' on their own data."""

    number: int
    attempt: int
    state: RoundState
    opened_at: float
    deadline: float
    strategy: str
    clients: Participation = Participation()
    finished_at: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    own: dict[str, dict[str, float]] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)  # by kind, both directions
    adapter_digest: str = ""
    failure: str = ""  # why it failed or, of a later attempt, why the one before did
    wanted: int = 0  # updates: it merges the first so many; 0 until its cohort is written
    shadows: tuple[ShadowRecord, ...] = ()  # in the configuration's order, once it is merged


@dataclass(frozen=True)
class ClientRecord:
    """A member of a run."""

    id: str
    role: str  # trainer or evaluator
    state: str  # alive, lost or, once the run has ended, left
    doing: str
    progress: float
    last_seen: float
    samples: int
    shard: int | None
    joined_at: float
    version: str
    joined_round: int = 0  # that the run was at; 0 for those who were there from the beginning


@dataclass(frozen=True)
class LedgerRow:
    """What one client spent on one round."""

    round: int
    client: str
    sent_bytes: dict[str, int]  # by kind, see metrics.KINDS
    received_bytes: dict[str, int]
    client_seconds: float  # CPU time of the client's process
    server_seconds: float  # on the LLM service's device, its share of joint batches


@dataclass(frozen=True)
class LedgerTotals:
    """What all clients spent on a run."""

    sent: dict[str, int]  # bytes by kind
    received: dict[str, int]
    client_seconds: float
    server_seconds: float


@dataclass(frozen=True)
class Event:
    """`id` is the stream's ("<ms>-<n>"), `kind` one of run, round, client, update, evaluation."""

    id: str
    kind: str
    data: dict[str, object]


@dataclass(frozen=True)
class StoredAdapter:
    """Named tensors with their scale; `digest` is the SHA-256 of layout, scale and bytes."""

    digest: str
    scale: float
    tensors: Tensors


@dataclass(frozen=True)
class TokenRecord:
    """A bearer token, without its secret: only a hash of that is kept."""

    id: str
    name: str
    role: str  # admin, viewer or site
    created_at: float
    revoked: bool = False


@dataclass(frozen=True)
class MemoryUse:
    used_bytes: int
    max_bytes: int  # 0: no limit is set
