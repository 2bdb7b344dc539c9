"""The LanguageModel service: each method decodes, computes, encodes."""

# ruff: noqa: N802 - methods are named as in the contract

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import torch

from fednano import __version__
from fednano.llm import requests
from fednano.llm.exchange import Exchange, Packed, authorise
from fednano.llm.incoming import Incoming
from fednano.llm.metrics import Kind, Metrics
from fednano.llm.worker import Job, Worker
from fednano.models.frozen import FrozenLLM
from fednano.models.language_model import NewToken, StepResult
from fednano.wire import codec, llm_pb2, llm_pb2_grpc, torch_codec
from fednano.wire.errors import BadTensor, InvalidRequest, Unsupported
from fednano.wire.headers import PROTOCOL, check_header
from fednano.wire.interceptors import Context
from fednano.wire.tensor_pb2 import FP32, DType

_NO_BASES = "the factored wire is not offered by this service; send dense embeddings"


class LanguageModelServicer(llm_pb2_grpc.LanguageModelServicer):
    """Holds no model logic, as the engine holds no gRPC."""

    def __init__(
        self, engine: FrozenLLM, worker: Worker, exchange: Exchange, metrics: Metrics, replica: str
    ) -> None:
        self._engine = engine
        self._worker = worker
        self._exchange = exchange
        self._limits = exchange.limits
        self._metrics = metrics
        self._replica = replica

    async def Describe(
        self, request: llm_pb2.DescribeRequest, context: Context
    ) -> llm_pb2.DescribeReply:
        with self._metrics.request("Describe"):
            authorise(request.header)
            check_header(request.header)
            self._metrics.received("control", request.ByteSize())
            return self._exchange.counted(self._card())

    async def Embed(
        self, request: llm_pb2.EmbedRequest, context: Context
    ) -> AsyncIterator[llm_pb2.EmbedReply]:
        with self._metrics.request("Embed"):
            self._exchange.admit(request.header)
            self._metrics.received("control", request.ByteSize())
            ids = requests.ids(request.ids, self._limits)
            dtype = requests.reply_dtype("dtype", request.dtype)
            body, _ = await self._exchange.compute(
                "Embed", lambda: Packed.of("values", self._engine.embed(ids), dtype)
            )
            self._metrics.tokens("Embed", len(ids))
            yield self._exchange.counted(llm_pb2.EmbedReply(values=body.spec))
            for chunk in self._exchange.chunks("embeddings", body):
                yield llm_pb2.EmbedReply(chunk=chunk)

    async def Forward(
        self, request_iterator: AsyncIterator[llm_pb2.ForwardRequest], context: Context
    ) -> AsyncIterator[llm_pb2.ForwardReply]:
        with self._metrics.request("Forward"):
            incoming = Incoming(request_iterator)
            head: llm_pb2.ForwardHead = await self._exchange.head(incoming)
            embeddings = requests.announced(head.embeddings, self._limits)
            positions = requests.positions(head.positions, embeddings.tokens, self._limits)
            sequences = await self._exchange.sequences(incoming, embeddings)
            found, _ = await self._exchange.compute(
                "Forward", lambda: self._engine.forward(sequences, positions, head.keep)
            )
            self._metrics.tokens("Forward", embeddings.tokens)
            body = Packed.of("logits", found.logits, FP32)
            result = llm_pb2.ForwardResult(activation=found.activation, logits=body.spec)
            yield self._exchange.counted(llm_pb2.ForwardReply(result=result))
            for chunk in self._exchange.chunks("logits", body):
                yield llm_pb2.ForwardReply(chunk=chunk)

    async def Backward(
        self, request_iterator: AsyncIterator[llm_pb2.BackwardRequest], context: Context
    ) -> AsyncIterator[llm_pb2.BackwardReply]:
        with self._metrics.request("Backward"):
            incoming = Incoming(request_iterator)
            head: llm_pb2.BackwardHead = await self._exchange.head(incoming)
            asked = requests.logits_gradient(head, self._limits)
            dtype = requests.reply_dtype("gradient_dtype", head.gradient_dtype)
            data = await self._exchange.payload(incoming, asked.specs, ["logits", "embeddings"])

            def backward() -> Packed:
                above, sequences = asked.read(data)
                found = self._engine.backward(head.activation, above, sequences, asked.positions)
                return _packed_gradient(found, dtype)

            body, _ = await self._exchange.compute("Backward", backward)
            self._metrics.tokens("Backward", body.spec.shape[0])
            dense = llm_pb2.DenseForm(values=body.spec)
            reply = llm_pb2.BackwardReply(gradient=llm_pb2.Gradient(dense=dense))
            yield self._exchange.counted(reply)
            for chunk in self._exchange.chunks("gradients", body):
                yield llm_pb2.BackwardReply(chunk=chunk)

    async def ForwardBackward(
        self, request_iterator: AsyncIterator[llm_pb2.ForwardBackwardRequest], context: Context
    ) -> AsyncIterator[llm_pb2.ForwardBackwardReply]:
        with self._metrics.request("ForwardBackward"):
            incoming = Incoming(request_iterator)
            head: llm_pb2.ForwardBackwardHead = await self._exchange.head(incoming)
            if head.want_fisher:
                raise Unsupported("want_fisher belongs to the factored form; leave it out")
            embeddings = requests.announced(head.embeddings, self._limits)
            labels = requests.labels(head.labels, embeddings, self._limits)
            weights = requests.weights(head.weights, len(embeddings.segments))
            dtype = requests.reply_dtype("gradient_dtype", head.gradient_dtype)
            sequences = await self._exchange.sequences(incoming, embeddings)

            def step() -> tuple[StepResult, Packed]:
                found = self._engine.step(sequences, labels, weights)
                _check_losses(found.loss_sums)
                return found, _packed_gradient(found.gradient, dtype)

            (found, body), job = await self._exchange.compute("ForwardBackward", step)
            self._metrics.tokens("ForwardBackward", embeddings.tokens)
            result = llm_pb2.ForwardBackwardResult(
                loss_sums=codec.encode(found.loss_sums.numpy()),
                token_counts=codec.encode(found.token_counts.numpy()),
                gradient=llm_pb2.Gradient(dense=llm_pb2.DenseForm(values=body.spec)),
                spent=_spent(job),
            )
            yield self._exchange.counted(llm_pb2.ForwardBackwardReply(result=result))
            for chunk in self._exchange.chunks("gradients", body):
                yield llm_pb2.ForwardBackwardReply(chunk=chunk)

    async def Score(
        self, request_iterator: AsyncIterator[llm_pb2.ScoreRequest], context: Context
    ) -> llm_pb2.ScoreReply:
        with self._metrics.request("Score"):
            incoming = Incoming(request_iterator)
            head: llm_pb2.ScoreHead = await self._exchange.head(incoming)
            embeddings = requests.announced(head.embeddings, self._limits)
            labels = requests.labels(head.labels, embeddings, self._limits)
            sequences = await self._exchange.sequences(incoming, embeddings)
            found, job = await self._exchange.compute(
                "Score", lambda: self._engine.score(sequences, labels)
            )
            _check_losses(found.loss_sums)
            self._metrics.tokens("Score", embeddings.tokens)
            reply = llm_pb2.ScoreReply(
                loss_sums=codec.encode(found.loss_sums.numpy()),
                token_counts=codec.encode(found.token_counts.numpy()),
                correct_counts=codec.encode(found.correct_counts.numpy()),
                spent=_spent(job),
            )
            return self._exchange.counted(reply)

    async def Generate(
        self, request_iterator: AsyncIterator[llm_pb2.GenerateRequest], context: Context
    ) -> AsyncIterator[llm_pb2.GenerateReply]:
        with self._metrics.request("Generate"):
            incoming = Incoming(request_iterator)
            head: llm_pb2.GenerateHead = await self._exchange.head(incoming)
            asked = requests.prompt(head, self._limits)
            sampling = requests.sampling(head.sampling, self._limits)
            kinds: list[Kind] = ["embeddings", "adapters", "adapters"]
            data = await self._exchange.payload(incoming, asked.specs, kinds)
            sequences, adapter = await self._exchange.checked(asked.read, data)
            self._metrics.tokens("Generate", asked.embeddings.tokens)
            job = self._exchange.stream(
                context, lambda: self._engine.generate(sequences, sampling, adapter)
            )
            with self._exchange.on_device("Generate", job):
                async for tokens in job:
                    self._metrics.tokens("Generate", len(tokens))
                    reply = llm_pb2.GenerateReply(tokens=[_new_token(token) for token in tokens])
                    yield self._exchange.counted(reply)
            yield self._exchange.counted(llm_pb2.GenerateReply(spent=_spent(job)))

    async def UploadBase(
        self, request_iterator: AsyncIterator[llm_pb2.UploadBaseRequest], context: Context
    ) -> llm_pb2.UploadBaseReply:
        with self._metrics.request("UploadBase"):
            await self._exchange.head(Incoming(request_iterator))
            raise Unsupported(_NO_BASES)

    async def DeleteBase(
        self, request: llm_pb2.DeleteBaseRequest, context: Context
    ) -> llm_pb2.DeleteBaseReply:
        with self._metrics.request("DeleteBase"):
            self._exchange.admit(request.header)
            raise Unsupported(_NO_BASES)

    def _card(self) -> llm_pb2.DescribeReply:
        limits = self._limits
        return llm_pb2.DescribeReply(
            name=self._engine.name,
            fingerprint=self._engine.fingerprint,
            hidden_size=limits.hidden,
            vocabulary=limits.vocabulary,
            dtype=torch_codec.wire_dtype(self._engine.dtype),
            limits=llm_pb2.Limits(
                tokens_per_sample=limits.tokens_per_sample,
                tokens_per_request=limits.tokens_per_request,
                samples_per_request=limits.samples_per_request,
                queue=self._worker.limit,
                new_tokens=limits.new_tokens,
                message_bytes=limits.message_bytes,
            ),
            forms=["dense"],
            wire_dtypes=codec.FLOATS,
            load=llm_pb2.Load(queued=self._worker.depth, busy=self._worker.busy),
            replica=self._replica,
            version=__version__,
            protocol=PROTOCOL,
        )


def _packed_gradient(gradient: torch.Tensor, dtype: DType) -> Packed:
    """Raises InvalidRequest where the caller's numbers left no finite gradient as `dtype`."""
    try:
        return Packed.of("gradient", gradient, dtype)
    except BadTensor:  # INT8 can't hold NaN or infinity
        raise InvalidRequest.of(
            "embeddings", "values that give a finite gradient", "NaN or infinity"
        ) from None


def _check_losses(loss_sums: torch.Tensor) -> None:
    """Finite embeddings may still be too large for the model."""
    bad = ~loss_sums.isfinite()
    if bad.any():
        sample = int(bad.int().argmax())
        raise InvalidRequest.of(
            f"embeddings.samples[{sample}]",
            "values that give a finite loss",
            float(loss_sums[sample]),
        )


def _spent(job: Job[Any]) -> llm_pb2.Spent:
    return llm_pb2.Spent(queue_seconds=job.queue_seconds, compute_seconds=job.compute_seconds)


def _new_token(token: NewToken) -> llm_pb2.NewToken:
    return llm_pb2.NewToken(sample=token.sample, id=token.id, end=token.end)
