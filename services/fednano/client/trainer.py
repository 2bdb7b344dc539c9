"""A client's work in a round: the split training loop, the Fisher estimate, and evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch

from fednano.client.adapters import NanoAdapters, Tensors
from fednano.client.ahead import one_ahead
from fednano.client.batches import Batch
from fednano.client.edge import EdgeHalf, NanoEdge
from fednano.client.examples import Example
from fednano.client.factored import FactoredLanguageModel
from fednano.client.fisher import FisherEstimate
from fednano.client.portions import TooLong
from fednano.client.wires import Crossed, DenseWire, FactoredWire, Wire
from fednano.models.language_model import LanguageModel, Modality, Sampling, ScoreResult
from fednano.wire.errors import InvalidRequest
from fednano.wire.run_config import TrainingConfig

FisherMode = Literal["none", "last-epoch", "extra-pass"]
Epochs = Callable[[int], Sequence[Example]]
"""The examples of local epoch e, in the order in which they are trained on."""
Progress = Callable[[float], None]
"""Told the share that is done, 0 to 1; may raise to give the task up."""


@dataclass(frozen=True)
class TrainResult:
    """What a client uploads after a round."""

    adapter: Tensors
    fisher: Tensors  # "fisher.image.down" ...; empty where none was asked for
    samples: int
    loss: float  # mean over the last epoch's samples, of the mean over labelled tokens
    seconds: float


@dataclass(frozen=True)
class EvaluationResult:
    """`accuracy` is exact match of greedily generated answers."""

    accuracy: float
    loss: float  # mean over samples of the mean over labelled tokens, teacher-forced
    samples: int
    by_kind: dict[str, float]  # accuracy of each kind of question


@dataclass(frozen=True)
class Ready:
    """A batch that only lacks the adapters."""

    examples: Sequence[Example]
    batch: Batch
    share: float  # of the work that lies before it
    number: int = 0  # of the pass


@dataclass(frozen=True)
class Learning:
    """What a client changes in a round, and how."""

    optimizer: torch.optim.Optimizer
    trained: list[torch.nn.Parameter]
    origin: list[torch.Tensor]  # of each, as the round began; empty without a proximal term
    mu: float
    max_grad_norm: float

    @classmethod
    def begin(cls, adapters: NanoAdapters, settings: TrainingConfig, mu: float) -> Learning:
        trained = [parameter for parameter in adapters.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, settings.learning_rate, weight_decay=settings.weight_decay
        )
        origin = [parameter.detach().clone() for parameter in trained] if mu else []
        return cls(optimizer, trained, origin, mu, settings.max_grad_norm)

    def step(self, crossed: Crossed) -> None:
        """From the cut into the adapters, and a step of the optimiser."""
        self.optimizer.zero_grad()
        crossed.backward()
        for parameter, origin in zip(self.trained, self.origin, strict=False):
            if parameter.grad is not None:  # else it never left its origin
                parameter.grad += self.mu * (parameter.detach() - origin)
        if self.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.trained, self.max_grad_norm)
        self.optimizer.step()


@dataclass(frozen=True)
class Trainer:
    """Trains adapters for one client against a frozen LLM, wherever that runs."""

    edge: EdgeHalf
    llm: LanguageModel
    factored: FactoredLanguageModel | None = None
    """The same LLM by the factored wire, where that is used."""

    def train(
        self,
        adapters: NanoAdapters,
        epochs: Epochs,
        settings: TrainingConfig,
        fisher: FisherMode = "none",
        progress: Progress = lambda share: None,
        mu: float = 0.0,
    ) -> TrainResult:
        """Local epochs of AdamW from `adapters`, which are changed in place, but for what of them is
        frozen.

        The optimiser's state is fresh in every round. With `mu` the loss has FedProx's term
        mu / 2 |theta - theta_0|^2, theta_0 what the round began with.
        """
        start = time.perf_counter()
        learning = Learning.begin(adapters, settings, mu)
        nano, estimate = NanoEdge(adapters), FisherEstimate(adapters)
        wire = self._wire(settings.loss)
        passes = settings.epochs + (fisher == "extra-pass")
        losses: list[float] = []
        with one_ahead(self._passes(epochs, settings, passes)) as batches:
            for ready in batches:
                progress(ready.share)
                last = ready.number == passes - 1 and fisher != "none"
                with _named(ready.examples):
                    crossed = _step(nano, ready.batch, wire, estimate if last else None)
                if ready.number < settings.epochs:
                    learning.step(crossed)
                if ready.number == settings.epochs - 1:
                    losses += (crossed.loss_sums / crossed.token_counts).tolist()
        return TrainResult(
            adapter=adapters.to_tensors(),
            fisher=estimate.mean() if fisher != "none" else {},
            samples=len(losses),
            loss=_mean(losses),
            seconds=time.perf_counter() - start,
        )

    def _passes(self, epochs: Epochs, settings: TrainingConfig, passes: int) -> Iterator[Ready]:
        """Every batch of all passes; what comes after the last epoch has its examples again."""
        examples: Sequence[Example] = ()
        for number in range(passes):
            if number < settings.epochs:
                examples = epochs(number)
            for ready in self._ready(examples, settings.batch_size):
                yield replace(ready, number=number, share=(number + ready.share) / passes)

    def _ready(self, examples: Sequence[Example], size: int) -> Iterator[Ready]:
        for start in range(0, len(examples), size):
            chosen = list(examples[start : start + size])  # opens their images
            batch = Batch.of([self.edge.prepare(example) for example in chosen])
            yield Ready(chosen, batch, start / len(examples))

    def _wire(self, loss: str = "server") -> Wire:
        return FactoredWire(self.factored) if self.factored else DenseWire(self.llm, loss)

    @torch.no_grad()
    def evaluate(
        self,
        adapters: NanoAdapters,
        examples: Sequence[Example],
        max_new_tokens: int = 8,
        batch_size: int = 64,
        progress: Progress = lambda share: None,
    ) -> EvaluationResult:
        """Exact match of greedily generated answers, and the loss of the wanted ones.

        Where the model ranks every token of the wanted answer and its end first, greedy generation
        writes that answer, token by token; so only the other answers, and those that are too long,
        have to be generated.
        """
        hits: list[tuple[str, bool]] = []
        losses: list[float] = []
        nano = NanoEdge(adapters)
        with one_ahead(self._ready(examples, batch_size)) as batches:
            for ready in batches:
                progress(ready.share)
                with _named(ready.examples):
                    score = self._wire().score(nano, ready.batch)
                losses += (score.loss_sums / score.token_counts).tolist()
                hits += self._hits(adapters, ready.examples, score, max_new_tokens)
        kinds = sorted({kind for kind, _ in hits if kind})
        return EvaluationResult(
            accuracy=_mean([hit for _, hit in hits]),
            loss=_mean(losses),
            samples=len(hits),
            by_kind={k: _mean([hit for kind, hit in hits if kind == k]) for k in kinds},
        )

    def _hits(
        self,
        adapters: NanoAdapters,
        examples: Sequence[Example],
        score: ScoreResult,
        max_new_tokens: int,
    ) -> Iterator[tuple[str, bool]]:
        """Kind of question and whether the answer is right: of the sure ones, then of the others."""
        written = score.token_counts <= max_new_tokens
        sure = ((score.correct_counts == score.token_counts) & written).tolist()
        yield from ((e.kind, True) for e, is_sure in zip(examples, sure, strict=True) if is_sure)
        unsure = [example for example, is_sure in zip(examples, sure, strict=True) if not is_sure]
        answers = self.answers(adapters, unsure, Sampling(max_new_tokens)) if unsure else []
        for example, answer in zip(unsure, answers, strict=True):
            yield example.kind, _same(answer, example.answer)

    def answers(
        self, adapters: NanoAdapters, examples: Sequence[Example], sampling: Sampling
    ) -> list[str]:
        """What the model answers to each example's question."""
        ids: list[list[int]] = [[] for _ in examples]
        for sample, token in self.stream(adapters, examples, sampling):
            ids[sample].append(token)
        return [self.edge.answer_text(tokens) for tokens in ids]

    @torch.no_grad()
    def stream(
        self, adapters: NanoAdapters, examples: Sequence[Example], sampling: Sampling
    ) -> Iterator[tuple[int, int]]:
        """(sample, token) as the LLM produces them."""
        batch = Batch.of([self.edge.prepare(e, with_answer=False) for e in examples])
        text = adapters.of(Modality.TEXT)
        low_rank = text.low_rank() if text else None
        for tokens in self._wire().generate(NanoEdge(adapters), batch, sampling, low_rank):
            for token in tokens:
                yield token.sample, token.id


def _step(nano: NanoEdge, batch: Batch, wire: Wire, estimate: FisherEstimate | None) -> Crossed:
    """Across the cut and back; the batch's loss is a mean of its samples' means."""
    weights = 1 / (batch.label_counts * len(batch))
    return wire.step(nano, batch, weights, estimate)


@contextmanager
def _named(examples: Sequence[Example]) -> Iterator[None]:
    """Whoever must mend the data is told which of these examples it is."""
    try:
        yield
    except TooLong as error:
        field = f"example {examples[error.place].id!r}"
        (problem,) = error.problems
        raise InvalidRequest.of(field, problem.expected, problem.got) from error


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _same(answer: str, wanted: str) -> bool:
    return answer.strip().casefold() == wanted.strip().casefold()
