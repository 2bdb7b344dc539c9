"""A caller of the LLM service that is as thin as can be, so that it can also send nonsense."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import torch
from fednano.llm.server import LlmServer
from fednano.models.language_model import LowRank, Sampling, Sequences
from fednano.wire import codec, llm_pb2, llm_pb2_grpc, torch_codec
from fednano.wire.channels import translated
from fednano.wire.errors import FedNanoError
from fednano.wire.headers import make_header
from fednano.wire.interceptors import bearer
from fednano.wire.sessions import Identity, SessionSigner
from fednano.wire.tensor_pb2 import FP32, Header, TensorSpec

CLIENT, RUN = "hospital-a", "demo"


@dataclass
class Caller:
    """Calls one server as CLIENT in RUN, unless told otherwise."""

    server: LlmServer
    port: int
    metrics_port: int
    channel: grpc.Channel  # as our clients have it
    live: grpc.aio.Channel  # where a test acts in the middle of a call
    signer: SessionSigner
    fingerprint: str

    @property
    def stub(self) -> Any:
        return llm_pb2_grpc.LanguageModelStub(self.live)

    def header(self, client: str = CLIENT) -> Header:
        return make_header(client, run=RUN, fingerprint=self.fingerprint)

    def token(self, client: str = CLIENT, role: str = "site", run: str = RUN) -> str:
        return self.signer.issue(Identity(client, role, run))[0]

    def metadata(self) -> tuple[tuple[str, str], ...]:
        return bearer(self.token())

    async def unary(self, rpc: str, request: Any) -> Any:
        (reply,) = await self.replies(rpc, request)
        return reply

    async def stream(self, rpc: str, messages: list[Any]) -> list[Any]:
        """All replies to a request stream."""
        return await self.replies(rpc, iter(messages))

    async def replies(self, rpc: str, request: Any) -> list[Any]:
        method = getattr(llm_pb2_grpc.LanguageModelStub(self.channel), rpc)

        def call() -> list[Any]:
            with translated():
                reply = method(request, metadata=self.metadata(), timeout=60)
                return list(reply) if hasattr(reply, "__iter__") else [reply]

        return await asyncio.to_thread(call)

    async def step(self, sequences: Sequences, labels: torch.Tensor, weights: torch.Tensor) -> Any:
        replies = await self.stream(
            "ForwardBackward", step_request(self.header(), sequences, labels, weights)
        )
        result = replies[0].result
        return result, tensor_of(result.gradient.dense.values, replies[1:])

    async def failure(self, rpc: str, messages: list[Any]) -> FedNanoError:
        """The error that `messages` are answered with."""
        with pytest.raises(FedNanoError) as caught:
            await self.stream(rpc, messages)
        return caught.value


def embeddings_of(sequences: Sequences, dtype: Any = FP32) -> llm_pb2.Embeddings:
    samples = [
        llm_pb2.Sample(
            segments=[
                llm_pb2.Segment(modality=int(s.modality), start=s.start, length=s.length)
                for s in sample
            ]
        )
        for sample in sequences.segments
    ]
    spec = torch_codec.spec_of("embeddings", sequences.values, dtype)
    return llm_pb2.Embeddings(samples=samples, dense=llm_pb2.DenseForm(values=spec))


def chunks(make: Any, *tensors: torch.Tensor, dtype: Any = FP32) -> list[Any]:
    packed = [torch_codec.pack(tensor, dtype) for tensor in tensors]
    return [make(chunk=chunk) for chunk in codec.chunked(packed)]


def step_request(
    header: Header, sequences: Sequences, labels: torch.Tensor, weights: torch.Tensor
) -> list[llm_pb2.ForwardBackwardRequest]:
    head = llm_pb2.ForwardBackwardHead(
        header=header,
        embeddings=embeddings_of(sequences),
        labels=codec.encode(labels.numpy()),
        weights=codec.encode(weights.numpy()),
    )
    make = llm_pb2.ForwardBackwardRequest
    return [make(head=head), *chunks(make, sequences.values)]


def score_request(header: Header, sequences: Sequences, labels: torch.Tensor) -> list[Any]:
    head = llm_pb2.ScoreHead(
        header=header, embeddings=embeddings_of(sequences), labels=codec.encode(labels.numpy())
    )
    return [llm_pb2.ScoreRequest(head=head), *chunks(llm_pb2.ScoreRequest, sequences.values)]


def forward_request(
    header: Header, sequences: Sequences, positions: torch.Tensor, keep: bool = True
) -> list[Any]:
    head = llm_pb2.ForwardHead(
        header=header,
        embeddings=embeddings_of(sequences),
        positions=codec.encode(positions.numpy()),
        keep=keep,
    )
    return [llm_pb2.ForwardRequest(head=head), *chunks(llm_pb2.ForwardRequest, sequences.values)]


def backward_request(
    header: Header,
    activation: str,
    above: torch.Tensor,
    sequences: Sequences | None = None,
    positions: torch.Tensor | None = None,
) -> list[Any]:
    spec = torch_codec.spec_of("above", above, FP32)
    head = llm_pb2.BackwardHead(header=header, activation=activation, logits_gradient=spec)
    sent = [above]
    if sequences is not None and positions is not None:
        head.embeddings.CopyFrom(embeddings_of(sequences))
        head.positions.CopyFrom(codec.encode(positions.numpy()))
        sent.append(sequences.values)
    return [llm_pb2.BackwardRequest(head=head), *chunks(llm_pb2.BackwardRequest, *sent)]


def generate_request(
    header: Header, sequences: Sequences, sampling: Sampling, adapter: LowRank | None = None
) -> list[Any]:
    head = llm_pb2.GenerateHead(
        header=header,
        embeddings=embeddings_of(sequences),
        sampling=llm_pb2.Sampling(
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop_ids=sampling.stop_ids,
        ),
    )
    sent = [sequences.values]
    if adapter is not None:
        head.text_adapter.down.CopyFrom(codec.spec_of("down", adapter.down.numpy()))
        head.text_adapter.up.CopyFrom(codec.spec_of("up", adapter.up.numpy()))
        head.text_adapter.scale = adapter.scale
        sent += [adapter.down, adapter.up]
    return [llm_pb2.GenerateRequest(head=head), *chunks(llm_pb2.GenerateRequest, *sent)]


def tensor_of(spec: TensorSpec, replies: list[Any]) -> torch.Tensor:
    payload = codec.Payload([spec], 1 << 30)
    for reply in replies:
        payload.feed(reply.chunk)
    return torch.from_numpy(payload.arrays()[spec.name].copy())


async def written(call: AsyncIterator[Any]) -> tuple[dict[int, list[int]], Any]:
    """Each sample's tokens, and what was spent."""
    found: dict[int, list[int]] = {}
    spent = None
    async for reply in call:
        for token in reply.tokens:
            found.setdefault(token.sample, []).append(token.id)
        spent = reply.spent
    return found, spent
