"""The federated rounds. It reads like the paper: enrol, hand out, collect, merge, evaluate.

A step looks at where a run stands and moves it on by one transition, or says how long to wait.
Everything it goes by is in the store, so a coordinator that was killed between any two steps, or
within one, is followed by another that takes the same one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from fednano.coordinator.cohorts import (
    evaluating_roles,
    evaluation_seconds,
    sample_cohort,
    wanted_updates,
)
from fednano.coordinator.database import Raced
from fednano.coordinator.fields import StoredRound, StoredRun
from fednano.coordinator.records import RoundState, RunState, ShadowRecord
from fednano.coordinator.scores import mean_metrics, own_metrics, scored, train_metrics
from fednano.coordinator.store import Store
from fednano.coordinator.store_adapters import Made, handed_digest, make_adapter
from fednano.coordinator.store_members import Glance
from fednano.coordinator.store_updates import StoredUpdates
from fednano.coordinator.strategies import (
    Buffered,
    State,
    Strategy,
    first_adapter,
    strategy_of,
)

log = logging.getLogger(__name__)

_LOOK = 60.0  # nothing to wait for but a ring of the bell
_SOON = 0.2
_RACES = 10  # in a row; with more of them it is no hurry that helps


@dataclass(frozen=True)
class Rounds:
    """One run, advanced by the leader that holds `lease`. Raises LeaseLost once it doesn't."""

    store: Store
    lease: str
    name: str
    observe: Callable[[float], None] = lambda seconds: None  # a finished round's duration

    async def drive(self) -> None:
        """Until the run has ended."""
        with self.store.database.bell(self.name) as bell:
            raced = 0
            while not (at := await self.store.standings.current(self.name)).run.state.ended:
                try:
                    patience, raced = await self.step(at.run, at.round), 0
                except Raced:  # a command or a client came in between: look again
                    raced += 1
                    patience = _SOON if raced > _RACES else 0
                if patience > 0:
                    await bell.wait(patience)

    async def step(self, run: StoredRun, round_: StoredRound | None) -> float:
        """One transition, or the seconds after which to look again."""
        if run.state is RunState.CREATED:
            return await self._open_enrolment(run)
        if run.state is RunState.ENROLLING:
            return await self._enrol(run)
        if run.started_at is None:
            return _LOOK  # paused before it began
        if round_ is None:
            return await self._start(run)
        steps = {
            RoundState.OPEN: self._pick_cohort,
            RoundState.COLLECTING: self._collect,
            RoundState.MERGING: self._merge,
            RoundState.EVALUATING: self._evaluate,
            RoundState.DONE: self._next_round,
            RoundState.FAILED: self._next_attempt,
        }
        return await steps[round_.state](run, round_)

    async def give_up(self, reason: str) -> None:
        """The run fails visibly, and so does its open round."""
        run = await self.store.run_store.get(self.name)
        if not run.state.ended:
            failed = replace(run, state=RunState.FAILED, failure=reason, finished_at=self._now())
            await self.store.run_store.give_up(self.lease, run, failed)

    def _now(self) -> float:
        return self.store.database.clock()

    async def _open_enrolment(self, run: StoredRun) -> float:
        until = self._now() + run.config.enrol_seconds
        after = replace(run, state=RunState.ENROLLING, enrol_until=until)
        await self.store.run_store.advance(self.lease, run, after)
        return 0

    async def _enrol(self, run: StoredRun) -> float:
        """Members join by themselves; this closes the door behind them."""
        asked = run.config.evaluation.evaluators > 0 or run.config.enrol_quiet_seconds > 0
        found = await self.store.members.glance(run.name) if asked else []
        evaluators = sum(member.role == "evaluator" for member in found)
        complete = evaluators >= run.config.evaluation.evaluators
        if complete and len(run.members) >= run.config.clients:
            return await self._close_enrolment(run, run.members)
        left = self._until_quiet(run, found) if complete else run.enrol_until - self._now()
        if left > 0:
            return left
        present = await self.store.members.presence(run.name)
        if not present.settled:
            return _SOON
        members = tuple(member for member in run.members if member in present.alive)
        if len(members) >= run.config.min_clients:
            return await self._close_enrolment(run, members)
        if (left := run.enrol_until - self._now()) > 0:
            return left  # it was quiet, but some of them have left since
        reason = f"{len(members)} of at least {run.config.min_clients} clients enrolled in time"
        failed = replace(run, state=RunState.FAILED, failure=reason, finished_at=self._now())
        await self.store.run_store.advance(self.lease, run, failed)
        return 0

    def _until_quiet(self, run: StoredRun, found: list[Glance]) -> float:
        """Seconds until enrolment closes if nobody else comes."""
        now, quiet, members = self._now(), run.config.enrol_quiet_seconds, set(run.members)
        left = run.enrol_until - now
        if not quiet or len(members) < run.config.min_clients:
            return left
        opened = run.enrol_until - run.config.enrol_seconds  # again, where a pause came in between
        newest = max(member.joined_at for member in found if member.id in members)
        return min(left, max(opened, newest) + quiet - now)

    async def _close_enrolment(self, run: StoredRun, members: tuple[str, ...]) -> float:
        """N is fixed and the shards are dealt, by client id."""
        after = replace(
            run,
            state=RunState.RUNNING,
            members=tuple(sorted(members)),
            started_at=self._now(),
        )
        await self.store.members.close_enrolment(self.lease, run, after)
        log.info("enrolment closed", extra={"run": run.name, "clients": len(members)})
        return 0

    async def _start(self, run: StoredRun) -> float:
        """Round 0: the adapter before any training, evaluated as the zero-shot baseline."""
        tensors = first_adapter(run.config, run.hidden_size, run.weights)
        adapter = make_adapter(tensors, run.config.adapter.scale)
        evaluators = await self._evaluators(run, 0)
        if evaluators is None:
            return _SOON
        now = self._now()
        first = StoredRound(
            number=0,
            attempt=1,
            state=RoundState.EVALUATING,
            opened_at=now,
            deadline=now + run.config.evaluation.seconds,
            strategy=run.config.strategy.name,
            adapter_digest=adapter.digest,
            evaluators=evaluators,
        )
        await self.store.round_store.start(self.lease, run, adapter, first)
        return 0

    async def _next_round(self, run: StoredRun, done: StoredRound) -> float:
        if run.state is RunState.PAUSED:
            return _LOOK
        return await self._open(run, done, done.number + 1)

    async def _next_attempt(self, run: StoredRun, failed: StoredRound) -> float:
        if run.state is RunState.PAUSED:
            return _LOOK
        return await self._open(run, failed, failed.number)

    async def _open(self, run: StoredRun, before: StoredRound, number: int) -> float:
        """A new round, or another attempt of one, which remembers why the last one failed."""
        now, again = self._now(), before.number == number
        opened = StoredRound(
            number=number,
            attempt=before.attempt + 1 if again else 1,
            state=RoundState.OPEN,
            opened_at=now,
            deadline=now + run.config.round_seconds,
            strategy=run.config.strategy.name,
            base=before.base if again else before.adapter_digest,
            base_handed=before.base_handed if again else before.handed,
            failure=before.failure if again else "",
        )
        await self.store.round_store.open(self.lease, run, before, opened)
        return 0

    async def _pick_cohort(self, run: StoredRun, round_: StoredRound) -> float:
        """Sampled once from the members that are there, and written down."""
        present = await self.store.members.presence(run.name)
        candidates = sorted(
            member for member in run.members if run.config.deterministic or member in present.alive
        )
        if not present.settled and len(candidates) < len(run.members):
            return _SOON  # after a restart, give everybody the time to be heard
        if len(candidates) < run.config.min_clients:
            if self._now() < round_.deadline:
                return min(_SOON, round_.deadline - self._now())
            # Of an asynchronous round there may be some already.
            submitted, _ = await self.store.updates.progress(
                run.name, round_.number, round_.attempt
            )
            there = len(candidates)
            return await self._fail(run, round_, there, "members were there", submitted)
        cohort = []  # of an asynchronous round: whoever is ready takes part
        if run.config.asynchronous is None:
            cohort = sample_cohort(candidates, run.config, round_.number, round_.attempt)
        deadline = self._now() + run.config.round_seconds
        wanted = wanted_updates(len(cohort or candidates), run.config)
        await self.store.round_store.enlist(self.lease, run, round_, cohort, wanted, deadline)
        return 0

    async def _collect(self, run: StoredRun, round_: StoredRound) -> float:
        """Until as many as are wanted have submitted, or the deadline."""
        place = (run.name, round_.number, round_.attempt)
        got, cohort = await self.store.updates.progress(*place)
        wanted = round_.wanted or cohort
        left = round_.deadline - self._now()
        if got < wanted:
            if left > 0:
                return left
            if not self.store.members.settled:
                return _SOON  # the time in which nobody could submit doesn't count
        needed = cohort if run.config.deterministic else run.config.min_clients
        if got < needed:
            return await self._fail(run, round_, got, "updates came in time", got)
        await self.store.round_store.freeze(self.lease, run, round_)
        return 0

    async def _fail(
        self, run: StoredRun, round_: StoredRound, got: int, what: str, submitted: int
    ) -> float:
        needed = run.config.min_clients
        if run.config.deterministic:
            needed = max(needed, len(await self.store.round_store.cohort(run.name, round_)))
        reason = f"attempt {round_.attempt} of round {round_.number}: {got} of {needed} {what}"
        last = round_.attempt >= run.config.max_attempts
        await self.store.round_store.fail(
            self.lease, run, round_, reason, submitted=submitted, last=last
        )
        log.warning("round failed", extra={"run": run.name, "round": round_.number, "why": reason})
        return 0

    async def _merge(self, run: StoredRun, round_: StoredRound) -> float:
        """The set of updates is frozen: whoever merges it gets the same bytes."""
        evaluators = await self._evaluators(run, round_.number)
        if evaluators is None:
            return _SOON
        accepted = await self.store.updates.accepted(run.name, round_.number, round_.attempt)
        place = (run.name, round_.number, round_.attempt)
        strategies = strategies_of(run)
        before = await self._before(run, round_)
        updates = self.store.updates.reading(*place, accepted)
        try:
            states = await asyncio.to_thread(merged, strategies, before, updates)
        finally:
            updates.stop()  # a coordinator that is being stopped doesn't wait for the merge
        metrics = train_metrics(accepted, run.config.asynchronous is not None)
        await self._publish(run, round_, states, evaluators, metrics)
        return 0

    async def _before(self, run: StoredRun, round_: StoredRound) -> list[State]:
        """Where the round before left the run. Its shadows start there as well, each with moments
        of its own."""
        adapters, number = self.store.adapters, round_.number - 1
        base = await adapters.get(run, round_.base)
        moments = [await adapters.moments(run.name, number)]
        for index in range(len(run.config.shadows)):
            moments.append(await adapters.shadow_moments(run.name, number, index))
        return [State(base.tensors, held) for held in moments]

    async def _publish(
        self,
        run: StoredRun,
        round_: StoredRound,
        states: list[State],
        evaluators: tuple[str, ...],
        metrics: dict[str, float],
    ) -> None:
        made = await asyncio.to_thread(addressed, states, run.config.adapter.scale)
        leader, *others = made
        seen = await self.store.round_store.with_clients(run.name, round_)
        after = replace(
            seen,
            state=RoundState.EVALUATING,
            deadline=self._now() + evaluation_seconds(run.config, round_.number),
            adapter_digest=leader.adapter.digest,
            handed=await asyncio.to_thread(handed_digest, states[0]),
            evaluators=evaluators,
            metrics=metrics,
            shadows=tuple(
                ShadowRecord(strategy, other.adapter.digest)
                for strategy, other in zip(run.config.shadows, others, strict=True)
            ),
        )
        await self.store.round_store.publish(self.lease, run, round_, made, after)

    async def _evaluators(self, run: StoredRun, number: int) -> tuple[str, ...] | None:
        """Who is there to evaluate this round; None while that isn't known for sure."""
        roles = evaluating_roles(run.config, number)
        trainers = set(run.members)
        wanted = [
            member
            for member in await self.store.members.glance(run.name)
            if member.session and member.role in roles
            if member.role == "evaluator" or member.id in trainers
        ]
        alive = tuple(member.id for member in wanted if member.alive)
        if len(alive) < len(wanted) and not self.store.members.settled:
            return None
        return alive

    async def _evaluate(self, run: StoredRun, round_: StoredRound) -> float:
        """Until everybody who was there has answered, or the deadline."""
        answered = await self.store.updates.evaluated(run.name, round_.number)
        left = round_.deadline - self._now()
        if not set(round_.evaluators) <= answered:
            if left > 0:
                return left
            if not self.store.members.settled:
                return _SOON
        answers = await self.store.updates.evaluations(run.name, round_.number)
        digest = round_.adapter_digest
        metrics = {**round_.metrics, **mean_metrics(answers, digest)}
        now = self._now()
        done = replace(
            round_,
            state=RoundState.DONE,
            finished_at=now,
            metrics=metrics,
            own=own_metrics(answers, digest),
            shadows=scored(round_.shadows, answers),
        )
        await self._finish(run, round_, done, now)
        self.observe(now - round_.opened_at)
        return 0

    async def _finish(
        self, run: StoredRun, before: StoredRound, done: StoredRound, now: float
    ) -> None:
        accuracy = done.metrics.get("accuracy")
        after = replace(run, last_round=done.number)
        if accuracy is not None and (run.best_accuracy is None or accuracy > run.best_accuracy):
            after = replace(after, best_round=done.number, best_accuracy=accuracy)
        if done.number == run.config.rounds:
            after = replace(after, state=RunState.FINISHED, finished_at=now)
        await self.store.round_store.finish(self.lease, run, after, before, done)
        log.info("round done", extra={"run": run.name, "round": done.number, **done.metrics})


def strategies_of(run: StoredRun) -> list[Strategy]:
    """The one that leads, then its shadows."""
    if (how := run.config.asynchronous) is not None:
        return [Buffered(how.server_learning_rate)]
    return [strategy_of(one, len(run.members)) for one in run.config.strategies]


def merged(
    strategies: Iterable[Strategy], before: Iterable[State], updates: StoredUpdates
) -> list[State]:
    """What each makes of the same updates, which are in Redis. Raises Unavailable."""
    with updates:
        return [
            strategy.advance(state, updates)
            for strategy, state in zip(strategies, before, strict=True)
        ]


def advanced(strategy: Strategy, before: State, updates: StoredUpdates) -> State:
    """What a strategy alone makes of them. Raises Unavailable."""
    (state,) = merged([strategy], [before], updates)
    return state


def addressed(states: Iterable[State], scale: float) -> list[Made]:
    return [Made(make_adapter(state.adapter, scale), state.moments) for state in states]
