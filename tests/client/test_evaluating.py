"""A client evaluates what it is asked to, and a shadow that can't be costs the round nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fednano.client.coordination import Adapter, Membership
from fednano.client.heartbeat import Heartbeat
from fednano.client.methods import fisher_mode
from fednano.client.placements import NanoPlacement
from fednano.client.trainer import Trainer
from fednano.client.worker import Worker
from fednano.wire import coordinator_pb2 as pb
from fednano.wire.errors import InvalidRequest, NotFound
from fednano.wire.headers import make_header
from fednano.wire.run_config import RunConfig
from fednano.wire.tensor_pb2 import Header

from tests.tiny import large_tensors

CONFIG = {"name": "trial", "data": {"evaluation_limit": 2}}


class Coordinator:
    """Has some adapters, and keeps what is submitted."""

    def __init__(self, **factors: float) -> None:
        self._factors = factors
        self.submitted: dict[str, dict[str, float]] = {}

    def header(self, member: Membership, task: object = None) -> Header:
        return make_header("c", run=member.run)

    def adapter(self, request: pb.GetAdapterRequest) -> Adapter:
        if request.digest not in self._factors:
            raise NotFound("it was dropped")
        factor = np.float32(self._factors[request.digest])
        tensors = {name: tensor * factor for name, tensor in large_tensors().items()}
        return Adapter(tensors, 0.7, request.digest, 1)

    def submit_evaluation(self, request: pb.SubmitEvaluationRequest) -> pb.SubmitReply:
        self.submitted = {one.adapter: dict(one.metrics) for one in request.evaluations}
        return pb.SubmitReply(result=pb.SubmitReply.ACCEPTED)


def evaluated(trainer: Trainer, coordinator: Coordinator, *digests: str) -> dict[str, Any]:
    member = Membership("trial", "s", RunConfig.model_validate(CONFIG), "token", 0, 1)
    heartbeat = Heartbeat(coordinator, member, 60.0)  # type: ignore[arg-type]
    placement = NanoPlacement(trainer, 0.7)
    worker = Worker(coordinator, member, placement, heartbeat, evaluator=True)  # type: ignore[arg-type]
    worker.evaluate(pb.EvaluateTask(round=1, attempt=1, adapters=digests))
    return coordinator.submitted


def test_the_leader_s_adapter_and_its_shadows_are_evaluated_alike(trainer: Trainer) -> None:
    found = evaluated(trainer, Coordinator(leader=0.1, shadow=0.1, other=0.5), "leader", "shadow")
    assert found.keys() == {"leader", "shadow"}
    assert found["leader"] == found["shadow"]


def test_a_shadow_that_is_gone_or_beyond_numbers_leaves_the_others(trainer: Trainer) -> None:
    coordinator = Coordinator(leader=0.1, wild=1e20, tame=0.2)
    found = evaluated(trainer, coordinator, "leader", "gone", "wild", "tame")
    assert found.keys() == {"leader", "tame"}


def test_without_the_leader_s_adapter_there_is_nothing_to_tell(trainer: Trainer) -> None:
    with pytest.raises((InvalidRequest, NotFound)):
        evaluated(trainer, Coordinator(shadow=0.1), "leader", "shadow")


@pytest.mark.parametrize(
    ("strategies", "mode"),
    [
        (["fedavg", "median"], "none"),
        (["fedavg", "median", "fednano"], "extra-pass"),
        (["fednano-ef", "fedavg"], "last-epoch"),
    ],
)
def test_fisher_is_computed_as_any_of_the_strategies_wants_it(
    strategies: list[str], mode: str
) -> None:
    leader, *shadows = ({"name": name} for name in strategies)
    body = {"name": "trial", "min_clients": 3, "strategy": leader, "shadows": shadows}
    assert fisher_mode(RunConfig.model_validate(body)) == mode
