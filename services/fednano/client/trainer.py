"""A client's work in a round: the split training loop, the Fisher estimate, and evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from fednano.client.adapters import NanoAdapters, Tensors
from fednano.client.ahead import one_ahead
from fednano.client.batches import Batch
from fednano.client.edge import EdgeHalf, NanoEdge
from fednano.client.examples import Example
from fednano.client.factored import FactoredLanguageModel
from fednano.client.fisher import FisherEstimate
from fednano.client.judging import (
    Judgement,
    Rank,
    accuracies,
    choices,
    mean,
    mean_losses,
    measures,
)
from fednano.client.portions import TooLong
from fednano.client.scaffold import Correction
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
    gradient: Tensors = field(default_factory=dict)
    """SCAFFOLD's new c_i: the mean of the batches' own gradients, by the adapter's tensors."""


@dataclass(frozen=True)
class EvaluationResult:
    """`accuracy` is that of the answers written, word for word; of choices if there are only those."""

    accuracy: float
    loss: float  # mean over samples of the mean over labelled tokens, teacher-forced
    samples: int
    by_kind: dict[str, float]  # accuracy of each kind of question
    measures: dict[str, float]
    """What else was measured, by name: `f1`, `retrieval.recall1` ... (judging.py)."""


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
    correction: Correction | None  # SCAFFOLD's
    max_grad_norm: float

    @classmethod
    def begin(
        cls,
        parameters: Iterable[torch.nn.Parameter],
        settings: TrainingConfig,
        mu: float = 0.0,
        correction: Correction | None = None,
    ) -> Learning:
        """Of these parameters, those that are not frozen."""
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, settings.learning_rate, weight_decay=settings.weight_decay
        )
        origin = [parameter.detach().clone() for parameter in trained] if mu else []
        return cls(optimizer, trained, origin, mu, correction, settings.max_grad_norm)

    def step(self, crossed: Crossed) -> None:
        """From the cut into the adapters, and a step of the optimiser."""
        self.optimizer.zero_grad()
        crossed.backward()
        for parameter, origin in zip(self.trained, self.origin, strict=False):
            if parameter.grad is not None:  # else it never left its origin
                parameter.grad += self.mu * (parameter.detach() - origin)
        if self.correction is not None:
            self.correction.apply()
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
        correction: Tensors | None = None,
    ) -> TrainResult:
        """Local epochs of AdamW from `adapters`, which are changed in place, but for what of them is
        frozen.

        The optimiser's state is fresh in every round. With `mu` the loss has FedProx's term
        mu / 2 |theta - theta_0|^2, theta_0 what the round began with. With `correction`, which is
        c - c_i, its gradients are SCAFFOLD's; a tensor that it lacks is 0.
        """
        start = time.perf_counter()
        adapters.to(self.edge.device)
        corrected = Correction(adapters, correction) if correction is not None else None
        learning = Learning.begin(adapters.parameters(), settings, mu, corrected)
        nano, estimate = NanoEdge(adapters), FisherEstimate(adapters)
        wire = self._wire(settings.loss)
        passes = settings.epochs + (fisher == "extra-pass")
        losses: list[float] = []
        with one_ahead(self._passes(epochs, settings, passes)) as batches:
            for ready in batches:
                progress(ready.share)
                last = ready.number == passes - 1 and fisher != "none"
                with named(ready.examples):
                    crossed = wire.step(
                        nano, ready.batch, estimate if last else None, batches.begin
                    )
                if ready.number < settings.epochs:
                    learning.step(crossed)
                if ready.number == settings.epochs - 1:
                    losses += mean_losses(crossed)
        return TrainResult(
            adapter=adapters.to_tensors(),
            fisher=estimate.mean() if fisher != "none" else {},
            samples=len(losses),
            loss=mean(losses),
            seconds=time.perf_counter() - start,
            gradient=learning.correction.mean() if learning.correction else {},
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
            batch = self._wire().ready([self.edge.prepare(example) for example in chosen])
            yield Ready(chosen, batch.to(self.edge.device), start / len(examples))

    def _wire(self, loss: str = "server") -> Wire:
        return FactoredWire(self.factored, loss) if self.factored else DenseWire(self.llm, loss)

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
        judged: list[Judgement] = []
        ranked: list[Rank] = []
        losses: list[float] = []
        nano = NanoEdge(adapters.to(self.edge.device))
        with one_ahead(self._ready(examples, batch_size)) as batches:
            for ready in batches:
                batches.begin()
                progress(ready.share)
                with named(ready.examples):
                    score = self._wire().score(nano, ready.batch)
                losses += mean_losses(score)
                judged += self._judged(adapters, ready.examples, score, max_new_tokens)
                ranked += self._ranks(nano, ready, batch_size, progress)
        accuracy, by_kind = accuracies(judged, ranked)
        measured = measures(judged, ranked)
        return EvaluationResult(accuracy, mean(losses), len(losses), by_kind, measured)

    def _judged(
        self,
        adapters: NanoAdapters,
        examples: Sequence[Example],
        score: ScoreResult,
        max_new_tokens: int,
    ) -> Iterator[Judgement]:
        """Of the sure answers, then of the others; what is to be chosen is not written."""
        written = score.token_counts <= max_new_tokens
        sure = ((score.correct_counts == score.token_counts) & written).tolist()
        asked = [
            (e, is_sure) for e, is_sure in zip(examples, sure, strict=True) if not e.candidates
        ]
        yield from (Judgement.of(example, example.answer) for example, is_sure in asked if is_sure)
        unsure = [example for example, is_sure in asked if not is_sure]
        answers = self.answers(adapters, unsure, Sampling(max_new_tokens)) if unsure else []
        yield from map(Judgement.of, unsure, answers)

    def _ranks(
        self, nano: NanoEdge, part: Ready, batch_size: int, progress: Progress
    ) -> Iterator[Rank]:
        """Of the right one among each example's candidates, by what the LLM scores them."""
        offering = [example for example in part.examples if example.candidates]
        texts = [text for example in offering for text in choices(example)]
        losses: list[float] = []
        with one_ahead(self._ready(texts, batch_size)) as batches:
            for ready in batches:
                batches.begin()
                progress(part.share)
                with named(ready.examples):
                    losses += mean_losses(self._wire().score(nano, ready.batch))
        for example in offering:
            own, losses = losses[: len(example.candidates)], losses[len(example.candidates) :]
            yield Rank.of(example, own)

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
        batch, nano = batch.to(self.edge.device), NanoEdge(adapters.to(self.edge.device))
        text = adapters.of(Modality.TEXT)
        low_rank = text.low_rank() if text else None
        for tokens in self._wire().generate(nano, batch, sampling, low_rank):
            for token in tokens:
                yield token.sample, token.id


@contextmanager
def named(examples: Sequence[Example]) -> Iterator[None]:
    """Whoever must mend the data is told which of these examples it is."""
    try:
        yield
    except TooLong as error:
        field = f"example {examples[error.place].id!r}"
        (problem,) = error.problems
        raise InvalidRequest.of(field, problem.expected, problem.got) from error
