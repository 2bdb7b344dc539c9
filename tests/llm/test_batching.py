"""Requests of many callers in one batch: each gets its own, whatever the others sent."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import torch
from fednano.models.frozen import FrozenLLM
from fednano.models.generation import Written
from fednano.models.language_model import Sampling, ScoreResult, Sequences, StepResult
from fednano.wire import codec
from fednano.wire.errors import Busy, InvalidRequest
from fednano.wire.tensor_pb2 import INT8

from tests.llm.caller import (
    Caller,
    forward_request,
    generate_request,
    score_request,
    step_request,
    tensor_of,
    written,
)
from tests.llm.test_metrics import key, read
from tests.llm.test_worker import until
from tests.models.causal import build, packed, several_labels

PATIENCE = 20
SIZES = [(7, 3, 11), (9,), (4, 12), (8, 8, 8, 8), (12, 2)]
"""Lengths of the samples of five requests that go together; 33 to 48 tokens when padded."""


class Watched(FrozenLLM):
    """Waits at a gate before each computation, and knows how large each was."""

    def __init__(self, most: int = 1 << 30) -> None:
        """Above `most` padded tokens the device is out of memory."""
        super().__init__(build(positions=600), "mark")
        self.gate = threading.Event()
        self.waiting = threading.Event()
        self.most = most
        self.refused = 0
        self.sizes: list[int] = []

    def _enter(self, lengths: tuple[int, ...]) -> None:
        self.waiting.set()
        assert self.gate.wait(PATIENCE)
        size = max(lengths) * len(lengths)
        if size > self.most:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.sizes.append(size)

    def step(self, sequences: Sequences, labels: torch.Tensor, weights: torch.Tensor) -> StepResult:
        self._enter(sequences.lengths)
        return super().step(sequences, labels, weights)

    def score(self, sequences: Sequences, labels: torch.Tensor) -> ScoreResult:
        self._enter(sequences.lengths)
        return super().score(sequences, labels)

    def forward(self, sequences: Sequences, positions: torch.Tensor, keep: bool = True) -> Any:
        self._enter(sequences.lengths)
        return super().forward(sequences, positions, keep)

    def write(self, answers: Any) -> list[Written]:
        self._enter(tuple(length for answer in answers for length in answer.lengths))
        return super().write(answers)


@pytest.fixture
def watched() -> Iterator[Watched]:
    engine = Watched()
    yield engine
    engine.gate.set()


def step_of(
    engine: FrozenLLM, lengths: tuple[int, ...], seed: int
) -> tuple[Sequences, torch.Tensor, torch.Tensor]:
    weights = torch.rand(len(lengths), generator=torch.Generator().manual_seed(seed))
    return packed(engine, lengths, seed), several_labels(lengths, seed), weights


async def at_the_gate(llm: Caller, engine: Watched) -> asyncio.Task[Any]:
    """A first request is being computed: what comes now waits."""
    request = score_request(llm.header("first"), packed(engine, (5,)), several_labels((5,)))
    task = asyncio.create_task(llm_stream(llm, "Score", request, "first"))
    await asyncio.to_thread(engine.waiting.wait, PATIENCE)
    return task


async def llm_stream(llm: Caller, rpc: str, messages: list[Any], client: str) -> list[Any]:
    """All replies to `client`; errors are gRPC's."""
    token = (("authorization", f"Bearer {llm.token(client)}"),)
    call = getattr(llm.stub, rpc)(iter(messages), metadata=token, timeout=60)
    return [reply async for reply in call] if hasattr(call, "__aiter__") else [await call]


async def steps(
    llm: Caller, engine: Watched, sizes: list[tuple[int, ...]], alone: bool = False
) -> list[Any]:
    """The replies to one request of each size, each another client's, that all waited together."""
    first = await at_the_gate(llm, engine)
    calls = []
    for seed, lengths in enumerate(sizes):
        messages = step_request(llm.header(f"c{seed}"), *step_of(engine, lengths, seed))
        messages[0].head.header.alone = alone
        calls.append(llm_stream(llm, "ForwardBackward", messages, f"c{seed}"))
    waiting = asyncio.gather(*calls, return_exceptions=True)
    await until(lambda: llm.server.worker.depth == len(sizes))
    engine.gate.set()
    found = await waiting
    await first
    return found


def check(replies: list[Any], engine: FrozenLLM, lengths: tuple[int, ...], seed: int) -> None:
    """What the engine gives to that request alone: in fp32 the same to 1e-5 of the largest value."""
    expected = FrozenLLM.step(engine, *step_of(engine, lengths, seed))
    result = replies[0].result
    gradient = tensor_of(result.gradient.dense.values, replies[1:])
    largest = float(expected.gradient.abs().max())
    torch.testing.assert_close(gradient, expected.gradient, rtol=0, atol=1e-5 * largest)
    sums = torch.from_numpy(codec.decode(result.loss_sums).copy())
    torch.testing.assert_close(sums, expected.loss_sums, rtol=1e-5, atol=0)
    assert codec.decode(result.token_counts).tolist() == expected.token_counts.tolist()


async def test_steps_of_several_clients_are_one_batch_and_each_gets_its_own(start, watched):
    llm = await start(on=watched)
    found = await steps(llm, watched, SIZES)
    assert watched.sizes == [5, 12 * 12]
    watched.most = 1 << 30
    for seed, (replies, lengths) in enumerate(zip(found, SIZES, strict=True)):
        check(replies, watched, lengths, seed)


@pytest.mark.parametrize("how", ["asked for", "set"])
async def test_alone_the_bytes_are_those_of_the_engine(start, watched, how):
    """Asked for by the caller, as deterministic runs do, or set by the operator."""
    llm = await start(on=watched, **({"batch_tokens": 0} if how == "set" else {}))
    found = await steps(llm, watched, SIZES, alone=how == "asked for")
    assert len(watched.sizes) == 1 + len(SIZES)
    for seed, (replies, lengths) in enumerate(zip(found, SIZES, strict=True)):
        expected = FrozenLLM.step(watched, *step_of(watched, lengths, seed))
        gradient = tensor_of(replies[0].result.gradient.dense.values, replies[1:])
        assert torch.equal(gradient, expected.gradient)


async def test_scores_and_unkept_passes_are_joined_with_their_like(start, watched):
    llm = await start(on=watched, metrics_port=0)
    first = await at_the_gate(llm, watched)
    wanted = [torch.tensor([i, 2, i]) for i in range(3)]
    calls = []
    for seed, lengths in enumerate(SIZES[:3]):
        sequences, labels, _ = step_of(watched, lengths, seed)
        header = llm.header()
        calls.append(llm.stream("Score", score_request(header, sequences, labels)))
        calls.append(llm.stream("Forward", forward_request(header, sequences, wanted[seed], False)))
    waiting = asyncio.gather(*calls)
    await until(lambda: llm.server.worker.depth == 6)
    watched.gate.set()
    found = await waiting
    await first
    assert len(watched.sizes) == 1 + 2
    for seed, lengths in enumerate(SIZES[:3]):
        sequences, labels, _ = step_of(watched, lengths, seed)
        expected, (score,) = FrozenLLM.score(watched, sequences, labels), found[2 * seed]
        torch.testing.assert_close(
            torch.from_numpy(codec.decode(score.loss_sums).copy()), expected.loss_sums
        )
        assert codec.decode(score.correct_counts).tolist() == expected.correct_counts.tolist()
        result, *chunks = found[2 * seed + 1]
        logits = FrozenLLM.forward(watched, sequences, wanted[seed], keep=False).logits
        torch.testing.assert_close(tensor_of(result.result.logits, chunks), logits)
    metrics = await read(llm)
    assert metrics[key("fednano_llm_batch_requests_sum", kind="score")] == 1 + 3
    assert metrics[key("fednano_llm_batch_requests_count", kind="train")] == 1
    assert 0 < metrics[key("fednano_llm_batch_padding_sum")] < 3


async def test_long_and_short_ones_are_not_padded_to_each_other(start, watched):
    llm = await start(on=watched)
    sizes = [(40, 40), (6, 6, 6, 6), (38, 40), (6, 5, 6)]
    found = await steps(llm, watched, sizes)
    assert sorted(watched.sizes) == [5, 6 * 7, 40 * 4]
    for seed, (replies, lengths) in enumerate(zip(found, sizes, strict=True)):
        check(replies, watched, lengths, seed)


async def test_the_budget_bounds_a_batch_and_divides_a_larger_request(start, watched):
    llm = await start(on=watched, batch_tokens=60)
    sizes = [(9,) * 4, (10,) * 23, (8,) * 5]
    found = await steps(llm, watched, sizes)
    assert max(watched.sizes) <= 60
    assert len(watched.sizes) > 1 + (4 * 9 + 23 * 10 + 5 * 8) // 60
    for seed, (replies, lengths) in enumerate(zip(found, sizes, strict=True)):
        check(replies, watched, lengths, seed)


async def test_numbers_too_large_for_the_model_fail_their_caller_only(start, watched):
    llm = await start(on=watched)
    first = await at_the_gate(llm, watched)
    sequences, labels, weights = step_of(watched, (7, 3), 0)
    wrong = step_request(llm.header(), sequences, labels, torch.full((2,), 3e38))
    wrong[0].head.gradient_dtype = INT8  # it can't hold infinity
    bad = asyncio.create_task(llm.failure("ForwardBackward", wrong))
    good = asyncio.create_task(
        llm.stream("ForwardBackward", step_request(llm.header(), sequences, labels, weights))
    )
    await until(lambda: llm.server.worker.depth == 2)
    watched.gate.set()
    assert isinstance(await bad, InvalidRequest)
    check(await good, watched, (7, 3), 0)
    await first
    assert len(watched.sizes) == 2


async def test_one_that_makes_a_batch_fail_is_found_out_and_the_others_succeed(start, watched):
    class Choosy(Watched):
        def step(self, sequences: Sequences, *rest: Any) -> StepResult:
            if 13 in sequences.lengths:
                self.sizes.append(-1)
                raise RuntimeError("thirteen")
            return super().step(sequences, *rest)

    engine = Choosy()
    llm = await start(on=engine)
    found = await steps(llm, engine, [(12, 10), (13,), (11,)])
    engine.gate.set()
    assert isinstance(found[1], grpc.aio.AioRpcError)
    assert found[1].code() is grpc.StatusCode.INTERNAL
    check(found[0], engine, (12, 10), 0)
    check(found[2], engine, (11,), 2)
    assert engine.sizes.count(-1) == 2  # together with the others, then once alone


async def test_a_batch_that_memory_has_no_room_for_is_taken_apart(start):
    engine = Watched(most=40)
    llm = await start(on=engine)
    sizes = [(9, 9), (8, 2), (10,) * 11, (6, 6, 6)]
    found = await steps(llm, engine, sizes)
    assert max(engine.sizes) <= 40
    for seed, (replies, lengths) in enumerate(zip(found, sizes, strict=True)):
        check(replies, engine, lengths, seed)
    refused = engine.refused
    assert refused > 0
    messages = step_request(llm.header(), *step_of(engine, (10,) * 11, 2))
    check(await llm.stream("ForwardBackward", messages), engine, (10,) * 11, 2)
    assert engine.refused == refused  # the budget has shrunk


async def test_what_asked_to_be_alone_is_refused_rather_than_divided(start):
    engine = Watched(most=40)
    engine.gate.set()
    llm = await start(on=engine)
    messages = step_request(llm.header(), *step_of(engine, (10,) * 5, 0))
    messages[0].head.header.alone = True
    assert isinstance(await llm.failure("ForwardBackward", messages), Busy)
    messages[0].head.header.alone = False
    check(await llm.stream("ForwardBackward", messages), engine, (10,) * 5, 0)


async def test_a_sample_that_memory_has_no_room_for_is_refused_and_no_other(start):
    engine = Watched(most=40)
    llm = await start(on=engine)
    found = await steps(llm, engine, [(9, 9), (44,), (41, 3, 3)])
    assert [type(replies) for replies in found[1:]] == [grpc.aio.AioRpcError] * 2
    assert {error.code() for error in found[1:]} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    check(found[0], engine, (9, 9), 0)


async def test_a_request_whose_time_is_over_is_not_computed(start, watched):
    llm = await start(on=watched)
    first = await at_the_gate(llm, watched)
    messages = step_request(llm.header(), *step_of(watched, (7, 3), 0))
    late = llm.stub.ForwardBackward(iter(messages), metadata=llm.metadata(), timeout=0.3)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await late.read()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: llm.server.worker.depth == 0)
    watched.gate.set()
    await first
    await llm.stream("Score", score_request(llm.header(), packed(watched), several_labels()))
    assert watched.sizes == [5, 33]


SAMPLINGS = [
    Sampling(30, stop_ids=(1,)),
    Sampling(12, temperature=1.2, seed=3, stop_ids=(1,)),
    Sampling(20, temperature=0.8, top_p=0.9, seed=5, stop_ids=(1,)),
]


async def answers(llm: Caller, engine: Watched, alone: bool = False) -> list[dict[int, list[int]]]:
    """Three at the same time, each from another prompt."""
    engine.gate.set()
    calls = []
    for seed, (lengths, sampling) in enumerate(zip(SIZES, SAMPLINGS, strict=False)):
        messages = generate_request(llm.header(), packed(engine, lengths, seed), sampling)
        messages[0].head.header.alone = alone
        calls.append(written(llm.stub.Generate(iter(messages), metadata=llm.metadata())))
    return [ids for ids, _ in await asyncio.gather(*calls)]


def expected_answers(engine: FrozenLLM) -> list[dict[int, list[int]]]:
    """Of an engine that does nothing else."""
    quiet = FrozenLLM(engine._model, "mark")
    found: list[dict[int, list[int]]] = [{} for _ in SAMPLINGS]
    for seed, (lengths, sampling) in enumerate(zip(SIZES, SAMPLINGS, strict=False)):
        for tokens in quiet.generate(packed(quiet, lengths, seed), sampling):
            for token in tokens:
                found[seed].setdefault(token.sample, []).append(token.id)
    return found


@pytest.mark.parametrize("alone", [False, True])
async def test_answers_that_are_written_together_are_those_written_alone(start, watched, alone):
    llm = await start(on=watched)
    assert await answers(llm, watched, alone) == expected_answers(watched)
    if alone:
        assert len(watched.sizes) == 30 + 12 + 20
    else:
        assert 30 <= len(watched.sizes) < 50


async def test_answers_that_memory_has_no_room_for_wait_for_the_others(start):
    engine = Watched(most=130)  # of one answer at a time
    llm = await start(on=engine)
    assert await answers(llm, engine) == expected_answers(engine)
    assert max(engine.sizes) <= 130


async def test_training_comes_before_the_answers_that_wait(start, watched):
    """Both wait at the same gate; the step is asked for last and is done first."""
    llm = await start(on=watched)
    first = await at_the_gate(llm, watched)
    request = generate_request(llm.header(), packed(watched, (5,)), Sampling(3, stop_ids=(1,)))
    answer = llm.stub.Generate(iter(request), metadata=llm.metadata())
    await until(lambda: llm.server.worker.depth == 1)
    step = asyncio.create_task(
        llm.stream("ForwardBackward", step_request(llm.header(), *step_of(watched, (9, 9, 9), 0)))
    )
    await until(lambda: llm.server.worker.depth == 2)
    watched.gate.set()
    await asyncio.gather(first, step)
    ids, _ = await written(answer)
    assert watched.sizes == [5, 27, 5, 6, 7]
    assert len(ids[0]) == 3
