"""What a client is to do next, read off the state of its run."""

from __future__ import annotations

from fednano.coordinator.fields import StoredClient, StoredRound, StoredRun
from fednano.coordinator.records import RoundState
from fednano.coordinator.rounds import evaluating_roles
from fednano.coordinator.store import Store
from fednano.wire.coordinator_pb2 import (
    EvaluateTask,
    Finished,
    Membership,
    NextTaskReply,
    TrainTask,
    Wait,
)

RETRY_MS = 200


async def next_task(store: Store, run: StoredRun, client: StoredClient) -> NextTaskReply:
    """train, evaluate, wait or finished."""
    if run.state.ended:
        return NextTaskReply(finished=Finished(run_state=run.state.value, reason=run.failure))
    if run.started_at is None:
        return _wait(f"{len(run.members)} of {run.config.clients} clients have joined")
    if client.role == "trainer" and client.id not in run.members:
        return _wait("enrolment closed without this client")
    round_ = await store.round_store.get(run.name, run.round)
    if round_ is None:
        return _wait("the first round is being prepared")
    if await must_train(store, run, round_, client):
        return NextTaskReply(train=_train(run, round_, client))
    if await must_evaluate(store, run, round_, client):
        return NextTaskReply(evaluate=_evaluate(run, round_, client))
    return _wait(f"round {round_.number} is {round_.state}")


async def must_train(
    store: Store, run: StoredRun, round_: StoredRound, client: StoredClient
) -> bool:
    """Whether an update of this client is wanted for the round's present attempt."""
    if round_.state is not RoundState.COLLECTING or client.role != "trainer":
        return False
    if not await store.round_store.in_cohort(run.name, round_, client.id):
        return False
    place = (run.name, round_.number, round_.attempt)
    return not await store.updates.has_submitted(*place, client.id)


async def must_evaluate(
    store: Store, run: StoredRun, round_: StoredRound, client: StoredClient
) -> bool:
    """Whether this client's evaluation of the round is wanted; a late evaluator's is, too."""
    if not may_evaluate(run, round_, client):
        return False
    return not await store.round_store.has_evaluated(run.name, round_.number, client.id)


def may_evaluate(run: StoredRun, round_: StoredRound, client: StoredClient) -> bool:
    if round_.state is not RoundState.EVALUATING:
        return False
    if client.role == "evaluator":
        return "evaluator" in evaluating_roles(run, round_.number)
    return client.id in round_.evaluators


def task_label(reply: NextTaskReply) -> str:
    """What the client was handed, as it is kept with the client."""
    if reply.HasField("train"):
        return f"train:{reply.train.round}:{reply.train.attempt}"
    if reply.HasField("evaluate"):
        return f"evaluate:{reply.evaluate.round}:{reply.evaluate.attempt}"
    return ""


def why_stop(
    run: StoredRun, round_: StoredRound | None, client: StoredClient, number: int, attempt: int
) -> str:
    """Why a client should give its task up; "" if it should not. Attempt 0: it has no task."""
    if run.state.ended:
        return f"the run is {run.state}"
    if attempt == 0:
        return ""
    if round_ is None or (round_.number, round_.attempt) != (number, attempt):
        return "the round has moved on"
    kind, _, place = client.task.partition(":")
    wanted = {"train": RoundState.COLLECTING, "evaluate": RoundState.EVALUATING}.get(kind)
    if place != f"{number}:{attempt}" or wanted is None or round_.state is wanted:
        return ""
    return f"the round is {round_.state}"


def membership(run: StoredRun, client: StoredClient) -> Membership:
    shard, of = _shard(run, client)
    return Membership(
        run=run.name,
        session=client.session,
        config_json=run.config.model_dump_json(),
        enrolled=run.started_at is not None,
        shard=shard,
        of=of,
    )


def _shard(run: StoredRun, client: StoredClient) -> tuple[int, int]:
    """Index and number of shards; 0 of 0 where there are none, or none yet."""
    dealt = run.config.data.source == "digits" and run.started_at is not None
    if not dealt or client.shard is None:
        return 0, 0
    return client.shard, len(run.members)


def _train(run: StoredRun, round_: StoredRound, client: StoredClient) -> TrainTask:
    shard, of = _shard(run, client)
    return TrainTask(
        round=round_.number,
        attempt=round_.attempt,
        adapter=round_.base,
        hyper_json=run.config.training.model_dump_json(),
        deadline_ms=int(round_.deadline * 1000),
        shard=shard,
        of=of,
    )


def _evaluate(run: StoredRun, round_: StoredRound, client: StoredClient) -> EvaluateTask:
    shard, of = _shard(run, client)
    return EvaluateTask(
        round=round_.number,
        attempt=round_.attempt,
        adapters=[round_.adapter_digest],
        deadline_ms=int(round_.deadline * 1000),
        shard=shard,
        of=of,
    )


def _wait(reason: str) -> NextTaskReply:
    return NextTaskReply(wait=Wait(retry_after_ms=RETRY_MS, reason=reason))
