"""What the service answers is what its engine computes."""

from __future__ import annotations

import asyncio

import pytest
import torch
from fednano.models.activations import Activations
from fednano.models.frozen import FrozenLLM
from fednano.models.language_model import IGNORED, LowRank, Sampling
from fednano.wire import codec, llm_pb2
from fednano.wire.errors import UnknownActivation, Unsupported
from fednano.wire.tensor_pb2 import BF16, FP16, FP32, INT8
from torch.nn.functional import cross_entropy

from tests.llm.caller import (
    backward_request,
    chunks,
    embeddings_of,
    forward_request,
    generate_request,
    score_request,
    step_request,
    tensor_of,
    written,
)
from tests.models.causal import HIDDEN, LENGTHS, VOCABULARY, build, packed, several_labels

WEIGHTS = torch.tensor([0.3, 0.1, 2.0])


async def test_the_card_says_what_the_service_is(llm, engine):
    card = await llm.unary("Describe", llm_pb2.DescribeRequest(header=llm.header()))
    assert (card.name, card.fingerprint, card.replica) == ("small", "mark", "local")
    assert (card.hidden_size, card.vocabulary, card.dtype) == (HIDDEN, VOCABULARY, FP32)
    assert (card.limits.tokens_per_sample, card.limits.queue) == (engine.max_positions, 64)
    assert list(card.forms) == ["dense", "factored"]
    assert list(card.wire_dtypes) == [FP32, FP16, BF16, INT8]
    assert card.protocol == 1


async def test_a_caller_that_does_not_know_the_model_yet_may_ask_for_its_card(llm):
    header = llm.header()
    header.fingerprint = ""
    assert (await llm.unary("Describe", llm_pb2.DescribeRequest(header=header))).fingerprint


async def test_a_split_step_matches_the_whole_model(llm, engine):
    """Autograd through the stock model, sample by sample: no padding, no service."""
    sequences, labels = packed(engine), several_labels()
    result, gradient = await llm.step(sequences, labels, WEIGHTS)
    leaf, total = sequences.values.clone().requires_grad_(), torch.zeros(())
    for part, wanted, weight in zip(
        leaf.split(LENGTHS), labels.split(LENGTHS), WEIGHTS, strict=True
    ):
        logits = engine._model(inputs_embeds=part[None]).logits[0, :-1]
        total = total + weight * cross_entropy(
            logits, wanted[1:], reduction="sum", ignore_index=IGNORED
        )
    (expected,) = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert float(codec.decode(result.loss_sums) @ WEIGHTS.numpy()) == pytest.approx(total.item())
    assert codec.decode(result.token_counts).tolist() == [3, 1, 5]
    assert result.spent.compute_seconds > 0


async def test_a_small_step_may_be_one_message_each_way(llm, engine, monkeypatch):
    messages = step_request(llm.header(), packed(engine), several_labels(), WEIGHTS)
    first, *rest = await llm.stream("ForwardBackward", messages)
    body = b"".join(message.chunk for message in messages[1:])
    whole = llm_pb2.ForwardBackwardRequest(head=messages[0].head, body=body)
    (reply,) = await llm.stream("ForwardBackward", [whole])
    assert reply.body == b"".join(chunk.chunk for chunk in rest)
    assert reply.result.loss_sums == first.result.loss_sums
    monkeypatch.setattr("fednano.llm.servicer.CHUNK_BYTES", len(body) - 1)
    _, *late = await llm.stream("ForwardBackward", [whole])  # a gradient that is too large for it
    assert b"".join(chunk.chunk for chunk in late) == reply.body


@pytest.mark.parametrize("change", [lambda body: body[:-4], lambda body: body + b"more"])
async def test_a_body_has_the_bytes_that_its_head_announces(llm, engine, change):
    head, *rest = step_request(llm.header(), packed(engine), several_labels(), WEIGHTS)
    body = b"".join(message.chunk for message in rest)
    whole = llm_pb2.ForwardBackwardRequest(head=head.head, body=change(body))
    error = await llm.failure("ForwardBackward", [whole])
    assert f"{len(body)} bytes as announced" in error.detail
    whole.body = bytes((1 << 20) + 1)
    assert "body: expected 1 to 1048576" in (await llm.failure("ForwardBackward", [whole])).detail


@pytest.mark.parametrize(("dtype", "tolerance"), [(FP16, 2e-3), (BF16, 2e-2), (INT8, 2e-2)])
async def test_gradients_come_in_the_dtype_asked_for(llm, engine, dtype, tolerance):
    sequences, labels = packed(engine), several_labels()
    messages = step_request(llm.header(), sequences, labels, WEIGHTS)
    messages[0].head.gradient_dtype = dtype
    replies = await llm.stream("ForwardBackward", messages)
    spec = replies[0].result.gradient.dense.values
    expected = engine.step(sequences, labels, WEIGHTS).gradient
    assert spec.dtype == dtype
    torch.testing.assert_close(
        tensor_of(spec, replies[1:]).float(), expected, rtol=tolerance, atol=0.1
    )


@pytest.mark.parametrize("dtype", [FP16, BF16, INT8])
async def test_embeddings_may_come_in_fewer_bits(llm, engine, dtype):
    sequences, labels = packed(engine), several_labels()
    head = llm_pb2.ScoreHead(
        header=llm.header(),
        embeddings=embeddings_of(sequences, dtype),
        labels=codec.encode(labels.numpy()),
    )
    make = llm_pb2.ScoreRequest
    messages = [make(head=head), *chunks(make, sequences.values, dtype=dtype)]
    (reply,) = await llm.stream("Score", messages)
    expected = engine.score(sequences, labels).loss_sums
    found = torch.from_numpy(codec.decode(reply.loss_sums).copy())
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


async def test_score_counts_hits(llm, engine):
    sequences, labels = packed(engine), several_labels()
    (reply,) = await llm.stream("Score", score_request(llm.header(), sequences, labels))
    expected = engine.score(sequences, labels)
    assert codec.decode(reply.loss_sums).tolist() == expected.loss_sums.tolist()
    assert codec.decode(reply.correct_counts).tolist() == expected.correct_counts.tolist()
    assert codec.decode(reply.token_counts).tolist() == [3, 1, 5]


async def test_embed_gives_rows_of_the_table(llm, engine):
    ids = torch.tensor([5, 6, 5])
    request = llm_pb2.EmbedRequest(header=llm.header(), ids=codec.encode(ids.numpy()))
    first, *rest = await llm.replies("Embed", request)
    assert torch.equal(tensor_of(first.values, rest), engine.embed(ids))


async def test_forward_then_backward_is_a_step(llm, engine):
    sequences, labels = packed(engine), several_labels()
    positions = (labels != IGNORED).nonzero()[:, 0] - 1
    replies = await llm.stream("Forward", forward_request(llm.header(), sequences, positions))
    logits = tensor_of(replies[0].result.logits, replies[1:]).requires_grad_()
    losses = cross_entropy(logits, labels[labels != IGNORED], reduction="none")
    weights = WEIGHTS.repeat_interleave(torch.tensor([3, 1, 5]))
    (above,) = torch.autograd.grad(losses @ weights, logits)
    activation = replies[0].result.activation
    replies = await llm.stream("Backward", backward_request(llm.header(), activation, above))
    gradient = tensor_of(replies[0].gradient.dense.values, replies[1:])
    _, expected = await llm.step(sequences, labels, WEIGHTS)
    torch.testing.assert_close(gradient, expected)


async def test_an_activation_that_is_gone_is_computed_again_from_embeddings(llm, engine):
    sequences, positions = packed(engine), torch.tensor([3, 9, 20])
    above = torch.randn(3, VOCABULARY)
    request = backward_request(llm.header(), "elsewhere/1", above)
    assert isinstance(await llm.failure("Backward", request), UnknownActivation)
    request = backward_request(llm.header(), "elsewhere/1", above, sequences, positions)
    replies = await llm.stream("Backward", request)
    expected = engine.backward("", above, sequences, positions)
    assert torch.equal(tensor_of(replies[0].gradient.dense.values, replies[1:]), expected)


async def test_a_fisher_part_belongs_to_the_factored_form(llm, engine):
    sequences, positions = packed(engine), torch.tensor([3, 9, 20])
    above = torch.randn(3, VOCABULARY)
    request = backward_request(llm.header(), "elsewhere/1", above, sequences, positions)
    request[0].head.want_fisher = True
    error = await llm.failure("Backward", request)
    assert isinstance(error, Unsupported)
    assert "want_fisher belongs to the factored form" in error.detail


async def test_an_activation_that_nobody_comes_back_for_is_freed(start):
    kept = Activations("here", tokens=1000, seconds=0.1)
    engine = FrozenLLM(build(), "mark", activations=kept)
    llm = await start(on=engine, activation_seconds=0.1)
    await llm.stream("Forward", forward_request(llm.header(), packed(engine), torch.tensor([3])))
    assert len(kept) == 1
    await asyncio.sleep(0.4)
    assert len(kept) == 0


@pytest.mark.parametrize("adapted", [False, True])
async def test_answers_of_several_tokens_stream(llm, engine, adapted):
    made = torch.Generator().manual_seed(3)
    down, up = torch.randn(4, HIDDEN, generator=made), torch.randn(HIDDEN, 4, generator=made)
    adapter = LowRank(down, up, 0.5) if adapted else None
    sequences, sampling = packed(engine), Sampling(max_new_tokens=8)
    request = generate_request(llm.header(), sequences, sampling, adapter)
    call = llm.stub.Generate(iter(request), metadata=llm.metadata())
    found, spent = await written(call)
    expected = {0: [], 1: [], 2: []}
    for tokens in engine.generate(sequences, sampling, adapter):
        for token in tokens:
            expected[token.sample].append(token.id)
    assert found == expected
    assert spent.compute_seconds > 0


async def test_payloads_of_many_chunks_arrive_whole(start, engine):
    """Half the embeddings end up in another chunk than their sample began in."""
    llm = await start(tokens_per_request=40_000, samples_per_request=1000)
    sequences = packed(engine, (40,) * 500)  # 2.4 MiB
    request = score_request(llm.header(), sequences, several_labels((40,) * 500))
    assert len(request) == 4
    (reply,) = await llm.stream("Score", request)
    assert sum(codec.decode(reply.token_counts).tolist()) == 500 * 20


async def test_each_of_many_callers_gets_its_own_rows(llm, engine):
    asked = [
        (packed(engine, (3 + i % 4, 9), seed=i), several_labels((3 + i % 4, 9), seed=i))
        for i in range(16)
    ]
    weights = torch.ones(2)
    replies = await asyncio.gather(*(llm.step(s, labels, weights) for s, labels in asked))
    for (sequences, labels), (_, gradient) in zip(asked, replies, strict=True):
        assert torch.equal(gradient, engine.step(sequences, labels, weights).gradient)


@pytest.mark.parametrize("rpc", ["UploadBase", "DeleteBase"])
async def test_the_factored_wire_is_offered_where_there_is_memory_for_it(start, rpc):
    llm = await start(base_mebibytes=0)
    card = await llm.unary("Describe", llm_pb2.DescribeRequest(header=llm.header()))
    assert list(card.forms) == ["dense"]
    request = getattr(llm_pb2, f"{rpc}Request")
    if rpc == "DeleteBase":
        call = llm.unary(rpc, request(header=llm.header()))
    else:
        head = llm_pb2.UploadBaseHead(header=llm.header())
        call = llm.stream(rpc, [request(head=head)])
    with pytest.raises(Unsupported, match="the factored wire is not offered"):
        await call
