"""A client's tasks in a run: train on a shard, evaluate adapters, submit either."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from fednano.client.adapters import NanoAdapters
from fednano.client.coordination import Adapter, CoordinatorClient, Membership
from fednano.client.datasets import Dataset, DigitsShard, JsonlDataset, digits_test
from fednano.client.examples import Example
from fednano.client.heartbeat import Heartbeat
from fednano.client.trainer import EvaluationResult, FisherMode, Trainer, TrainResult
from fednano.wire import coordinator_pb2 as pb
from fednano.wire.errors import InvalidRequest
from fednano.wire.run_config import TrainingConfig

log = logging.getLogger(__name__)

_FISHER: dict[str, FisherMode] = {"fednano": "extra-pass", "fednano-ef": "last-epoch"}


@dataclass
class Worker:
    """Does what the coordinator hands out, for one membership."""

    coordinator: CoordinatorClient
    member: Membership
    trainer: Trainer
    heartbeat: Heartbeat
    own_data: JsonlDataset | None = None
    evaluator: bool = False
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
            reply = self.coordinator.submit(head, result.adapter, result.fisher, result.seconds)
        _log_reply("update", reply, loss=round(result.loss, 4))

    def _trained(self, task: pb.TrainTask, base: Adapter, data: Dataset) -> TrainResult:
        config = self.member.config
        adapters = NanoAdapters.from_tensors(base.tensors, base.scale)
        if config.strategy.name == "ffa":
            adapters.freeze_down()
        return self.trainer.train(
            adapters,
            lambda epoch: data.epoch(config.seed, task.round, epoch, self._stable_name(task)),
            TrainingConfig.model_validate_json(task.hyper_json),
            _FISHER.get(config.strategy.name, "none"),
            self.heartbeat.progress,
            config.strategy.mu or 0.0,
        )

    def _stable_name(self, task: pb.TrainTask) -> str:
        """What the order of the data hangs on: the shard, so that who leases it doesn't matter."""
        return f"shard-{task.shard}" if task.of else self.coordinator.client

    def evaluate(self, task: pb.EvaluateTask) -> None:
        """Exact match and loss of each adapter, then SubmitEvaluation. Raises TaskGivenUp."""
        start = time.perf_counter()
        with self.heartbeat.on(task, f"evaluating, round {task.round}"):
            examples = self._evaluation_examples(task)
            found = {digest: self._evaluated(digest, examples) for digest in task.adapters}
            request = pb.SubmitEvaluationRequest(
                header=self.coordinator.header(self.member, task),
                evaluations=[_evaluation(digest, result) for digest, result in found.items()],
                costs=self.coordinator.meter.take(time.perf_counter() - start),
            )
            reply = self.coordinator.submit_evaluation(request)
        for result in found.values():
            _log_reply("evaluation", reply, accuracy=round(result.accuracy, 4))

    def _evaluated(self, digest: str, examples: Sequence[Example]) -> EvaluationResult:
        base = self._adapter(digest)
        return self.trainer.evaluate(
            NanoAdapters.from_tensors(base.tensors, base.scale),
            examples,
            self.member.config.evaluation.max_new_tokens,
            progress=self.heartbeat.progress,
        )

    def _adapter(self, digest: str) -> Adapter:
        """From the coordinator, or the one that was fetched last."""
        if digest not in self._adapters:
            request = pb.GetAdapterRequest(
                header=self.coordinator.header(self.member), run=self.member.run, digest=digest
            )
            self._adapters = {digest: self.coordinator.adapter(request)}
        return self._adapters[digest]

    def _data(self, shard: int, of: int) -> Dataset:
        """The run's shard, or the site's own data. Raises InvalidRequest where there is none."""
        config = self.member.config
        if config.data.source == "own":
            if self.own_data is None:
                raise InvalidRequest(
                    f"run {self.member.run} trains on the clients' own data: give --data FILE"
                )
            return self.own_data
        if self._dataset is None or self._dataset[0] != (shard, of):
            dealt = DigitsShard.deal(config.data, config.seed, shard, of)
            self._dataset = (shard, of), dealt
        return self._dataset[1]

    def _evaluation_examples(self, task: pb.EvaluateTask) -> Sequence[Example]:
        config = self.member.config
        if not self.evaluator:
            return self._data(task.shard, task.of).held_back()
        if config.data.source == "digits":
            return digits_test(config.data.evaluation_limit)
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
    return pb.Evaluation(adapter=digest, samples=result.samples, metrics=metrics)
