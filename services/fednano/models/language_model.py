"""What a frozen LLM offers, wherever it runs: in this process or behind gRPC.

Sequences are packed one behind the other, so that no padding is computed by callers or sent:
`tokens` below is the sum over samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Protocol

import torch

IGNORED = -100
"""The label of a token that is not to be predicted."""


class Modality(IntEnum):
    """Which adapter a token passes; numbered as on the wire. RAW passes none."""

    RAW = 1
    TEXT = 2
    IMAGE = 3


@dataclass(frozen=True)
class Segment:
    """A stretch of one sample's tokens of one modality."""

    modality: Modality
    start: int
    length: int


@dataclass(frozen=True)
class Sequences:
    """A batch of token vectors and what each of them is."""

    values: torch.Tensor  # [tokens, hidden]
    segments: tuple[tuple[Segment, ...], ...]  # by sample; they cover it without gap or overlap

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sample."""
        return tuple(sum(s.length for s in sample) for sample in self.segments)


@dataclass(frozen=True)
class StepResult:
    """The loss of sample i is the sum over its labelled tokens; the gradient is that of
    sum_i weights[i] * loss_i with respect to the values that were sent."""

    loss_sums: torch.Tensor  # [samples] float32
    token_counts: torch.Tensor  # [samples] int32, labelled tokens
    gradient: torch.Tensor  # [tokens, hidden]


@dataclass(frozen=True)
class ScoreResult:
    loss_sums: torch.Tensor  # [samples] float32
    token_counts: torch.Tensor  # [samples] int32
    correct_counts: torch.Tensor  # [samples] int32, labelled tokens that the model ranks first


@dataclass(frozen=True)
class ForwardResult:
    activation: str  # names what Backward needs; empty unless kept
    logits: torch.Tensor  # [wanted, vocabulary] float32


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_p 1 is off; no stop_ids means the model's own end tokens."""

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class LowRank:
    """x + scale * B A x."""

    down: torch.Tensor  # A [rank, hidden]
    up: torch.Tensor  # B [hidden, rank]
    scale: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden] to the same shape."""
        return x + self.scale * (x @ self.down.T) @ self.up.T


@dataclass(frozen=True)
class NewToken:
    """`end`: nothing more follows for this sample (the token is an end token, or the last allowed)."""

    sample: int
    id: int
    end: bool


class LanguageModel(Protocol):
    """A frozen LLM. Labels [tokens] align with the values; IGNORED ones don't count; the model shifts:
    the logits at token t are held against the label at t + 1 of the same sample."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [tokens] to rows of the embedding table [tokens, hidden]."""
        ...

    def step(self, sequences: Sequences, labels: torch.Tensor, weights: torch.Tensor) -> StepResult:
        """Loss and gradient in one go; weights [samples] float32."""
        ...

    def score(self, sequences: Sequences, labels: torch.Tensor) -> ScoreResult:
        """Loss and teacher-forced hits, no gradient."""
        ...

    def forward(
        self, sequences: Sequences, positions: torch.Tensor, keep: bool = True
    ) -> ForwardResult:
        """Logits at `positions` [wanted], indices into the packed tokens."""
        ...

    def backward(
        self,
        activation: str,
        logits_gradient: torch.Tensor,
        sequences: Sequences,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """The gradient [tokens, hidden]; `sequences` and `positions` as in `forward`, from which it is
        computed again where the activation is gone."""
        ...

    def generate(
        self, sequences: Sequences, sampling: Sampling, text_adapter: LowRank | None = None
    ) -> Iterator[list[NewToken]]:
        """One token for each sample still being written, as soon as it is known. Sampled tokens pass
        `text_adapter` before they are fed back."""
        ...
