"""Whatever a caller sends, it gets a sentence that names the field, and the service goes on."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from fednano.models.frozen import FrozenLLM
from fednano.models.language_model import LowRank, Sampling, Sequences
from fednano.wire import codec, llm_pb2
from fednano.wire.errors import InvalidRequest, UnsupportedProtocol, WrongModel
from fednano.wire.tensor_pb2 import FP16, INT8, INT32, Tensor, TensorSpec

from tests.llm.caller import (
    Caller,
    backward_request,
    forward_request,
    generate_request,
    score_request,
    step_request,
)
from tests.models.causal import HIDDEN, VOCABULARY, build, packed, several_labels

LIMITS = {
    "tokens_per_request": 40,
    "samples_per_request": 4,
    "tokens_per_sample": 12,
    "new_tokens": 8,
    "message_mebibytes": 1,
}
WEIGHTS = torch.tensor([0.3, 0.1, 2.0])


@dataclass(frozen=True)
class Bad:
    """How a good step is spoiled, and what the answer must say."""

    spoil: Callable[[Any], Any]
    says: str
    error: type = InvalidRequest


def of_head(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def spoil(messages: list[Any]) -> None:
        change(messages[0].head)

    return spoil


def labelled(**at: int) -> Tensor:
    labels = several_labels()
    for index, value in at.items():
        labels[int(index[1:])] = value
    return codec.encode(labels.numpy())


def values(change: Callable[[np.ndarray], Any]) -> Callable[[Any], Any]:
    def spoil(messages: list[Any]) -> None:
        array = np.frombuffer(messages[1].chunk, "<f4").reshape(-1, HIDDEN).copy()
        change(array)
        messages[1].chunk = array.tobytes()

    return spoil


def put(field: str, value: Any) -> Callable[[Any], Any]:
    """Sets `field`, a path from the head, to a message or a plain value."""
    *path, last = field.split(".")

    def change(head: Any) -> None:
        for name in path:
            head = head[int(name)] if name.isdigit() else getattr(head, name)
        if hasattr(value, "SerializeToString"):
            getattr(head, last).CopyFrom(value)
        else:
            setattr(head, last, value)

    return of_head(change)


def spec(*shape: int, dtype: Any = FP16) -> TensorSpec:
    return TensorSpec(name="x", dtype=dtype, shape=shape)


def more(count: int, length: int) -> Callable[[Any], Any]:
    """`count` samples of `length` tokens."""

    def change(head: Any) -> None:
        del head.embeddings.samples[:]
        for _ in range(count):
            segment = llm_pb2.Segment(modality=llm_pb2.TEXT, start=0, length=length)
            head.embeddings.samples.append(llm_pb2.Sample(segments=[segment]))

    return of_head(change)


SEGMENT = "embeddings.samples.1.segments.0"
BAD = {
    "protocol": Bad(put("header.protocol", 9), "protocol: expected 1, got 9", UnsupportedProtocol),
    "fingerprint": Bad(
        put("header.fingerprint", "x"), "fingerprint: expected mark, got x", WrongModel
    ),
    "no request id": Bad(put("header.request", ""), "header.request: expected a value"),
    "no head": Bad(lambda m: m.pop(0), "first message: expected a head, got chunk"),
    "nothing": Bad(lambda m: m.clear(), "first message: expected a head, got nothing"),
    "an empty message": Bad(
        lambda m: m.insert(0, llm_pb2.ForwardBackwardRequest()), "expected a head, got nothing"
    ),
    "a second head": Bad(lambda m: m.append(m[0]), "chunk: expected 1 to 1048576 bytes, got head"),
    "an empty chunk": Bad(
        lambda m: m.append(llm_pb2.ForwardBackwardRequest(chunk=b"")),
        "chunk: expected 1 to 1048576 bytes, got 0 bytes",
    ),
    "a chunk that is missing": Bad(
        lambda m: m.pop(), "payload: expected 2688 bytes as announced, got 0"
    ),
    "a chunk too many": Bad(
        lambda m: m.append(m[1]), "payload: expected 2688 bytes as announced, got at least 5376"
    ),
    "no embeddings": Bad(
        of_head(lambda h: h.ClearField("embeddings")), "embeddings.form: expected dense"
    ),
    "another width": Bad(
        put("embeddings.dense.values", spec(21, 31)),
        "embeddings: expected [21, 32], got [21, 31]",
    ),
    "fewer tokens than the segments": Bad(
        put("embeddings.dense.values", spec(20, 32)), "expected [21, 32], got [20, 32]"
    ),
    "a huge shape": Bad(
        put("embeddings.dense.values", spec(1 << 40, 32)),
        "expected [21, 32], got [1099511627776, 32]",
    ),
    "integers for embeddings": Bad(
        put("embeddings.dense.values", spec(21, 32, dtype=INT32)),
        "embeddings.dtype: expected FP32, FP16, BF16 or INT8, got INT32",
    ),
    "an unknown dtype": Bad(
        put("embeddings.dense.values", spec(21, 32, dtype=77)),
        "embeddings.dtype: expected FP32, FP16, BF16 or INT8, got 77",
    ),
    "NaN": Bad(
        values(lambda a: a.__setitem__((4, 3), np.nan)),
        "embeddings: expected finite numbers, got NaN or infinity in row 4",
    ),
    "infinity": Bad(
        values(lambda a: a.__setitem__((0, 0), np.inf)), "got NaN or infinity in row 0"
    ),
    "no samples": Bad(more(0, 0), "embeddings.samples: expected 1 to 4, got 0"),
    "too many samples": Bad(more(5, 2), "embeddings.samples: expected 1 to 4, got 5"),
    "a sample without tokens": Bad(
        of_head(lambda h: h.embeddings.samples.add()),
        "embeddings.samples[3]: expected 1 to 12 tokens, got 0",
    ),
    "a sample that is too long": Bad(
        more(2, 13), "embeddings.samples[0]: expected 1 to 12 tokens, got 13"
    ),
    "too many tokens": Bad(more(4, 11), "expected at most 40 tokens"),
    "a gap": Bad(
        put(f"{SEGMENT}.start", 1), "samples[1].segments[0].start: expected 0, where the last ended"
    ),
    "an empty segment": Bad(
        put(f"{SEGMENT}.length", 0), "samples[1].segments[0].length: expected 1 or more, got 0"
    ),
    "an overlap": Bad(
        of_head(
            lambda h: h.embeddings.samples[1].segments.add(modality=llm_pb2.TEXT, start=2, length=1)
        ),
        "samples[1].segments[1].start: expected 3, where the last ended, got 2",
    ),
    "an unknown modality": Bad(
        put(f"{SEGMENT}.modality", 9), "modality: expected RAW, TEXT or IMAGE, got 9"
    ),
    "no labels": Bad(
        of_head(lambda h: h.ClearField("labels")),
        "labels.dtype: expected INT32 or INT64, got nothing",
    ),
    "too few labels": Bad(
        put("labels", codec.encode(np.zeros(20, "<i4"))), "labels: expected [21], got [20]"
    ),
    "a label beyond the vocabulary": Bad(
        put("labels", labelled(_5=64)), "labels: expected -100 or 0 to 63, got 64 at index 5"
    ),
    "a negative label": Bad(put("labels", labelled(_5=-1)), "got -1 at index 5"),
    "nothing labelled": Bad(
        put("labels", codec.encode(np.full(21, -100, "<i4"))), "expected at least one labelled"
    ),
    "only a first token labelled": Bad(
        put("labels", codec.encode(np.array([5, *[-100] * 20], "<i4"))), "at least one labelled"
    ),
    "labels that are cut short": Bad(
        of_head(lambda h: setattr(h.labels, "data", h.labels.data[:-1])),
        "labels: expected 168 bytes for INT64 [21], got 167",
    ),
    "too few weights": Bad(
        put("weights", codec.encode(np.ones(2, "<f4"))), "weights: expected [3], got [2]"
    ),
    "a weight that is not a number": Bad(
        put("weights", codec.encode(np.array([1, np.nan, 1], "<f4"))),
        "weights: expected finite numbers",
    ),
    "an integer gradient": Bad(
        put("gradient_dtype", INT32), "gradient_dtype: expected FP32, FP16, BF16 or INT8, got INT32"
    ),
}


@pytest.fixture
async def small(start: Callable[..., Any]) -> Caller:
    return await start(**LIMITS)


def good(llm: Caller, sequences: Sequences) -> list[Any]:
    return step_request(llm.header(), sequences, several_labels(), WEIGHTS)


@pytest.mark.parametrize("case", BAD)
async def test_a_bad_step_is_the_callers_fault(small, engine, case):
    bad, messages = BAD[case], good(small, packed(engine))
    bad.spoil(messages)
    error = await small.failure("ForwardBackward", messages)
    assert type(error).status is bad.error.status, error
    assert isinstance(error, bad.error)
    assert bad.says in error.detail
    assert all(p.field and p.expected and p.got for p in error.problems)
    assert error.problems
    await small.step(packed(engine), several_labels(), WEIGHTS)  # the service goes on


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("embeddings.position_ids", codec.encode(np.zeros((3, 21), "<i4"))),
        ("embeddings.token_types", codec.encode(np.zeros(21, "<i4"))),
        ("want_fisher", True),
    ],
)
async def test_what_is_not_offered_is_said_to_be(small, engine, field, value):
    messages = good(small, packed(engine))
    put(field, value)(messages)
    error = await small.failure("ForwardBackward", messages)
    assert error.status.name == "UNIMPLEMENTED"
    assert field.split(".")[-1] in error.detail


async def test_deep_features_are_not_offered(small, engine):
    messages = good(small, packed(engine))
    messages[0].head.embeddings.deep_features.append(spec(21, 32))
    assert "deep_features" in (await small.failure("ForwardBackward", messages)).detail


async def test_a_message_may_not_be_larger_than_the_limit(start, engine):
    llm = await start(message_mebibytes=1, tokens_per_request=10_000, samples_per_request=500)
    lengths = (40,) * 210
    request = score_request(llm.header(), packed(engine, lengths), several_labels(lengths))
    error = await llm.failure("Score", request)
    assert error.detail == "payload: expected at most 1048576 bytes, got 1075200 bytes"


@pytest.mark.parametrize("at", [21, -1])
async def test_positions_lie_within_the_tokens(small, engine, at):
    request = forward_request(small.header(), packed(engine), torch.tensor([0, at]))
    error = await small.failure("Forward", request)
    assert error.detail == f"positions: expected 0 to 20, got {at} at index 1"


async def test_logits_must_fit_in_a_reply(small, engine):
    positions = torch.zeros((1 << 20) // (4 * VOCABULARY) + 1, dtype=torch.long)
    request = forward_request(small.header(), packed(engine), positions)
    assert "so that the logits fit in a reply" in (await small.failure("Forward", request)).detail


async def test_a_logits_gradient_fits_the_logits(small, engine):
    replies = await small.stream(
        "Forward", forward_request(small.header(), packed(engine), torch.tensor([3, 4]))
    )
    name = replies[0].result.activation
    for shape, says in [((2, 63), "expected [2, 64], got [2, 63]"), ((3, 64), "expected [2, 64]")]:
        request = backward_request(small.header(), name, torch.zeros(shape))
        assert says in (await small.failure("Backward", request)).detail
    request = backward_request(small.header(), name, torch.full((2, 64), float("nan")))
    assert "logits_gradient: expected finite" in (await small.failure("Backward", request)).detail
    request = backward_request(small.header(), "", torch.zeros(2, 64))
    assert "activation: expected a name" in (await small.failure("Backward", request)).detail


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("sampling.max_new_tokens", 0, "sampling.max_new_tokens: expected 1 to 8, got 0"),
        ("sampling.max_new_tokens", 9, "expected 1 to 8, got 9"),
        ("sampling.temperature", -1.0, "sampling.temperature: expected 0 or more, got -1.0"),
        ("sampling.temperature", float("nan"), "expected 0 or more, got nan"),
        ("sampling.top_p", 1.5, "sampling.top_p: expected 0 to 1, got 1.5"),
        ("text_adapter.scale", float("inf"), "text_adapter.scale: expected a finite number"),
        ("text_adapter.down", TensorSpec(), "text_adapter.down: expected a rank of 1 to 32, got 0"),
        (
            "text_adapter.up",
            codec.spec_of("up", np.zeros((2, 32), "<f4")),
            "text_adapter.up: expected [32, 2], got [2, 32]",
        ),
    ],
)
async def test_bad_sampling_and_adapters_are_refused(small, engine, field, value, says):
    adapter = LowRank(torch.zeros(2, HIDDEN), torch.zeros(HIDDEN, 2), 1.0)
    request = generate_request(small.header(), packed(engine), Sampling(4), adapter)
    put(field, value)(request)
    assert says in (await small.failure("Generate", request)).detail


async def test_an_adapter_of_other_than_numbers_is_refused(small, engine):
    adapter = LowRank(torch.full((2, HIDDEN), float("nan")), torch.zeros(HIDDEN, 2), 1.0)
    request = generate_request(small.header(), packed(engine), Sampling(4), adapter)
    detail = (await small.failure("Generate", request)).detail
    assert "text_adapter.down: expected finite numbers" in detail


async def test_end_tokens_are_in_the_vocabulary(small, engine):
    request = generate_request(small.header(), packed(engine), Sampling(4, stop_ids=(64,)))
    assert "stop_ids: expected 0 to 63, got 64" in (await small.failure("Generate", request)).detail


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (np.array([64], "<i4"), "ids: expected 0 to 63, got 64 at index 0"),
        (np.array([], "<i4"), "ids: expected 1 to 40, got 0"),
        (np.zeros(41, "<i4"), "ids: expected 1 to 40, got 41"),
        (np.zeros((1, 2), "<i4"), "ids: expected ['any'], got [1, 2]"),
        (np.zeros(2, "<f4"), "ids.dtype: expected INT32 or INT64, got FP32"),
    ],
)
async def test_ids_are_rows_of_the_table(small, ids, says):
    request = llm_pb2.EmbedRequest(header=small.header(), ids=codec.encode(ids))
    with pytest.raises(InvalidRequest, match=re.escape(says)):
        await small.unary("Embed", request)


async def test_scales_of_quantised_embeddings_are_finite(small, engine):
    sequences = packed(engine)
    request = score_request(small.header(), sequences, several_labels())
    request[0].head.embeddings.dense.values.dtype = INT8
    scales = np.ones(21, "<f4")
    scales[2] = np.nan
    request[1].chunk = bytes(21 * HIDDEN) + scales.tobytes()
    assert "NaN or infinity in row 2" in (await small.failure("Score", request)).detail


async def test_embeddings_that_are_too_large_for_the_model_are_not_answered_with_nan(start):
    """Finite in the request, infinite in half precision."""
    engine = FrozenLLM(build().half(), "mark")
    llm = await start(on=engine)
    full = packed(FrozenLLM(build(), "mark"))
    large = Sequences(full.values * 1e30, full.segments)
    request = step_request(llm.header(), large, several_labels(), WEIGHTS)
    error = await llm.failure("ForwardBackward", request)
    assert "expected values that give a finite loss, got nan" in error.detail
