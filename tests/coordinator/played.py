"""A federation on the real store, advanced by the real round steps; only the clients are played."""

from __future__ import annotations

import math
from dataclasses import replace
from time import time

import numpy as np
from fednano.coordinator.database import Raced
from fednano.coordinator.enrolment import Admission, Applicant, Enrolment
from fednano.coordinator.fields import StoredClient
from fednano.coordinator.rounds import Rounds
from fednano.coordinator.store import Store
from fednano.coordinator.store_members import Spent
from fednano.coordinator.store_updates import EvaluationMeta, Sender, UpdateMeta
from fednano.wire.run_config import RunConfig
from fednano.wire.sessions import Identity

SITE = Identity("ward", "site", token_id="played")
_LEASE_SECONDS = 3600


class Clock:
    """Real time and what a test adds to it."""

    def __init__(self, start: float = 0.0) -> None:
        self.added = start

    def __call__(self) -> float:
        return time() + self.added


class Federation:
    """One run with played clients `site-0`... and an evaluator."""

    def __init__(self, store: Store, clock: Clock, config: RunConfig) -> None:
        self.store, self.clock, self.config = store, clock, config
        self.name = config.name
        self.members: dict[str, StoredClient] = {}
        self.rng = np.random.default_rng(config.seed)

    async def open(self) -> None:
        """Creates the run and opens its enrolment."""
        await self.store.create_run(self.config, "admin")
        lease = await self.store.lease.acquire("test", _LEASE_SECONDS)
        self.rounds = Rounds(self.store, lease, self.name)
        self.clock.added += self.store.members.client_seconds + 1  # time enough to be heard
        await self.settle()

    async def join(self, name: str) -> Admission | str:
        role, number = ("evaluator", 0) if name == "evaluator" else ("trainer", 1 + int(name[5:]))
        applicant = Applicant(name, role, 280 + 37 * number, "model", 16, "0.1.0", SITE)
        admission = await Enrolment(self.store).join(self.name, applicant)
        if isinstance(admission, Admission):
            self.members[name] = admission.member
        return admission

    async def enrol(self) -> None:
        """Creates the run and lets everybody in, up to the evaluation of round 0."""
        await self.open()
        for name in ["evaluator", *(f"site-{i}" for i in range(self.config.clients))]:
            assert isinstance(await self.join(name), Admission)
        await self.settle()

    async def settle(self) -> None:
        """Steps until the run waits for somebody."""
        while not (at := await self.store.standings.current(self.name)).run.state.ended:
            try:
                if await self.rounds.step(at.run, at.round) > 0:
                    return
            except Raced:
                continue

    async def play(self, rounds: int, seconds: float = 0.0) -> None:
        """So many whole rounds; the evaluation of round 0 counts as one."""
        for _ in range(rounds):
            run = await self.store.run(self.name)
            if run.round:
                await self.train(run.round, seconds)
            await self.evaluate(run.round)

    async def train(self, number: int, seconds: float = 0.0) -> None:
        """Everybody submits."""
        for share in (0.3, 0.7, 1.0):
            await self.beat(number, "training", share)
            self.clock.added += seconds / 3
        names = [name for name in self.members if name != "evaluator"]
        for name in names:
            await self.submit(name, number)
        await self.settle()

    async def beat(self, number: int, doing: str, share: float) -> None:
        for i, (name, member) in enumerate(self.members.items()):
            busy = name != "evaluator"
            progress = min(1.0, share * (1 - 0.06 * i)) if busy and share < 1 else float(busy)
            told = replace(member, doing=doing if busy else "waiting", progress=progress)
            await self.store.members.beat(self.name, told, number, Spent())

    def sender(self, name: str, number: int, attempt: int) -> Sender:
        return Sender(self.name, name, self.members[name].session, number, attempt)

    async def submit(self, name: str, number: int) -> str:
        """One client's update: the base, a little changed."""
        round_ = await self.store.round(self.name, number)
        base = await self.store.adapter_of_round(self.name, number - 1)
        tensors = {
            key: (value + 0.01 * self.rng.standard_normal(value.shape)).astype(np.float32)
            for key, value in base.tensors.items()
        }
        loss = 0.8 * math.exp(-number / 3.5) + 0.22
        meta = UpdateMeta(self.members[name].samples, {"train_loss": loss})
        tokens = 31_000 * self.members[name].samples
        spent = Spent(
            {"embeddings": tokens, "adapters": 32_904, "control": 2_310},
            {"gradients": tokens, "adapters": 32_904, "control": 2_744},
            4.2,
            1.9,
        )
        sender = self.sender(name, number, round_.attempt)
        return (await self.store.updates.claim(sender, tensors, meta, spent)).result

    async def evaluate(self, number: int) -> None:
        """Everybody scores; those who aren't asked are late, which is harmless."""
        round_ = await self.store.round(self.name, number)
        digests = (round_.adapter_digest, *(shadow.adapter_digest for shadow in round_.shadows))
        stored = await self.store.round_store.get(self.name, number)
        assert stored is not None
        for name in stored.evaluators:
            role = self.members[name].role
            scores = self.scores if role == "evaluator" else self.own_scores
            metrics = {digest: scores(number) for digest in digests}
            answer = EvaluationMeta(role, dict.fromkeys(digests, 360), metrics)
            sender = self.sender(name, number, stored.attempt)
            spent = Spent({"embeddings": 5_400_000}, {"other": 61_000}, 1.1, 0.8)
            await self.store.updates.claim_evaluation(sender, answer, spent)
        await self.settle()

    def scores(self, number: int) -> dict[str, float]:
        mean = 0.741 + 0.165 * (1 - math.exp(-number / 3)) + 0.006 * self.rng.standard_normal()
        return {
            "accuracy": mean,
            "accuracy_name": mean - 0.028,
            "accuracy_numeral": mean - 0.014,
            "accuracy_parity": mean + 0.042,
            "loss": 0.9 * math.exp(-number / 4) + 0.31,
        }

    def own_scores(self, number: int) -> dict[str, float]:
        return {"accuracy": self.scores(number)["accuracy"] + 0.04 * float(self.rng.random())}
