"""A client's tasks in a run: train on a shard, evaluate adapters, submit either."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fednano.client.adapters import Tensors
from fednano.client.coordination import Adapter, CoordinatorClient, Membership
from fednano.client.datasets import Dataset, JsonlDataset, Shard, global_test_set
from fednano.client.examples import Example
from fednano.client.heartbeat import Heartbeat, TaskGivenUp
from fednano.client.methods import LocalRound
from fednano.client.personal import COMPARED_BY, Kept, Mixture, kept_at
from fednano.client.placements import Placement
from fednano.client.scaffold import Controls
from fednano.client.trainer import EvaluationResult, TrainResult
from fednano.wire import coordinator_pb2 as pb
from fednano.wire.errors import InvalidRequest, NotFound
from fednano.wire.run_config import TrainingConfig

log = logging.getLogger(__name__)


@dataclass
class Worker:
    """Does what the coordinator hands out, for one membership."""

    coordinator: CoordinatorClient
    member: Membership
    placement: Placement
    heartbeat: Heartbeat
    own_data: JsonlDataset | None = None
    evaluator: bool = False
    controls: Controls = field(default_factory=Controls)
    directory: Path | None = None
    """Where the client keeps what is its own after a run."""
    _adapters: dict[str, Adapter] = field(default_factory=dict)
    _dataset: tuple[tuple[int, int], Dataset] | None = None

    def train(self, task: pb.TrainTask) -> None:
        """Local training from the round's adapter, then Submit. Raises TaskGivenUp."""
        with self.heartbeat.on(task, f"training, round {task.round}"):
            base, data = self._adapter(task.adapter), self._data(task.shard, task.of)
            log.info("training", extra={"samples": len(data)})
            result = self._trained(task, base, data)
            head = pb.SubmitHead(
                header=self.coordinator.header(self.member, task),
                base=base.digest,
                samples=result.samples,
                metrics={"train_loss": result.loss},
            )
            moved = self.controls.moved(self.member.run, task.round, result.gradient)
            reply = self.coordinator.submit(head, result.adapter, result.fisher | moved)
        if reply.result in (pb.SubmitReply.ACCEPTED, pb.SubmitReply.DUPLICATE):
            self.controls.keep(self.member.run, task.round, result.gradient)
        _log_reply("update", reply, loss=round(result.loss, 4))

    def _trained(self, task: pb.TrainTask, base: Adapter, data: Dataset) -> TrainResult:
        local = LocalRound(
            config=self.member.config,
            number=task.round,
            name=self._stable_name(task),
            rank=task.rank or self.member.config.adapter.rank,
            base=base.tensors,
            training=TrainingConfig.model_validate_json(task.hyper_json),
            handed=self._handed(task),
            control=self.controls.of(self.member.run, task.round),
        )
        return self.placement.train(local, data, self.heartbeat.progress)

    def _handed(self, task: pb.TrainTask) -> Tensors:
        """SCAFFOLD's c. Raises TaskGivenUp where it has moved on, and with it the round."""
        handed: Tensors = {}
        for digest in task.auxiliary:
            try:
                handed |= self._fetched(digest).tensors
            except NotFound as error:
                raise TaskGivenUp(str(error)) from error
        return handed

    def _stable_name(self, task: pb.TrainTask | pb.EvaluateTask) -> str:
        """What the order of the data hangs on: the shard, so that who leases it doesn't matter."""
        return f"shard-{task.shard}" if task.of else self.coordinator.client

    def evaluate(self, task: pb.EvaluateTask) -> None:
        """Exact match and loss of each adapter, then SubmitEvaluation. Raises TaskGivenUp."""
        with self.heartbeat.on(task, f"evaluating, round {task.round}"):
            examples = self._evaluation_examples(task)
            leader, *shadows = task.adapters
            found = {leader: self._evaluated(self._adapter(leader), examples)}
            found |= self._evaluated_beside(shadows, examples)
            evaluations = [_evaluation(digest, result) for digest, result in found.items()]
            evaluations[0].metrics.update(self._personal(task, self._adapter(leader)))
            request = pb.SubmitEvaluationRequest(
                header=self.coordinator.header(self.member, task), evaluations=evaluations
            )
            reply = self.coordinator.submit_evaluation(request)
        for result in found.values():
            _log_reply("evaluation", reply, accuracy=round(result.accuracy, 4))

    def _personal(self, task: pb.EvaluateTask, merged: Adapter) -> dict[str, float]:
        """After the last round: an adapter of the client's own, trained from the merged one and kept;
        what it is worth. Nothing where the run wants none."""
        config = self.member.config
        if config.personal == "none" or self.evaluator or task.round != config.rounds:
            return {}
        data = self._data(task.shard, task.of)
        local = LocalRound(
            config=config,
            number=config.rounds + 1,
            name=self._stable_name(task),
            rank=config.adapter.rank,
            base=merged.tensors,
            training=config.training,
        )
        own = self.placement.train(local, data, self.heartbeat.progress).adapter
        mixture = None
        if config.personal == "feddpa-f":
            compared = data.epoch(config.seed, local.number, 0, COMPARED_BY)
            mixture = Mixture.of(self.placement.edge, merged.tensors, own, compared)
        kept = Kept(merged.scale, own, mixture)
        self._keep(kept)
        return self._worth(kept, data)

    def _worth(self, kept: Kept, data: Dataset) -> dict[str, float]:
        """On what the client held back, and on the global test set where that is a built-in task's."""
        config, progress = self.member.config, self.heartbeat.progress
        longest = config.evaluation.max_new_tokens
        own = kept.score(self.placement, data.held_back(), longest, progress)
        found = {"personal.accuracy": own.accuracy, "personal.loss": own.loss}
        if config.data.dealt:
            everybody = kept.score(self.placement, global_test_set(config.data), longest, progress)
            found["personal.global_accuracy"] = everybody.accuracy
        return found

    def _keep(self, kept: Kept) -> None:
        if self.directory is None:
            log.warning("no cache directory: the client's own adapter is scored and not kept")
            return
        path = kept_at(self.directory, self.member.run, self.coordinator.client)
        kept.save(path)
        log.info("the client's own adapter is kept", extra={"path": str(path)})

    def _evaluated_beside(
        self, shadows: Sequence[str], examples: Sequence[Example]
    ) -> dict[str, EvaluationResult]:
        """Of what shadows made, so much as can be evaluated: the round's own result must not be lost
        because one of them is gone already, or has left what the LLM can take."""
        found = {}
        for digest in shadows:
            try:
                result = self._evaluated(self._fetched(digest), examples)
                if not math.isfinite(result.loss):
                    raise InvalidRequest.of("loss", "a finite number", result.loss)
                found[digest] = result
            except (InvalidRequest, NotFound) as error:
                log.warning("a shadow can't be evaluated", extra={"reason": str(error)})
        return found

    def _evaluated(self, adapter: Adapter, examples: Sequence[Example]) -> EvaluationResult:
        longest = self.member.config.evaluation.max_new_tokens
        return self.placement.evaluate(adapter.tensors, examples, longest, self.heartbeat.progress)

    def _adapter(self, digest: str) -> Adapter:
        """From the coordinator, or the one that was fetched last."""
        if digest not in self._adapters:
            self._adapters = {digest: self._fetched(digest)}
        return self._adapters[digest]

    def _fetched(self, digest: str) -> Adapter:
        request = pb.GetAdapterRequest(
            header=self.coordinator.header(self.member), run=self.member.run, digest=digest
        )
        return self.coordinator.adapter(request)

    def _data(self, shard: int, of: int) -> Dataset:
        """The run's shard, or the site's own data. Raises InvalidRequest where there is none."""
        config = self.member.config
        if not config.data.dealt:
            if self.own_data is None:
                raise InvalidRequest(
                    f"run {self.member.run} trains on the clients' own data: give --data FILE"
                )
            return self.own_data
        if self._dataset is None or self._dataset[0] != (shard, of):
            dealt = Shard.deal(config.data, config.seed, shard, of)
            self._dataset = (shard, of), dealt
        return self._dataset[1]

    def _evaluation_examples(self, task: pb.EvaluateTask) -> Sequence[Example]:
        config = self.member.config
        if not self.evaluator:
            return self._data(task.shard, task.of).held_back()
        if config.data.dealt:
            return global_test_set(config.data)
        if self.own_data is None:
            raise InvalidRequest("the evaluator of a run on own data needs --data FILE")
        return self.own_data.everything()[: config.data.evaluation_limit or None]


def _log_reply(what: str, reply: pb.SubmitReply, **more: float) -> None:
    result = pb.SubmitReply.Result.Name(reply.result).lower()
    level = logging.INFO if result in ("accepted", "duplicate") else logging.WARNING
    log.log(level, f"{what} {result}", extra={**more, "reason": reply.reason})


def _evaluation(digest: str, result: EvaluationResult) -> pb.Evaluation:
    metrics = {"accuracy": result.accuracy, "loss": result.loss}
    metrics |= {f"accuracy.{kind}": value for kind, value in result.by_kind.items()}
    metrics |= result.measures
    return pb.Evaluation(adapter=digest, samples=result.samples, metrics=metrics)
