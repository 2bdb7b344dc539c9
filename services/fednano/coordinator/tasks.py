"""What a client is to do next, read off the state of its run."""

from __future__ import annotations

from fednano.coordinator import keys
from fednano.coordinator.buffer import Start, newest, too_stale
from fednano.coordinator.cohorts import evaluating_roles
from fednano.coordinator.fields import StoredClient, StoredRound, StoredRun
from fednano.coordinator.records import RoundState
from fednano.coordinator.store import Store
from fednano.coordinator.store_members import Offer, Seat, Visitor
from fednano.coordinator.store_standing import Standing
from fednano.wire.coordinator_pb2 import (
    EvaluateTask,
    Finished,
    Membership,
    NextTaskReply,
    TrainTask,
    Wait,
)
from fednano.wire.errors import Busy

RETRY_MS = 200
_TRIES = 20


async def next_task(store: Store, visitor: Visitor) -> NextTaskReply:
    """train, evaluate, wait or finished. Raises SessionEnded."""
    for _ in range(_TRIES):
        standing = await store.standings.shared(visitor.run)
        for offer in _offers(standing, visitor.client):
            seat = await store.members.attend(visitor, standing, offer)
            if seat is None or seat.task:
                break
        if seat is not None:
            return _reply(standing, seat)
        store.standings.forget(standing)
    raise Busy("the run changes too fast; try again")


def _offers(standing: Standing, client: str) -> list[Offer]:
    """What there is for this client, first things first; at least one, which may be nothing."""
    offer = _offer(standing, client)
    run, round_ = standing.run, standing.round
    if run.config.asynchronous is None or run.state.ended or round_ is None:
        return [offer]
    start = newest(run, round_)
    if start is None or client not in standing.members:
        return [offer]
    label = f"train:{start.number}:{start.attempt}"
    done = keys.answered(run.name, start.number, start.attempt)
    return (
        [offer, Offer(label, "trainer", done)] if offer.label else [Offer(label, "trainer", done)]
    )


def _offer(standing: Standing, client: str) -> Offer:
    """What there is for this client, if it has the role and hasn't done it yet."""
    run, round_ = standing.run, standing.round
    if run.state.ended or run.started_at is None or round_ is None:
        return Offer()
    place = (run.name, round_.number)
    if client in standing.cohort and client in standing.members:
        done = keys.submitted(*place, round_.attempt)
        return Offer(_label("train", round_), "trainer", done)
    if round_.state is RoundState.EVALUATING:
        # A late evaluator is asked, too; a trainer only if it was there when the round was merged.
        role = "" if client in standing.evaluators else "evaluator"
        if role == "" or "evaluator" in evaluating_roles(run.config, round_.number):
            return Offer(_label("evaluate", round_), role, keys.evaluations(*place))
    return Offer()


def _label(kind: str, round_: StoredRound) -> str:
    return f"{kind}:{round_.number}:{round_.attempt}"


def _reply(standing: Standing, seat: Seat) -> NextTaskReply:
    run, round_ = standing.run, standing.round
    if run.state.ended:
        return NextTaskReply(finished=Finished(run_state=run.state.value, reason=run.failure))
    if run.started_at is None:
        return _wait(f"{len(run.members)} of {run.config.clients} clients have joined")
    if seat.role == "trainer" and seat.client not in standing.members:
        return _wait("enrolment closed without this client")
    if round_ is None:
        return _wait("the first round is being prepared")
    if seat.task.startswith("train"):
        start = newest(run, round_) if run.config.asynchronous else _start(round_)
        assert start is not None, "what was offered"
        return NextTaskReply(train=_train(run, round_, start, seat))
    if seat.task:
        return NextTaskReply(evaluate=_evaluate(run, round_, seat))
    return _wait(f"round {round_.number} is {round_.state}")


async def must_train(store: Store, standing: Standing, client: StoredClient) -> bool:
    """Whether an update of this client is wanted for the round's present attempt."""
    run, round_ = standing.run, standing.round
    if round_ is None or client.role != "trainer" or client.id not in standing.cohort:
        return False
    place = (run.name, round_.number, round_.attempt)
    if run.config.spares and (await store.updates.progress(*place))[0] >= round_.wanted:
        return False
    return not await store.updates.has_submitted(*place, client.id)


def may_evaluate(run: StoredRun, round_: StoredRound, client: StoredClient) -> bool:
    if round_.state is not RoundState.EVALUATING:
        return False
    if client.role == "evaluator":
        return "evaluator" in evaluating_roles(run.config, round_.number)
    return client.id in round_.evaluators


def why_stop(
    run: StoredRun, round_: StoredRound | None, client: StoredClient, number: int, attempt: int
) -> str:
    """Why a client should give its task up; "" if it should not. Attempt 0: it has no task."""
    if run.state.ended:
        return f"the run is {run.state}"
    if attempt == 0:
        return ""
    trains = client.task == f"train:{number}:{attempt}"
    if run.config.asynchronous is not None and round_ is not None and trains:
        passed = attempt < round_.attempt or round_.state is RoundState.FAILED
        failed = number == round_.number and passed
        return "the round has moved on" if failed else too_stale(run, round_, number)
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


def _shard(run: StoredRun, client: StoredClient | Seat) -> tuple[int, int]:
    """Index and number of shards; 0 of 0 where there are none, or none yet."""
    dealt = run.config.data.dealt and run.started_at is not None
    if not dealt or client.shard is None:
        return 0, 0
    return client.shard, len(run.members)


def _start(round_: StoredRound) -> Start:
    return Start(round_.number, round_.attempt, round_.base)


def _train(run: StoredRun, round_: StoredRound, start: Start, client: Seat) -> TrainTask:
    shard, of = _shard(run, client)
    return TrainTask(
        round=start.number,
        attempt=start.attempt,
        adapter=start.base,
        hyper_json=run.config.training.model_dump_json(),
        deadline_ms=int(round_.deadline * 1000),
        shard=shard,
        of=of,
        auxiliary=[round_.base_handed] if round_.base_handed else [],
        rank=run.config.adapter.rank_of(client.shard or 0),
    )


def _evaluate(run: StoredRun, round_: StoredRound, client: Seat) -> EvaluateTask:
    shard, of = _shard(run, client)
    return EvaluateTask(
        round=round_.number,
        attempt=round_.attempt,
        adapters=_wanted(round_),
        deadline_ms=int(round_.deadline * 1000),
        shard=shard,
        of=of,
    )


def _wanted(round_: StoredRound) -> list[str]:
    """Digests to be evaluated, each once: the round's own, then what its shadows made."""
    shadows = (shadow.adapter_digest for shadow in round_.shadows)
    return list(dict.fromkeys([round_.adapter_digest, *shadows]))


def _wait(reason: str) -> NextTaskReply:
    return NextTaskReply(wait=Wait(retry_after_ms=RETRY_MS, reason=reason))
