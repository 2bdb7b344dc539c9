"""What REST replies: pydantic models made from the records. Times are Unix seconds."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from fednano.coordinator.records import MemoryUse, RoundState, RunState, TokenRecord
from fednano.wire.run_config import RunConfig, StrategyConfig

Time = Annotated[float, Field(description="Unix seconds")]
ByKind = Annotated[dict[str, int], Field(description="bytes by kind")]
ClientSeconds = Annotated[float, Field(description="CPU time of the client's own process")]
ServerSeconds = Annotated[
    float, Field(description="of the LLM service's device; of a joint batch the client's share")
]
Next = Annotated[str, Field(description="the next page's `?cursor=`; empty on the last page")]
Role = Literal["admin", "viewer", "site"]


class _Reply(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class RunReply(_Reply):
    """A run, what it was asked to do and where it stands."""

    name: str
    state: RunState
    config: RunConfig
    created_at: Time
    created_by: str = Field(description="name of the token that created it")
    started_at: Time | None = Field(description="when enrolment closed")
    finished_at: Time | None
    round: int = Field(description="being worked on; 0 is the adapter before any training")
    members: list[str] = Field(description="client ids")
    best_round: int | None = Field(description="by the evaluator's accuracy")
    last_round: int | None = Field(description="newest finished one")
    failure: str = Field(description="why it failed; empty otherwise")
    fingerprint: str = Field(description="of the model; empty until the first member joined")


class RunPage(_Reply):
    items: list[RunReply]
    next: Next


class ParticipationReply(_Reply):
    """Client ids of a round."""

    selected: list[str]
    submitted: list[str]
    late: list[str]
    refused: list[str]
    lost: list[str]


class ShadowReply(_Reply):
    """What a shadow made of a round's updates: a one-step counterfactual on the trajectory of the
    strategy that leads. It starts each round from the leader's adapter, so a series of these is not
    a run of its own; independent runs decide results."""

    label: str = Field(description="the strategy with its settings that aren't the defaults")
    strategy: StrategyConfig
    adapter_digest: str = Field(description="kept until the round is evaluated")
    metrics: dict[str, float] = Field(description="as the round's, of this adapter")
    own: dict[str, dict[str, float]] = Field(description="each client's on its own data")


class RoundReply(_Reply):
    """A round. Metrics are the evaluator's; `train_loss` is the mean over the updates."""

    number: int
    attempt: int
    state: RoundState
    opened_at: Time
    deadline: Time
    finished_at: Time | None
    strategy: str
    clients: ParticipationReply
    wanted: int = Field(
        description="it merges the first so many updates; 0 until its cohort is written"
    )
    metrics: dict[str, float]
    own: dict[str, dict[str, float]] = Field(description="each client's on its own data")
    bytes: ByKind
    adapter_digest: str = Field(description="empty until the round is merged")
    failure: str = Field(
        description="why it failed or, of a later attempt, why the one before did; else empty"
    )
    shadows: list[ShadowReply] = Field(
        description="one-step counterfactuals: the same updates merged by the run's shadows, each"
        " from the adapter of the strategy that leads; empty in round 0 and until it is merged"
    )


class RoundPage(_Reply):
    items: list[RoundReply]
    next: Next


class ClientReply(_Reply):
    """A member of a run."""

    id: str
    role: str = Field(description="trainer or evaluator")
    state: str = Field(description="alive, lost or, once the run has ended, left")
    doing: str
    progress: float = Field(description="0 to 1, within what it is doing")
    last_seen: Time = Field(description="of a lost client: when it was heard last, Unix seconds")
    samples: int
    shard: int | None
    joined_at: Time
    joined_round: int = Field(
        description="that the run was at; 0 for those who were there from the beginning"
    )
    version: str


class ClientList(_Reply):
    """All members: enrolment bounds their number, so there are no pages."""

    items: list[ClientReply]


class LedgerReply(_Reply):
    """What one client spent on one round."""

    round: int
    client: str
    sent_bytes: ByKind
    received_bytes: ByKind
    client_seconds: ClientSeconds
    server_seconds: ServerSeconds


class LedgerTotalsReply(_Reply):
    """What all clients spent on the whole run."""

    sent: ByKind
    received: ByKind
    client_seconds: ClientSeconds
    server_seconds: ServerSeconds


class LedgerPage(_Reply):
    items: list[LedgerReply]
    next: Next
    totals: LedgerTotalsReply


class MemoryReply(_Reply):
    """Redis's memory; new runs are refused above 80 % of the limit."""

    used_bytes: int
    max_bytes: int = Field(description="0: no limit is set")
    used_share: float | None = Field(description="used of the limit, 0 to 1")

    @classmethod
    def of(cls, use: MemoryUse) -> Self:
        share = use.used_bytes / use.max_bytes if use.max_bytes else None
        return cls(used_bytes=use.used_bytes, max_bytes=use.max_bytes, used_share=share)


class TokenRequest(BaseModel):
    """A token to be made."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(min_length=1, max_length=128, pattern=r"^[\w.@-]+$")
    role: Role


class TokenReply(_Reply):
    """A token, without its secret."""

    id: str
    name: str
    role: Role
    created_at: Time
    revoked: bool


class NewTokenReply(TokenReply):
    """A token with its secret, which is shown this once."""

    secret: str

    @classmethod
    def of(cls, record: TokenRecord, secret: str) -> Self:
        return cls(**TokenReply.model_validate(record).model_dump(), secret=secret)


class TokenList(_Reply):
    items: list[TokenReply]


class HealthReply(_Reply):
    status: str
