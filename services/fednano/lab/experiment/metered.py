"""The LLM in this process, with what would have crossed the wire and what its computation took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fednano.models.language_model import (
    ForwardResult,
    LanguageModel,
    LowRank,
    NewToken,
    Sampling,
    ScoreResult,
    Sequences,
    StepResult,
)


class MeteredLanguageModel:
    """Hands everything on. Bytes are those of embeddings, gradients and a text adapter in dense form
    and fp32, as the wire carries them; messages' heads, labels and framing are not counted."""

    def __init__(self, llm: LanguageModel) -> None:
        self._llm = llm
        self.sent = 0  # bytes
        self.received = 0
        self.seconds = 0.0  # CPU, of the LLM's computation

    def take(self) -> tuple[int, int, float]:
        """Sent, received and seconds since the last time."""
        found = self.sent, self.received, self.seconds
        self.sent, self.received, self.seconds = 0, 0, 0.0
        return found

    @property
    def hidden_size(self) -> int:
        return self._llm.hidden_size

    @property
    def fingerprint(self) -> str:
        return self._llm.fingerprint

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self._llm.embed(ids)

    def step(self, sequences: Sequences, labels: torch.Tensor, weights: torch.Tensor) -> StepResult:
        with self._computing(sequences.values):
            found = self._llm.step(sequences, labels, weights)
        self.received += found.gradient.nbytes
        return found

    def score(self, sequences: Sequences, labels: torch.Tensor) -> ScoreResult:
        with self._computing(sequences.values):
            return self._llm.score(sequences, labels)

    def forward(
        self, sequences: Sequences, positions: torch.Tensor, keep: bool = True
    ) -> ForwardResult:
        with self._computing(sequences.values):
            found = self._llm.forward(sequences, positions, keep)
        self.received += found.logits.nbytes
        return found

    def backward(
        self,
        activation: str,
        logits_gradient: torch.Tensor,
        sequences: Sequences,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        with self._computing(logits_gradient):
            found = self._llm.backward(activation, logits_gradient, sequences, positions)
        self.received += found.nbytes
        return found

    def generate(
        self, sequences: Sequences, sampling: Sampling, text_adapter: LowRank | None = None
    ) -> Iterator[list[NewToken]]:
        if text_adapter is not None:
            self.sent += text_adapter.down.nbytes + text_adapter.up.nbytes
        with self._computing(sequences.values):
            yield from self._llm.generate(sequences, sampling, text_adapter)

    @contextmanager
    def _computing(self, sent: torch.Tensor) -> Iterator[None]:
        self.sent += sent.nbytes
        start = time.thread_time()  # of this thread: another one prepares the next batch
        try:
            yield
        finally:
            self.seconds += time.thread_time() - start
