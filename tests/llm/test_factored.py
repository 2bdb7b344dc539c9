"""Factored embeddings over a real service: uploads, what they are good for, and what is refused."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from fednano.models.factored import Factored, base_digest
from fednano.models.language_model import Modality, Sampling, Segment
from fednano.wire import codec, llm_pb2, llm_pb2_grpc, torch_codec
from fednano.wire.channels import translated
from fednano.wire.errors import (
    BadTensor,
    FedNanoError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    UnknownBase,
)
from fednano.wire.interceptors import bearer
from fednano.wire.tensor_pb2 import FP32

from tests.llm.caller import Caller, chunks, tensor_of, written
from tests.llm.conftest import serving
from tests.llm.test_metrics import key, read
from tests.models.causal import HIDDEN, LENGTHS, packed, several_labels

RANK = 5
WEIGHTS = torch.tensor([0.3, 0.1, 2.0])
OTHER = "hospital-b"


@dataclass(frozen=True)
class Upload:
    """One base, ready to be sent."""

    digest: bytes
    spec: Any
    data: bytes


def sent(engine) -> Factored:
    """Text and image segments, separators between them that pass no adapter, and padding."""
    base = packed(engine).values
    made = torch.Generator().manual_seed(4)
    segments = (
        (Segment(Modality.TEXT, 0, 3), Segment(Modality.IMAGE, 3, 4)),
        (Segment(Modality.TEXT, 0, 3),),
        (
            Segment(Modality.RAW, 0, 1),
            Segment(Modality.IMAGE, 1, 4),
            Segment(Modality.RAW, 5, 2),
            Segment(Modality.TEXT, 7, 4),
        ),
    )
    left = torch.randn(sum(LENGTHS), RANK, generator=made)
    right = {
        m: 0.1 * torch.randn(RANK, HIDDEN, generator=made) for m in (Modality.TEXT, Modality.IMAGE)
    }
    return Factored(base, left, right, segments)


def uploads(
    llm: Caller, factored: Factored, pieces: tuple[int, ...] = tuple(LENGTHS)
) -> list[Upload]:
    found = []
    for x in factored.base.split(list(pieces)):
        spec, data = torch_codec.spec_of("base", x, FP32), bytes(torch_codec.pack(x, FP32))
        found.append(Upload(base_digest(llm.fingerprint, spec, data), spec, data))
    return found


def head_of(llm: Caller, one: Upload, offset: int = 0, client: str = "hospital-a") -> Any:
    head = llm_pb2.UploadBaseHead(
        header=llm.header(client), digest=one.digest, values=one.spec, offset=offset
    )
    return llm_pb2.UploadBaseRequest(head=head)


def chunk(data: bytes) -> Any:
    return llm_pb2.UploadBaseRequest(chunk=data)


async def upload(llm: Caller, ones: list[Upload]) -> int:
    messages = [m for one in ones for m in (head_of(llm, one), chunk(one.data))]
    (reply,) = await llm.stream("UploadBase", messages)
    return int(reply.received)


def embeddings(llm: Caller, factored: Factored) -> llm_pb2.Embeddings:
    form = llm_pb2.FactoredForm(
        bases=[one.digest for one in uploads(llm, factored)],
        left=torch_codec.spec_of("left", factored.left, FP32),
        right={int(m): torch_codec.spec_of("w", w, FP32) for m, w in factored.right.items()},
    )
    samples = [
        llm_pb2.Sample(
            segments=[
                llm_pb2.Segment(modality=int(s.modality), start=s.start, length=s.length)
                for s in sample
            ]
        )
        for sample in factored.segments
    ]
    return llm_pb2.Embeddings(samples=samples, factored=form)


def step_messages(llm: Caller, factored: Factored, fisher: bool = True) -> list[Any]:
    head = llm_pb2.ForwardBackwardHead(
        header=llm.header(),
        embeddings=embeddings(llm, factored),
        labels=codec.encode(several_labels().numpy()),
        weights=codec.encode(WEIGHTS.numpy()),
        want_fisher=fisher,
    )
    make = llm_pb2.ForwardBackwardRequest
    order = [factored.left, *(factored.right[m] for m in sorted(factored.right))]
    return [make(head=head), *chunks(make, *order)]


async def as_client(llm: Caller, client: str, rpc: str, messages: list[Any]) -> list[Any]:
    """A call of somebody else, with a token of their own."""
    method = getattr(llm_pb2_grpc.LanguageModelStub(llm.channel), rpc)

    def call() -> list[Any]:
        with translated():
            reply = method(iter(messages), metadata=bearer(llm.token(client)), timeout=60)
            return list(reply) if hasattr(reply, "__iter__") else [reply]

    return await asyncio.to_thread(call)


async def test_a_base_may_be_a_sample_or_a_piece_of_it(llm, engine):
    """The first sample whole, the others by their segments, of which two lie in one base."""
    factored = sent(engine)
    whole = uploads(llm, factored)
    await upload(llm, whole)
    expected = await llm.stream("ForwardBackward", step_messages(llm, factored))
    parts = uploads(llm, factored, (7, 3, 1, 4, 6))
    await upload(llm, parts)
    messages = step_messages(llm, factored)
    form = messages[0].head.embeddings.factored
    form.bases[:] = [one.digest for one in parts]
    found = await llm.stream("ForwardBackward", messages)
    assert [reply.chunk for reply in found[1:]] == [reply.chunk for reply in expected[1:]]


async def test_more_bases_than_tokens_are_refused_before_any_is_read(llm, engine):
    factored = sent(engine)
    messages = step_messages(llm, factored)
    form = messages[0].head.embeddings.factored
    form.bases[:] = [b"no such base"] * 22
    error = await llm.failure("ForwardBackward", messages)
    assert "embeddings.bases: expected at most 21, of a token or more each, got 22" in error.detail


async def test_the_gradient_is_that_of_the_dense_form(llm, engine):
    factored = sent(engine)
    await upload(llm, uploads(llm, factored))
    replies = await llm.stream("ForwardBackward", step_messages(llm, factored))
    result, gradient = replies[0].result, replies[0].result.gradient.factored
    dense = engine.step(factored.dense(), several_labels(), WEIGHTS)
    wanted = factored.gradient(dense.gradient, want_fisher=True)
    specs = [gradient.left]
    specs += [part[m] for part in (gradient.right, gradient.fisher) for m in sorted(part)]
    payload = codec.Payload(specs, 1 << 30)
    for reply in replies[1:]:
        payload.feed(reply.chunk)
    found = {name: torch.from_numpy(a.copy()) for name, a in payload.arrays().items()}
    torch.testing.assert_close(found["left"], wanted.left, rtol=1e-5, atol=1e-7)
    for m in (2, 3):
        right, fisher = wanted.right[Modality(m)], wanted.fisher[Modality(m)]
        torch.testing.assert_close(found[f"right.{m}"], right, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[f"fisher.{m}"], fisher, rtol=1e-4, atol=1e-9)
    assert codec.decode(result.loss_sums).tolist() == pytest.approx(
        dense.loss_sums.tolist(), rel=1e-6
    )


def test_the_chain_rule_holds(engine):
    """dL/dU, dL/dW and the Fisher parts against autograd through x + U W, one sample at a time."""
    factored = sent(engine)
    g = torch.randn(factored.base.shape, generator=torch.Generator().manual_seed(1))
    found = factored.gradient(g, want_fisher=True)
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    squares = {m: torch.zeros(RANK, HIDDEN) for m in factored.right}
    for sample, (a, b) in enumerate(pairwise(starts)):
        left = factored.left[a:b].clone().requires_grad_()
        right = {m: w.clone().requires_grad_() for m, w in factored.right.items()}
        spans = [(s, right.get(s.modality)) for s in factored.segments[sample]]
        parts = [
            left[s.start : s.start + s.length] @ (w if w is not None else torch.zeros(RANK, HIDDEN))
            for s, w in spans
        ]
        torch.cat(parts).backward(g[a:b])
        torch.testing.assert_close(found.left[a:b], left.grad)
        for m, w in right.items():
            squares[m] += w.grad.square() if w.grad is not None else 0
    for m, total in squares.items():
        assert total.any()
        torch.testing.assert_close(found.fisher[m], total)
    assert not found.left[10].any()  # a separator's


async def test_score_and_generate_take_it_too(llm, engine):
    factored = sent(engine)
    await upload(llm, uploads(llm, factored))
    order = [factored.left, *(factored.right[m] for m in sorted(factored.right))]
    head = llm_pb2.ScoreHead(
        header=llm.header(),
        embeddings=embeddings(llm, factored),
        labels=codec.encode(several_labels().numpy()),
    )
    messages = [llm_pb2.ScoreRequest(head=head), *chunks(llm_pb2.ScoreRequest, *order)]
    (score,) = await llm.stream("Score", messages)
    wanted = engine.score(factored.dense(), several_labels())
    assert codec.decode(score.loss_sums).tolist() == pytest.approx(wanted.loss_sums.tolist())
    start = llm_pb2.GenerateHead(
        header=llm.header(),
        embeddings=embeddings(llm, factored),
        sampling=llm_pb2.Sampling(max_new_tokens=4, stop_ids=[1]),
    )
    first = [llm_pb2.GenerateRequest(head=start), *chunks(llm_pb2.GenerateRequest, *order)]
    found, _ = await written(llm.stub.Generate(iter(first), metadata=llm.metadata()))
    tokens: dict[int, list[int]] = {}
    for step in engine.generate(factored.dense(), Sampling(4, stop_ids=(1,))):
        for token in step:
            tokens.setdefault(token.sample, []).append(token.id)
    assert found == tokens


async def test_a_missing_base_is_told_before_anything_is_sent(llm, engine):
    factored = sent(engine)
    ones = uploads(llm, factored)
    await upload(llm, ones[1:2])
    error = await llm.failure("ForwardBackward", step_messages(llm, factored)[:1])
    assert isinstance(error, UnknownBase)
    assert [problem.got for problem in error.problems] == ["0,2"]


async def test_an_upload_goes_on_where_it_broke_off(llm, engine):
    one = uploads(llm, sent(engine))[2]
    (reply,) = await llm.stream("UploadBase", [head_of(llm, one), chunk(one.data[:500])])
    assert reply.received == 500
    (asked,) = await llm.stream("UploadBase", [head_of(llm, one)])
    assert asked.received == 500
    rest = [head_of(llm, one, offset=400), chunk(one.data[400:])]
    (done,) = await llm.stream("UploadBase", rest)
    assert done.received == len(one.data)
    (again,) = await llm.stream("UploadBase", [head_of(llm, one)])
    assert again.received == len(one.data)


async def test_a_stream_tells_what_is_held_without_a_gap(llm, engine):
    ones = uploads(llm, sent(engine))
    await upload(llm, [ones[0], ones[2]])
    (asked,) = await llm.stream("UploadBase", [head_of(llm, one) for one in ones])
    assert asked.received == len(ones[0].data)
    assert await upload(llm, ones) == sum(len(one.data) for one in ones)


async def test_other_content_than_announced_is_not_kept(llm, engine):
    one = uploads(llm, sent(engine))[0]
    spoilt = one.data[:-1] + bytes([one.data[-1] ^ 1])
    error = await llm.failure("UploadBase", [head_of(llm, one), chunk(spoilt)])
    assert isinstance(error, InvalidRequest)
    assert "digest: expected that of model, dtype, shape and bytes" in str(error)
    (asked,) = await llm.stream("UploadBase", [head_of(llm, one)])
    assert asked.received == 0


async def test_another_client_can_neither_use_nor_probe_a_base(llm, engine):
    """Knowing the content, and so its digest, tells nothing of who else has it."""
    factored = sent(engine)
    ones = uploads(llm, factored)
    await upload(llm, ones)
    (asked,) = await as_client(
        llm, OTHER, "UploadBase", [head_of(llm, one, client=OTHER) for one in ones]
    )
    assert asked.received == 0
    messages = step_messages(llm, factored)
    messages[0].head.header.client = OTHER
    with pytest.raises(UnknownBase) as caught:
        await as_client(llm, OTHER, "ForwardBackward", messages)
    assert [problem.got for problem in caught.value.problems] == ["0-2"]
    with pytest.raises(PermissionDenied):
        await as_client(llm, OTHER, "UploadBase", [head_of(llm, ones[0])])


async def test_bases_can_be_deleted(llm, engine):
    factored = sent(engine)
    ones = uploads(llm, factored)
    await upload(llm, ones)
    named = llm_pb2.DeleteBaseRequest(header=llm.header(), digests=[ones[0].digest])
    assert (await llm.unary("DeleteBase", named)).deleted == 1
    everything = llm_pb2.DeleteBaseRequest(header=llm.header())
    assert (await llm.unary("DeleteBase", everything)).deleted == 2
    assert isinstance(await llm.failure("ForwardBackward", step_messages(llm, factored)), NotFound)


async def test_unused_bases_are_swept_away(start, engine):
    llm = await start(metrics_port=0, base_seconds=0.2)
    await upload(llm, uploads(llm, sent(engine)))
    for _ in range(100):
        if (await read(llm))[key("fednano_llm_bases")] == 0:
            break
        await asyncio.sleep(0.05)
    assert (await read(llm))[key("fednano_llm_base_bytes", kind="memory")] == 0


async def test_the_metrics_tell_what_is_held(start, engine):
    llm = await start(metrics_port=0)
    factored = sent(engine)
    await llm.failure("ForwardBackward", step_messages(llm, factored))
    await upload(llm, uploads(llm, factored))
    await llm.stream("ForwardBackward", step_messages(llm, factored))
    found = await read(llm)
    size = factored.base.numel() * 4
    assert found[key("fednano_llm_bases")] == 3
    assert found[key("fednano_llm_base_bytes", kind="memory")] == size
    assert found[key("fednano_llm_base_bytes", kind="disk")] == 0
    assert found[key("fednano_llm_base_lookups_total", result="miss")] == 3
    assert found[key("fednano_llm_base_lookups_total", result="hit")] == 3
    assert found[key("fednano_bytes_total", kind="bases", direction="received")] == size


async def test_the_directory_is_gone_with_the_service(engine, keys, tmp_path: Path):
    def there() -> list[Path]:
        return list(tmp_path.iterdir())

    async with serving(keys, engine, base_directory=tmp_path):
        assert len(there()) == 1
    assert there() == []


def change(field: str, value: Any) -> Any:
    def spoil(messages: list[Any]) -> None:
        form = messages[0].head.embeddings.factored
        if field == "bases":
            form.bases.pop()
        elif field == "left":
            form.left.shape[:] = value
        elif field == "right":
            form.right[2].shape[:] = value
        elif field == "modality":
            form.right[1].CopyFrom(form.right[2])
        elif field == "more":
            form.bases.append(form.bases[0])
        elif field == "swap":
            form.bases[0], form.bases[1] = form.bases[1], form.bases[0]

    return spoil


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (change("bases", None), "embeddings.bases: expected 21 tokens in all, got 10"),
        (change("left", [21, 0]), "embeddings.left: expected a rank of 1 to 32, got 0"),
        (change("left", [20, RANK]), "embeddings.left: expected [21, 5], got [20, 5]"),
        (change("right", [RANK, 16]), "embeddings.right[2]: expected [5, 32], got [5, 16]"),
        (change("modality", None), "embeddings.right: expected TEXT and IMAGE, got 1"),
        (
            change("swap", None),
            "embeddings.bases[1]: expected at most 4 tokens, what is left of its sample, got 7",
        ),
        (change("more", None), "embeddings.bases[3]: expected at most 0 tokens, what is left"),
    ],
)
async def test_a_bad_form_is_named(llm, engine, spoil, says):
    factored = sent(engine)
    await upload(llm, uploads(llm, factored))
    messages = step_messages(llm, factored)
    spoil(messages)
    error = await llm.failure("ForwardBackward", messages)
    assert isinstance(error, InvalidRequest)
    assert says in str(error)


async def test_numbers_that_are_none_are_refused(llm, engine):
    factored = sent(engine)
    broken = factored.base.clone()
    broken[0, 0] = float("nan")
    bad = uploads(llm, Factored(broken, factored.left, factored.right, factored.segments))[0]
    error = await llm.failure("UploadBase", [head_of(llm, bad), chunk(bad.data)])
    assert isinstance(error, BadTensor)
    await upload(llm, uploads(llm, factored))
    factored.left[0, 0] = float("inf")
    error = await llm.failure("ForwardBackward", step_messages(llm, factored))
    assert "embeddings.left: expected finite numbers" in str(error)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (lambda llm, one: [], "first message: expected a head, got nothing"),
        (lambda llm, one: [chunk(one.data)], "expected a head, then chunks"),
        (lambda llm, one: [head_of(llm, one), chunk(one.data + b"1234")], "bytes as announced"),
        (lambda llm, one: [head_of(llm, one, offset=8)], "offset: expected at most 0, got 8"),
        (
            lambda llm, one: [head_of(llm, Upload(b"short", one.spec, one.data))],
            "digest: expected 32 bytes, got 5",
        ),
    ],
)
async def test_a_bad_upload_is_named(llm, engine, messages, says):
    one = uploads(llm, sent(engine))[0]
    error = await llm.failure("UploadBase", messages(llm, one))
    assert isinstance(error, FedNanoError)
    assert says in str(error)


async def test_logits_are_those_of_the_dense_form(llm, engine):
    factored, positions = sent(engine), torch.tensor([1, 4])
    await upload(llm, uploads(llm, factored))
    head = llm_pb2.ForwardHead(
        header=llm.header(),
        embeddings=embeddings(llm, factored),
        positions=codec.encode(positions.numpy()),
    )
    body = [torch_codec.pack(part, FP32) for part in (factored.left, *factored.right.values())]
    messages = [llm_pb2.ForwardRequest(chunk=bytes(part)) for part in body]
    first, *rest = await llm.stream("Forward", [llm_pb2.ForwardRequest(head=head), *messages])
    found = tensor_of(first.result.logits, rest)
    wanted = engine.forward(factored.dense(), positions, keep=False).logits
    torch.testing.assert_close(found, wanted)
