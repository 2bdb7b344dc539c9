"""One federation of an experiment, in this process: the clients' trainer, the coordinator's strategies.

It takes the decisions that the services take, in the same order and from the same seeds, so that in
deterministic mode it ends in the same adapter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from fednano.client.cache import FeatureCache
from fednano.client.datasets import TASKS, Dataset, Shard
from fednano.client.edge import EdgeHalf
from fednano.client.examples import Example
from fednano.client.methods import LocalRound
from fednano.client.personal import COMPARED_BY, Kept, Mixture
from fednano.client.placements import NanoPlacement, Placement
from fednano.client.placements_connector import ConnectorEdge, ConnectorPlacement, cache_of
from fednano.client.placements_lora import LoraPlacement
from fednano.client.scaffold import Controls
from fednano.client.trainer import EvaluationResult, Trainer
from fednano.client.weights import trainable
from fednano.coordinator.cohorts import evaluating_roles, sample_cohort
from fednano.coordinator.records import Tensors
from fednano.coordinator.store_adapters import make_adapter
from fednano.coordinator.strategies import State, Update, first_adapter, strategy_of
from fednano.lab.experiment.attacks import Flipped, attackers, forged
from fednano.lab.experiment.metered import MeteredLanguageModel
from fednano.lab.experiment.plan import Cell
from fednano.lab.experiment.results import Figures, RoundFigures, Spent
from fednano.models.frozen import FrozenLLM
from fednano.wire.placements import trained_by
from fednano.wire.run_config import RunConfig

_RUN = "cell"  # in which a client keeps its controls


@dataclass(frozen=True)
class Bench:
    """A model, loaded once, on which cells are run."""

    llm: MeteredLanguageModel
    trainer: Trainer
    halves: Path

    @classmethod
    def load(cls, halves: Path) -> Bench:
        """In fp32 and on one thread, as in deterministic mode."""
        torch.set_num_threads(1)
        disable_progress_bar()
        llm = MeteredLanguageModel(FrozenLLM.load(halves / "llm", device="cpu", dtype="fp32"))
        cache = FeatureCache(llm.fingerprint)
        return cls(llm, Trainer(EdgeHalf(halves / "edge", llm, cache), llm), halves)

    def placed(self, config: RunConfig) -> Placement:
        """Where the run's weights lie."""
        rank, scale = config.adapter.rank, config.adapter.scale
        if config.placement == "connector":
            return ConnectorPlacement(self._connector, self.llm, config.training.loss)
        if config.placement == "lora":
            frozen, half = config.strategy.name == "ffa", self.halves / "llm"
            return LoraPlacement.load(half, rank, scale, lambda llm: self.trainer.edge, frozen)
        return NanoPlacement(self.trainer, scale)

    def first(self, config: RunConfig) -> Tensors:
        """The run's adapter before any training."""
        inside = self.halves / "llm" if config.placement == "lora" else None
        weights = trainable(self.halves / "edge", inside)
        chosen = trained_by(config.placement, weights)
        return first_adapter(config, self.llm.hidden_size, chosen)

    @cached_property
    def _connector(self) -> ConnectorEdge:
        """Loaded once: it keeps what the encoder made of each image."""
        return ConnectorEdge(self.halves / "edge", self.llm, cache_of(self.llm.fingerprint))


@dataclass
class Meter:
    """What clients spent in a round."""

    llm: MeteredLanguageModel
    _spent: list[Spent] = field(default_factory=list)

    @contextmanager
    def client(self, beside: Callable[[], tuple[int, int]]) -> Iterator[None]:
        """Around one client's training; `beside` is what it sent and received besides."""
        self.llm.take()
        start = time.process_time()
        yield
        sent, received, seconds = self.llm.take()
        own = time.process_time() - start - seconds
        up, down = beside()
        self._spent.append(Spent(sent + up, received + down, own, seconds))

    def take(self) -> Spent:
        """On average, since the last time."""
        spent, self._spent = self._spent, []
        if not spent:
            return Spent()
        return Spent(
            sent=round(mean(each.sent for each in spent)),
            received=round(mean(each.received for each in spent)),
            client_seconds=mean(each.client_seconds for each in spent),
            llm_seconds=mean(each.llm_seconds for each in spent),
        )


@dataclass(frozen=True)
class Pooled:
    """What everybody has, as one data set."""

    shards: Sequence[Dataset]

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def epoch(self, seed: int, round_number: int, epoch: int, client: str) -> list[Example]:
        """Every shard's epoch, shuffled together."""
        found = [
            example
            for number, shard in enumerate(self.shards)
            for example in shard.epoch(seed, round_number, epoch, shard_name(number))
        ]
        order = np.random.default_rng([seed, round_number, epoch, *client.encode()])
        return [found[index] for index in order.permutation(len(found))]

    def held_back(self) -> Sequence[Example]:
        return [example for shard in self.shards for example in shard.held_back()]


def shard_name(member: int) -> str:
    """What the order of a member's data hangs on, in the services too."""
    return f"shard-{member}"


class Solo:
    """A whole federation in one process."""

    def __init__(self, bench: Bench, cell: Cell, progress: Callable[[str], None]) -> None:
        self._bench, self._cell, self._say = bench, cell, progress
        self._meter = Meter(bench.llm)
        self._placed = bench.placed(cell.config)
        config = cell.config
        self._config: RunConfig = config
        shards: list[Dataset] = [
            Shard.deal(config.data, config.seed, member, config.clients)
            for member in range(config.clients)
        ]
        self._held_back = [shard.held_back() for shard in shards]
        self._bad = attackers(cell.attack, config.clients, config.seed)
        if cell.attack.kind == "label-flip":
            task = TASKS[config.data.source]
            lessons = [one for picture in task.pictures("train") for one in task.lessons(picture)]
            shards = [
                Flipped.made(shard, lessons) if member in self._bad else shard
                for member, shard in enumerate(shards)
            ]
        self._shards: list[Dataset] = shards
        self._controls = [Controls() for _ in shards]
        self._moments: list[Tensors] = [{} for _ in config.shadows]

    @cached_property
    def _exam(self) -> list[Example]:
        """The global test set, or the validation set in its place."""
        data = self._config.data
        task = TASKS[data.source]
        chosen = task.pictures("validation" if self._cell.split == "validation" else "test")
        chosen = chosen[: data.evaluation_limit or None]
        return [example for picture in chosen for example in task.exam(picture)]

    def run(self) -> Figures:
        start = time.perf_counter()
        ways = {
            "federated": self._federated,
            "local": self._local,
            "centralised": self._centralised,
        }
        self._warm()
        figures = ways[self._cell.method.reach]()
        return replace(figures, seconds=time.perf_counter() - start)

    def _warm(self) -> None:
        """Encodes every image, as a client does once: which cell comes first in a process must not
        show in what training costs."""
        for member, shard in enumerate(self._shards):
            for example in shard.epoch(self._config.seed, 0, 0, shard_name(member)):
                self._placed.edge.prepare(example)

    def _federated(self) -> Figures:
        config = self._config
        state = State(self._bench.first(config))
        rounds = [self._evaluated(0, state.adapter)]
        for number in range(1, config.rounds + 1):
            self._say(f"round {number} of {config.rounds}")
            states, loss = self._round(number, state)
            state = states[0]
            others = {
                shadow.label: other.adapter
                for shadow, other in zip(config.shadows, states[1:], strict=True)
            }
            rounds.append(self._evaluated(number, state.adapter, loss, others))
        digest = make_adapter(state.adapter, config.adapter.scale).digest
        if self._cell.method.personal:
            return replace(self._personal(state.adapter, rounds), adapter=digest)
        own = self._own([state.adapter] * config.clients)
        return Figures(rounds, own, [], [], digest, 0.0)

    def _round(self, number: int, before: State) -> tuple[list[State], float]:
        """What the leading strategy and its shadows make of a round's updates; the training loss."""
        config = self._config
        cohort = sample_cohort(range(config.clients), config, number)
        updates, losses = [], []
        for member in cohort:
            update, loss = self._update(member, number, before)
            updates.append(update)
            losses.append(loss)
        leader = strategy_of(config.strategy, config.clients).advance(before, updates)
        shadows = [
            strategy_of(shadow, config.clients).advance(State(before.adapter, moments), updates)
            for shadow, moments in zip(config.shadows, self._moments, strict=True)
        ]
        self._moments = [state.moments for state in shadows]
        return [leader, *shadows], mean(losses)

    def _update(self, member: int, number: int, before: State) -> tuple[Update, float]:
        """What a client sends after its local epochs."""
        controls = self._controls[member]
        local = replace(
            self._local_round(number, shard_name(member), before.adapter),
            rank=self._config.adapter.rank_of(member),
            handed=before.handed,
            control=controls.of(_RUN, number),
        )
        sent: dict[str, Tensors] = {}
        with self._meter.client(lambda: (_size(sent["up"]), _size(before.adapter | before.handed))):
            result = self._placed.train(local, self._shards[member])
            beside = result.fisher | controls.moved(_RUN, number, result.gradient)
            controls.keep(_RUN, number, result.gradient)
            adapter = result.adapter
            if member in self._bad:
                adapter = forged(self._cell.attack, before.adapter, adapter)
            sent["up"] = adapter | beside
        return Update(local.name, result.samples, adapter, beside), result.loss

    def _local_round(self, number: int, name: str, base: Tensors) -> LocalRound:
        config = self._config
        return LocalRound(config, number, name, config.adapter.rank, base, config.training)

    def _evaluated(
        self,
        number: int,
        adapter: Tensors,
        train_loss: float | None = None,
        shadows: dict[str, Tensors] | None = None,
    ) -> RoundFigures:
        spent = self._meter.take()
        if "evaluator" not in evaluating_roles(self._config, number):
            return RoundFigures(number, None, None, train_loss, spent=spent)
        found = self._scored(adapter, self._exam)
        return RoundFigures(
            number,
            found.accuracy,
            found.loss,
            train_loss,
            {f"accuracy.{kind}": value for kind, value in found.by_kind.items()} | found.measures,
            spent,
            {
                label: self._scored(other, self._exam).accuracy
                for label, other in (shadows or {}).items()
            },
        )

    def _scored(self, adapter: Tensors, examples: Sequence[Example]) -> EvaluationResult:
        return self._placed.evaluate(adapter, examples, self._config.evaluation.max_new_tokens)

    def _own(self, adapters: Sequence[Tensors]) -> list[float]:
        """Accuracy of each client's adapter on what it held back."""
        return [
            self._scored(adapter, examples).accuracy
            for adapter, examples in zip(adapters, self._held_back, strict=True)
        ]

    def _alone(self, data: Dataset, name: str, adapter: Tensors, numbers: range) -> Tensors:
        """Local rounds without anybody else."""
        for number in numbers:
            local = self._local_round(number, name, adapter)
            with self._meter.client(lambda: (0, 0)):
                result = self._placed.train(local, data)
            adapter = result.adapter
        return adapter

    def _local(self) -> Figures:
        """Every client by itself; on the global test set, the clients' mean."""
        config, first = self._config, self._bench.first(self._config)
        start = self._evaluated(0, first)
        adapters = []
        for member, shard in enumerate(self._shards):
            self._say(f"client {member + 1} of {config.clients}")
            numbers = range(1, config.rounds + 1)
            adapters.append(self._alone(shard, shard_name(member), first, numbers))
        spent = self._meter.take()
        found = [self._scored(adapter, self._exam) for adapter in adapters]
        end = RoundFigures(
            config.rounds,
            mean(each.accuracy for each in found),
            mean(each.loss for each in found),
            measures=_means([each.measures for each in found]),
            spent=spent,
        )
        tested = [each.accuracy for each in found]
        return Figures([start, end], self._own(adapters), [], tested, "", 0.0)

    def _centralised(self) -> Figures:
        """As if one client had everybody's data."""
        config, adapter = self._config, self._bench.first(self._config)
        rounds, pooled = [self._evaluated(0, adapter)], Pooled(self._shards)
        for number in range(1, config.rounds + 1):
            self._say(f"round {number} of {config.rounds}")
            adapter = self._alone(pooled, "pooled", adapter, range(number, number + 1))
            rounds.append(self._evaluated(number, adapter))
        return Figures(rounds, self._own([adapter] * config.clients), [], [], "", 0.0)

    def _personal(self, shared: Tensors, rounds: list[RoundFigures]) -> Figures:
        """Each client goes on from the merged adapter for another round, and keeps what comes."""
        config, own, tested = self._config, [], []
        following = range(config.rounds + 1, config.rounds + 2)
        for member, shard in enumerate(self._shards):
            self._say(f"client {member + 1} of {config.clients} goes on by itself")
            adapter = self._alone(shard, shard_name(member), shared, following)
            mixes = self._cell.method.personal == "feddpa-f"
            score = self._mixing(shared, adapter, shard) if mixes else self._scoring(adapter)
            own.append(score(self._held_back[member]).accuracy)
            tested.append(score(self._exam).accuracy)
        self._meter.take()
        return Figures(rounds, own, self._own([shared] * config.clients), tested, "", 0.0)

    def _scoring(self, adapter: Tensors) -> Callable[[Sequence[Example]], EvaluationResult]:
        return partial(self._scored, adapter)

    def _mixing(
        self, shared: Tensors, own: Tensors, data: Dataset
    ) -> Callable[[Sequence[Example]], EvaluationResult]:
        """Scores FedDPA-F's mixture of both adapters."""
        config, placed = self._config, self._placed
        compared = data.epoch(config.seed, config.rounds + 1, 0, COMPARED_BY)
        mixture = Mixture.of(placed.edge, shared, own, compared)
        kept, longest = Kept(config.adapter.scale, own, mixture), config.evaluation.max_new_tokens
        return lambda examples: kept.score(placed, examples, longest)


def _means(measured: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: mean(each[name] for each in measured) for name in measured[0]}


def _size(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
