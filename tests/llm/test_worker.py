"""The queue: full, left, failing; and answers that are written between other calls."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import grpc
import pytest
import torch
from fednano.llm.batcher import Batcher
from fednano.llm.worker import Worker
from fednano.models.frozen import FrozenLLM
from fednano.models.generation import Answer, Written
from fednano.models.language_model import Sampling, ScoreResult, Sequences
from fednano.wire import llm_pb2
from fednano.wire.errors import Busy, FedNanoError, Unavailable

from tests.llm.caller import generate_request, score_request, step_request
from tests.models.causal import build, packed, several_labels

WEIGHTS = torch.ones(3)
PATIENCE = 20


class GatedLLM(FrozenLLM):
    """Waits at a gate: before each score, and before each step of writing but the first."""

    def __init__(self) -> None:
        super().__init__(build(positions=2000), "mark")
        self.gate = threading.Event()
        self.scores = 0
        self.begun = False

    def score(self, sequences: Sequences, labels: torch.Tensor) -> ScoreResult:
        self.scores += 1
        assert self.gate.wait(PATIENCE)
        return super().score(sequences, labels)

    def write(self, answers: Sequence[Answer]) -> list[Written]:
        if self.begun:
            assert self.gate.wait(PATIENCE)
        self.begun = True
        return super().write(answers)


@pytest.fixture
def gated() -> Iterator[GatedLLM]:
    engine = GatedLLM()
    yield engine
    engine.gate.set()


async def until(condition: Any) -> None:
    for _ in range(int(PATIENCE / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen")


async def test_a_full_queue_refuses_and_recovers(start, gated):
    llm = await start(on=gated, queue=2)
    request = score_request(llm.header(), packed(gated), several_labels())
    first = asyncio.create_task(llm.stream("Score", request))
    await until(lambda: gated.scores)
    waiting = [asyncio.create_task(llm.stream("Score", request)) for _ in range(2)]
    await until(lambda: llm.server.worker.depth == 2)
    card = await llm.unary("Describe", llm_pb2.DescribeRequest(header=llm.header()))
    assert (card.load.queued, card.load.busy) == (2, True)
    error = await llm.failure("Score", request)
    assert isinstance(error, Busy)
    assert error.detail == "the queue is full (2 requests wait); try again later"
    gated.gate.set()
    await asyncio.gather(first, *waiting)
    await llm.stream("Score", request)


async def test_callers_who_left_are_skipped(start, gated):
    llm = await start(on=gated)
    request = score_request(llm.header(), packed(gated), several_labels())
    first = asyncio.create_task(llm.stream("Score", request))
    await until(lambda: gated.scores)
    leaving = llm.stub.Score(iter(request), metadata=llm.metadata())
    await until(lambda: llm.server.worker.depth == 1)
    leaving.cancel()
    await until(lambda: llm.server.worker.depth == 0)
    gated.gate.set()
    await first
    await llm.stream("Score", request)
    assert gated.scores == 2


async def test_a_failing_job_fails_its_caller_only(start):
    class Failing(FrozenLLM):
        def score(self, *_: Any) -> ScoreResult:
            raise RuntimeError("a secret of the device")

    engine = Failing(build(), "mark")
    llm = await start(on=engine)
    request = score_request(llm.header(), packed(engine), several_labels())
    error = await llm.failure("Score", request)
    assert error.status.name == "INTERNAL"
    assert "secret" not in error.detail
    await llm.step(packed(engine), several_labels(), WEIGHTS)


async def test_a_device_that_fails_after_a_batch_fails_its_callers_only() -> None:
    """A GPU tells of what went wrong when it is waited for."""
    failures = [RuntimeError("CUDA error: an illegal memory access was encountered")]

    def wait() -> None:
        if failures:
            raise failures.pop()

    worker = Worker(4, Batcher(0, 1), wait=wait)
    worker.start()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        await worker.submit(lambda: 1).result()
    assert await worker.submit(lambda: 2).result() == 2
    await worker.close()


async def test_no_memory_is_said_to_be_so(start):
    class Full(FrozenLLM):
        def score(self, *_: Any) -> ScoreResult:
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine = Full(build(), "mark")
    llm = await start(on=engine)
    request = score_request(llm.header(), packed(engine), several_labels())
    error = await llm.failure("Score", request)
    assert isinstance(error, Busy)
    assert "no memory for this" in error.detail


async def test_the_first_token_arrives_before_the_last_is_computed(start, gated):
    llm = await start(on=gated)
    request = generate_request(llm.header(), packed(gated, (5,)), Sampling(20, stop_ids=(1,)))
    call = llm.stub.Generate(iter(request), metadata=llm.metadata())
    async with asyncio.timeout(PATIENCE):
        first = await call.read()
    assert len(first.tokens) == 1
    gated.gate.set()
    for _ in range(19):
        assert len((await call.read()).tokens) == 1
    assert (await call.read()).spent.compute_seconds > 0
    assert await call.read() is grpc.aio.EOF


async def test_training_goes_on_between_the_tokens_of_an_answer(start, engine):
    long = FrozenLLM(build(positions=4000), "mark")
    llm = await start(on=long)
    sampling = Sampling(1000, stop_ids=(1,), temperature=5.0)
    request = generate_request(llm.header(), packed(long, (5,)), sampling)
    call = llm.stub.Generate(iter(request), metadata=llm.metadata())
    await call.read()
    await llm.step(packed(long), several_labels(), WEIGHTS)
    assert not call.done()
    call.cancel()


async def test_a_caller_who_hangs_up_mid_answer_frees_the_device(start, gated):
    llm = await start(on=gated)
    gated.gate.set()
    sampling = Sampling(1024, stop_ids=(63,), temperature=5.0)
    request = generate_request(llm.header(), packed(gated, (5,)), sampling)
    call = llm.stub.Generate(iter(request), metadata=llm.metadata())
    await call.read()
    call.cancel()
    await until(lambda: not llm.server.worker.busy and llm.server.worker.depth == 0)
    await llm.stream("Score", score_request(llm.header(), packed(gated), several_labels()))


async def test_only_so_many_answers_are_written_at_once(engine):
    worker = Worker(10, Batcher(tokens=1000, answers=1))
    sampling = Sampling(3, stop_ids=(1,))
    written: list[int] = []

    def write(answers: Sequence[Answer]) -> list[Written]:
        written.append(len(answers))
        return engine.write(answers)

    jobs = [
        worker.write(lambda: engine.answer(packed(engine, (5,)), sampling), write) for _ in range(2)
    ]
    assert worker.depth == 2
    worker.start()
    answers = [[token async for token in job] for job in jobs]
    assert [len(answer) for answer in answers] == [3, 3]
    assert written == [1] * 6
    await worker.close()


async def test_what_waits_at_the_end_is_told_so():
    worker = Worker(10, Batcher(tokens=1000, answers=1))
    job = worker.submit(lambda: 1)  # never started: nobody runs the worker
    await worker.close()
    with pytest.raises(Unavailable, match="shutting down"):
        await job.result()
    with pytest.raises(Unavailable, match="shutting down"):
        worker.submit(lambda: 1)


async def test_a_request_that_ends_midway_leaves_nothing_behind(start, engine):
    llm = await start()
    messages = step_request(llm.header(), packed(engine), several_labels(), WEIGHTS)
    call = llm.stub.ForwardBackward(metadata=llm.metadata())
    await call.write(messages[0])
    call.cancel()
    with suppress(asyncio.CancelledError, FedNanoError):
        await call.read()
    await llm.step(packed(engine), several_labels(), WEIGHTS)
    assert llm.server.worker.depth == 0
