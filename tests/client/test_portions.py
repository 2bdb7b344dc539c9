"""A batch beyond the service's limits is cut into portions, and nothing but that changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from fednano.client.adapters import NanoAdapters
from fednano.client.batches import Batch
from fednano.client.edge import EdgeHalf, NanoEdge
from fednano.client.examples import Example
from fednano.client.factored import FactoredLanguageModel
from fednano.client.fisher import FisherEstimate
from fednano.client.losses import client_side_step
from fednano.client.meter import Meter
from fednano.client.portions import WHOLE, cut
from fednano.client.trainer import Trainer
from fednano.client.wires import DenseWire, FactoredWire, Wire
from fednano.models.frozen import FrozenLLM
from fednano.models.language_model import Sampling
from fednano.wire.errors import InvalidRequest
from fednano.wire.llm_pb2 import Limits
from fednano.wire.run_config import TrainingConfig
from hypothesis import given
from hypothesis import strategies as st

from tests.client.serving import Served, remote
from tests.tiny import picture

LIMITS = {
    "tokens": ({"tokens_per_request": 120}, 2),
    "samples": ({"samples_per_request": 2}, 2),
    "bytes": ({"message_mebibytes": 1}, 28),
}


@contextmanager
def limited(frozen: FrozenLLM, meter: Meter | None = None, **limits: Any) -> Iterator[Any]:
    """A caller of a service with these limits, and a count of what it is asked."""
    service = Served(frozen, **limits)

    def asked(rpc: str) -> int:
        found = service.server.metrics.registry.get_sample_value(
            "fednano_llm_step_seconds_count", {"rpc": rpc}
        )
        return int(found or 0)

    try:
        with remote(service.port, meter=meter) as llm:
            yield llm, asked
    finally:
        service.stop()


@pytest.fixture
def prepared(edge: EdgeHalf, examples: list[Example]) -> list[Any]:
    return [edge.prepare(example) for example in examples]


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert wanted.norm() > 0
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("limit", LIMITS)
def test_a_divided_step_and_score_are_those_of_the_whole(
    frozen: FrozenLLM, adapters: NanoAdapters, prepared: list[Any], limit: str
) -> None:
    limits, times = LIMITS[limit]
    batch = Batch.of(prepared * times)
    sequences = batch.sequences(NanoEdge(adapters)(batch).detach())
    arguments = sequences, batch.labels, batch.weights
    wanted, score = frozen.step(*arguments), frozen.score(sequences, batch.labels)
    with limited(frozen, **limits) as (llm, asked):
        found, scored = llm.step(*arguments), llm.score(sequences, batch.labels)
        assert asked("ForwardBackward") > 1
        assert asked("Score") > 1
        own = client_side_step(llm, *arguments)
        assert asked("Forward") == asked("Backward") > 1
    close(found.gradient, wanted.gradient)
    close(found.loss_sums, wanted.loss_sums)
    close(scored.loss_sums, score.loss_sums)
    torch.testing.assert_close(own.gradient, wanted.gradient, rtol=1e-4, atol=1e-7)
    assert own.token_counts.tolist() == found.token_counts.tolist() == wanted.token_counts.tolist()
    assert scored.correct_counts.tolist() == score.correct_counts.tolist()


def gradients(wire: Wire, adapters: NanoAdapters, batch: Batch) -> dict[str, torch.Tensor]:
    """Of the adapters, and their Fisher."""
    own = copy.deepcopy(adapters)
    estimate = FisherEstimate(own)
    wire.step(NanoEdge(own), batch, estimate).backward()
    found = {n: p.grad for n, p in own.named_parameters() if p.grad is not None}
    return found | {n: torch.from_numpy(f) for n, f in estimate.mean().items()}


@pytest.mark.parametrize("limit", ["tokens", "samples"])
def test_a_divided_factored_step_adds_up(
    frozen: FrozenLLM, adapters: NanoAdapters, prepared: list[Any], limit: str
) -> None:
    limits, times = LIMITS[limit]
    batch = Batch.of(prepared * times)
    with limited(frozen, **limits) as (llm, asked):
        found = gradients(FactoredWire(FactoredLanguageModel(llm)), adapters, batch)
        assert asked("ForwardBackward") > 1
    wanted = gradients(DenseWire(frozen), adapters, batch)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


def test_divided_answers_are_those_of_the_whole(
    trainer: Trainer, frozen: FrozenLLM, adapters: NanoAdapters, examples: list[Example]
) -> None:
    asked_for = [*examples, replace(examples[0], question="Write the digit as a numeral.")]
    sampling = Sampling(max_new_tokens=6)
    wanted = trainer.answers(adapters, asked_for, sampling)
    evaluated = trainer.evaluate(adapters, asked_for)
    with limited(frozen, samples_per_request=2) as (llm, asked):
        for factored in (None, FactoredLanguageModel(llm)):
            divided = replace(trainer, llm=llm, factored=factored)
            assert divided.answers(adapters, asked_for, sampling) == wanted
            found = divided.evaluate(adapters, asked_for)
            assert found.loss == pytest.approx(evaluated.loss, rel=1e-6)
            assert found.by_kind == evaluated.by_kind
        assert asked("Generate") >= 4
    assert len(set(wanted)) > 1


def test_an_answer_goes_on_by_the_dense_wire_where_the_next_bases_find_no_room(
    trainer: Trainer, frozen: FrozenLLM, adapters: NanoAdapters, examples: list[Example]
) -> None:
    """The dense portions are others than the factored ones, and nothing is written twice."""
    few = [replace(examples[2], question=f"Is {n} even?") for n in range(50)]
    pictures = [tuple(picture(3 * n + i) for i in range(3)) for n in range(50)]
    many = [replace(examples[1], images=p, question="What are these?") for p in pictures]
    sampling = Sampling(max_new_tokens=2)
    limits = {"samples_per_request": 50, "base_mebibytes": 1, "message_mebibytes": 1}
    with limited(frozen, **limits) as (llm, asked):
        divided = replace(trainer, llm=llm, factored=FactoredLanguageModel(llm))
        found = list(divided.stream(adapters, [*few, *many], sampling))
        assert asked("Generate") > 2
    wanted = list(trainer.stream(adapters, [*few, *many], sampling))
    assert sorted(s for s, _ in found) == sorted(s for s, _ in wanted)
    for sample in range(100):
        written = [[t for s, t in tokens if s == sample] for tokens in (found, wanted)]
        assert written[0] == written[1]


def test_a_sample_that_is_too_long_is_named_before_anything_is_sent(
    frozen: FrozenLLM, adapters: NanoAdapters, prepared: list[Any]
) -> None:
    batch, meter = Batch.of(prepared), Meter()
    sequences = batch.sequences(NanoEdge(adapters)(batch).detach())
    longest = max(batch.lengths)
    assert batch.lengths.index(longest) == 1
    with limited(frozen, meter, tokens_per_sample=longest - 1) as (llm, asked):
        meter.take()
        expected = rf"embeddings.samples\[1\]: expected 1 to {longest - 1} tokens, got {longest}"
        with pytest.raises(InvalidRequest, match=expected):
            llm.step(sequences, batch.labels, 1 / batch.label_counts)
        wire = FactoredWire(FactoredLanguageModel(llm))
        with pytest.raises(InvalidRequest, match=expected):
            wire.score(NanoEdge(adapters), batch)
        assert not meter.take().sent_bytes
        assert asked("ForwardBackward") == 0


def test_whoever_trains_is_told_which_example_is_too_long(
    trainer: Trainer, frozen: FrozenLLM, adapters: NanoAdapters, examples: list[Example]
) -> None:
    short = replace(examples[0], id="short", images=())
    long = replace(short, id="scans/17", question="Is it even? " * 40)
    with limited(frozen, tokens_per_sample=60) as (llm, _):
        divided = replace(trainer, llm=llm)
        told = "example 'scans/17': expected 1 to 60 tokens, got"
        with pytest.raises(InvalidRequest, match=told):
            divided.evaluate(adapters, [short, long])
        with pytest.raises(InvalidRequest, match=told):
            divided.train(adapters, lambda _: [short, long], TrainingConfig())


def test_the_bytes_of_one_sample_have_a_limit_too() -> None:
    limits = Limits(
        tokens_per_sample=9, tokens_per_request=9, samples_per_request=9, message_bytes=50
    )
    with pytest.raises(InvalidRequest, match="expected at most 50 bytes, got 51"):
        cut([1, 1], [10, 41], limits, beside=10)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(9, 30),
    st.integers(45, 150),
)
def test_portions_fit_and_miss_nothing(
    samples: list[tuple[int, int]], most: int, tokens: int, size: int
) -> None:
    limits = Limits(
        tokens_per_sample=9,
        tokens_per_request=tokens,
        samples_per_request=most,
        message_bytes=size,
    )

    def fits(chosen: list[tuple[int, int]]) -> bool:
        padded = len(chosen) * max(length for length, _ in chosen)
        held = 5 + sum(bytes_ for _, bytes_ in chosen)
        return len(chosen) <= most and padded <= tokens and held <= size

    lengths = [length for length, _ in samples]
    portions = cut(lengths, [bytes_ for _, bytes_ in samples], limits, beside=5)
    assert (portions == [WHOLE]) == fits(samples)
    chosen = [samples[portion.samples] for portion in portions]
    assert all(fits(part) for part in chosen)
    assert [sample for part in chosen for sample in part] == samples
    places = list(range(sum(lengths)))
    assert [p for portion in portions for p in places[portion.tokens]] == places
    for part, portion in zip(chosen, portions, strict=True):
        assert len(places[portion.tokens]) == sum(length for length, _ in part)
