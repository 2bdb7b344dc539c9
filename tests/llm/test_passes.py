"""Forward and Backward of several clients' own losses in one batch, and when they aren't."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from fednano.models.frozen import FrozenLLM
from fednano.models.language_model import Sequences
from fednano.wire.errors import InvalidRequest

from tests.llm.caller import Caller, backward_request, forward_request, tensor_of
from tests.llm.test_batching import SIZES, Watched, at_the_gate, llm_stream
from tests.llm.test_worker import until
from tests.models.causal import VOCABULARY, packed

FEW = SIZES[:4]


class Passing(Watched):
    """Knows how large each pass was, and which were computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.again: list[int] = []

    def forward(self, sequences: Sequences, *arguments: Any, **more: Any) -> Any:
        self._enter(sequences.lengths)
        return FrozenLLM.forward(self, sequences, *arguments, **more)

    def backward_again(self, sequences: Sequences, *arguments: Any) -> torch.Tensor:
        self._enter(sequences.lengths)
        self.again.append(self.sizes[-1])
        return super().backward_again(sequences, *arguments)


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(
        "fednano.llm.passes._RECENT_SECONDS", 60.0
    )  # a busy machine may take a while
    engine = Passing()
    yield engine
    engine.gate.set()


def asked(engine: FrozenLLM, seed: int) -> tuple[Sequences, torch.Tensor, torch.Tensor]:
    """Sequences, positions, and a gradient of the logits there."""
    positions = torch.tensor([seed, 2, 5 + seed])
    generator = torch.Generator().manual_seed(seed)
    return (
        packed(engine, FEW[seed], seed),
        positions,
        torch.randn(3, VOCABULARY, generator=generator),
    )


async def together(llm: Caller, engine: Watched, rpc: str, requests: list[Any]) -> list[Any]:
    """The replies to requests of c0, c1 ..., which all waited for the device."""
    engine.gate.clear()
    engine.waiting.clear()
    first = await at_the_gate(llm, engine)
    calls = [llm_stream(llm, rpc, messages, f"c{n}") for n, messages in enumerate(requests)]
    waiting = asyncio.gather(*calls)
    await until(lambda: llm.server.worker.depth == len(requests))
    engine.gate.set()
    found = await waiting
    await first
    return found


def alone(messages: list[Any], wanted: bool = True) -> list[Any]:
    messages[0].head.header.alone = wanted
    return messages


async def another(llm: Caller, engine: Passing) -> None:
    """Somebody else has a loss of its own, too."""
    engine.gate.set()
    request = forward_request(llm.header("x"), *asked(engine, 1)[:2], keep=False)
    await llm_stream(llm, "Forward", request, "x")
    engine.sizes.clear()


async def both(llm: Caller, engine: Passing, asked_alone: bool = False) -> list[torch.Tensor]:
    """The gradients that four clients get at the same time."""
    await another(llm, engine)
    given = [asked(engine, seed) for seed in range(len(FEW))]
    requests = [
        alone(forward_request(llm.header(f"c{n}"), sequences, positions), asked_alone)
        for n, (sequences, positions, _) in enumerate(given)
    ]
    forwards = await together(llm, engine, "Forward", requests)
    for (sequences, positions, _), (first, *chunks) in zip(given, forwards, strict=True):
        logits = FrozenLLM.forward(engine, sequences, positions, keep=False).logits
        torch.testing.assert_close(tensor_of(first.result.logits, chunks), logits)
    requests = [
        alone(backward_request(llm.header(f"c{n}"), reply[0].result.activation, above), asked_alone)
        for n, (reply, (_, _, above)) in enumerate(zip(forwards, given, strict=True))
    ]
    backwards = await together(llm, engine, "Backward", requests)
    assert len(engine.activations) == 0
    return [tensor_of(first.gradient.dense.values, chunks) for first, *chunks in backwards]


def check(found: list[torch.Tensor], engine: FrozenLLM) -> None:
    """In fp32 as alone, to 1e-5 of the largest value."""
    for seed, gradient in enumerate(found):
        sequences, positions, above = asked(engine, seed)
        expected = FrozenLLM.backward(engine, "", above, sequences, positions)
        largest = float(expected.abs().max())
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-5 * largest)


async def test_several_clients_passes_share_a_batch_each_way(start, passing):
    llm = await start(on=passing, join_backward_tokens=100)
    check(await both(llm, passing), passing)
    samples = sum(map(len, FEW))
    assert passing.sizes == [5, 12 * samples, 5, 12 * samples]
    assert len(passing.again) == 1


@pytest.mark.parametrize("how", ["asked for", "set", "nothing is joined", "too large"])
async def test_a_graph_is_kept_for_who_is_alone_or_large(start, passing, how):
    limit = {"asked for": 100, "set": -1, "nothing is joined": 100, "too large": 8}[how]
    tokens = 0 if how == "nothing is joined" else -1
    llm = await start(on=passing, join_backward_tokens=limit, batch_tokens=tokens)
    check(await both(llm, passing, asked_alone=how == "asked for"), passing)
    assert not passing.again


async def test_a_graph_is_kept_where_nobody_else_is(start, passing):
    passing.gate.set()
    llm = await start(on=passing, join_backward_tokens=100)
    sequences, positions, above = asked(passing, 0)
    first, *_ = await llm.stream("Forward", forward_request(llm.header(), sequences, positions))
    request = backward_request(llm.header(), first.result.activation, above)
    first, *chunks = await llm.stream("Backward", request)
    expected = FrozenLLM.backward(passing, "", above, sequences, positions)
    assert torch.equal(tensor_of(first.gradient.dense.values, chunks), expected)
    assert not passing.again


async def test_what_is_gone_is_computed_from_embeddings_in_company_too(start, passing):
    llm = await start(on=passing, join_backward_tokens=100)
    await another(llm, passing)
    given = [asked(passing, seed) for seed in range(len(FEW))]
    requests = [
        backward_request(llm.header(f"c{n}"), "elsewhere/1", above, sequences, positions)
        for n, (sequences, positions, above) in enumerate(given)
    ]
    found = await together(llm, passing, "Backward", requests)
    check([tensor_of(first.gradient.dense.values, chunks) for first, *chunks in found], passing)
    assert len(passing.again) == 1


async def test_a_gradient_of_another_size_loses_nothing(start, passing):
    passing.gate.set()
    llm = await start(on=passing, join_backward_tokens=100)
    await another(llm, passing)
    sequences, positions, above = asked(passing, 0)
    first, *_ = await llm.stream("Forward", forward_request(llm.header(), sequences, positions))
    name = first.result.activation
    error = await llm.failure("Backward", backward_request(llm.header(), name, above[:2]))
    assert isinstance(error, InvalidRequest)
    assert f"logits_gradient: expected [3, {VOCABULARY}], got [2, {VOCABULARY}]" in error.detail
    asked_alone = alone(backward_request(llm.header(), name, above))
    first, *chunks = await llm.stream("Backward", asked_alone)
    expected = FrozenLLM.backward(passing, "", above, sequences, positions)
    assert torch.equal(tensor_of(first.gradient.dense.values, chunks), expected)
