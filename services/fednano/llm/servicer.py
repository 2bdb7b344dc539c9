"""The LanguageModel service: each method decodes, computes, encodes."""

# ruff: noqa: N802 - methods are named as in the contract

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import torch

from fednano import __version__
from fednano.llm import factored, requests
from fednano.llm.bases import BaseStore
from fednano.llm.exchange import Exchange, Packed, authorise, owner_of
from fednano.llm.factored import Factors, PackedGradient, check_fisher, packed_gradient
from fednano.llm.incoming import Incoming
from fednano.llm.jobs import Job
from fednano.llm.joining import Scores, Steps
from fednano.llm.metrics import Kind, Metrics
from fednano.llm.passes import Passes
from fednano.llm.requests import Announced
from fednano.llm.uploads import Uploads
from fednano.llm.worker import Worker
from fednano.models.frozen import FrozenLLM
from fednano.models.language_model import (
    NewToken,
    ScoreResult,
    StepResult,
)
from fednano.wire import codec, llm_pb2, llm_pb2_grpc, torch_codec
from fednano.wire.codec import CHUNK_BYTES
from fednano.wire.errors import InvalidRequest, Unsupported
from fednano.wire.headers import PROTOCOL, check_header
from fednano.wire.interceptors import Context, caller

_ON_DEVICE = 8
"""So many dense requests that wait lie on the device already; those of more would fill it."""
_NO_BASES = "the factored wire is not offered by this service; send dense embeddings"


class LanguageModelServicer(llm_pb2_grpc.LanguageModelServicer):
    """Holds no model logic, as the engine holds no gRPC."""

    def __init__(
        self,
        engine: FrozenLLM,
        worker: Worker,
        exchange: Exchange,
        metrics: Metrics,
        replica: str,
        bases: BaseStore | None = None,
        joined_tokens: int = 0,
    ) -> None:
        """Without `bases` the factored form is not offered; for `joined_tokens` see Passes."""
        self._engine = engine
        self._worker = worker
        self._exchange = exchange
        self._limits = exchange.limits
        self._metrics = metrics
        self._replica = replica
        self._bases = bases
        self._passes = Passes(engine, exchange, joined_tokens)
        self.uploads: Uploads | None = None
        if bases is not None:
            self.uploads = Uploads(bases, engine.fingerprint, self._limits, exchange.checkers)

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
                "Embed",
                lambda: Packed.of("values", self._engine.embed(ids), dtype),
                request.header,
                len(ids),
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
            embeddings = await self._announced(head.embeddings)
            positions = requests.positions(head.positions, embeddings.tokens, self._limits)
            received = await self._exchange.received(incoming, embeddings)
            (activation, body), job = await self._passes.forward(head, received, positions)
            self._metrics.tokens("Forward", embeddings.tokens)
            result = llm_pb2.ForwardResult(
                activation=activation, logits=body.spec, spent=_spent(job)
            )
            yield self._exchange.counted(llm_pb2.ForwardReply(result=result))
            for chunk in self._exchange.chunks("logits", body):
                yield llm_pb2.ForwardReply(chunk=chunk)

    async def Backward(
        self, request_iterator: AsyncIterator[llm_pb2.BackwardRequest], context: Context
    ) -> AsyncIterator[llm_pb2.BackwardReply]:
        with self._metrics.request("Backward"):
            incoming = Incoming(request_iterator)
            head: llm_pb2.BackwardHead = await self._exchange.head(incoming)
            again = await self._announced(head.embeddings) if head.HasField("embeddings") else None
            asked = requests.logits_gradient(head, again, self._limits)
            dtype = requests.reply_dtype("gradient_dtype", head.gradient_dtype)
            kinds: list[Kind] = ["embeddings"] * len(asked.specs)
            kinds[0] = "logits"
            data = await self._exchange.payload(incoming, asked.specs, kinds)
            above, received = await self._exchange.checked(asked.read, data)
            (gradient, bodies), job = await self._passes.backward(
                head, above, received, asked.positions, dtype
            )
            self._metrics.tokens("Backward", bodies[0].spec.shape[0])
            reply = llm_pb2.BackwardReply(gradient=gradient, spent=_spent(job))
            yield self._exchange.counted(reply)
            for chunk in self._exchange.chunks("gradients", *bodies):
                yield llm_pb2.BackwardReply(chunk=chunk)

    async def ForwardBackward(
        self, request_iterator: AsyncIterator[llm_pb2.ForwardBackwardRequest], context: Context
    ) -> AsyncIterator[llm_pb2.ForwardBackwardReply]:
        with self._metrics.request("ForwardBackward"):
            incoming = Incoming(request_iterator)
            head: llm_pb2.ForwardBackwardHead = await self._exchange.head(incoming)
            check_fisher(head.want_fisher, head.embeddings.HasField("factored"))
            embeddings = await self._announced(head.embeddings)
            labels = requests.labels(head.labels, embeddings, self._limits)
            weights = requests.weights(head.weights, len(embeddings.segments))
            dtype = requests.reply_dtype("gradient_dtype", head.gradient_dtype)
            received = await self._exchange.received(incoming, embeddings)

            def finish(found: StepResult) -> tuple[StepResult, PackedGradient]:
                losses, counts = found.loss_sums.cpu(), found.token_counts.cpu()
                _check_losses(losses)
                gradient = packed_gradient(
                    received.factored, found.gradient, dtype, head.want_fisher
                )
                return StepResult(losses, counts, found.gradient), gradient

            work = Steps(self._engine.step, received.sequences, labels, weights)
            small = self._exchange.small(incoming)
            (found, (gradient, bodies)), job = await self._exchange.joined(
                "ForwardBackward", work, head.header, finish, small=small
            )
            self._metrics.tokens("ForwardBackward", embeddings.tokens)
            result = llm_pb2.ForwardBackwardResult(
                loss_sums=codec.encode(found.loss_sums.numpy()),
                token_counts=codec.encode(found.token_counts.numpy()),
                gradient=gradient,
                spent=_spent(job),
            )
            reply = llm_pb2.ForwardBackwardReply(result=result)
            if incoming.body and sum(len(body.data) for body in bodies) <= CHUNK_BYTES:
                yield self._exchange.whole(reply, bodies)
                return
            yield self._exchange.counted(reply)
            for chunk in self._exchange.chunks("gradients", *bodies):
                yield llm_pb2.ForwardBackwardReply(chunk=chunk)

    async def Score(
        self, request_iterator: AsyncIterator[llm_pb2.ScoreRequest], context: Context
    ) -> llm_pb2.ScoreReply:
        with self._metrics.request("Score"):
            incoming = Incoming(request_iterator)
            head: llm_pb2.ScoreHead = await self._exchange.head(incoming)
            embeddings = await self._announced(head.embeddings)
            labels = requests.labels(head.labels, embeddings, self._limits)
            sequences = (await self._exchange.received(incoming, embeddings)).sequences
            found, job = await self._exchange.joined(
                "Score",
                Scores(self._engine.score, sequences, labels),
                head.header,
                _checked,
                "score",
            )
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
            asked = requests.prompt(head, await self._announced(head.embeddings), self._limits)
            sampling = requests.sampling(head.sampling, self._limits)
            kinds: list[Kind] = ["embeddings"] * len(asked.embeddings.specs)
            kinds += ["adapters", "adapters"]
            data = await self._exchange.payload(incoming, asked.specs, kinds)
            sequences, adapter = await self._exchange.checked(asked.read, data)
            self._metrics.tokens("Generate", asked.embeddings.tokens)
            job = self._exchange.stream(
                context,
                lambda: self._engine.answer(sequences, sampling, adapter),
                self._engine.write,
                head.header,
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
            if self.uploads is None:
                raise Unsupported(_NO_BASES)
            received = await self.uploads.receive(
                request_iterator, self._exchange.owner, self._metrics.received
            )
            return self._exchange.counted(llm_pb2.UploadBaseReply(received=received))

    async def DeleteBase(
        self, request: llm_pb2.DeleteBaseRequest, context: Context
    ) -> llm_pb2.DeleteBaseReply:
        with self._metrics.request("DeleteBase"):
            owner = self._exchange.owner(request.header)
            if self._bases is None or self.uploads is None:
                raise Unsupported(_NO_BASES)
            self._metrics.received("control", request.ByteSize())
            self.uploads.forget(owner)
            delete = partial(self._bases.delete, owner)
            deleted = await self._exchange.checked(delete, list(request.digests))
            return self._exchange.counted(llm_pb2.DeleteBaseReply(deleted=deleted))

    async def _announced(self, message: llm_pb2.Embeddings) -> Announced | Factors:
        """The first message's embeddings, dense or factored. Raises UnknownBase."""
        if message.WhichOneof("form") != "factored":
            return requests.announced(message, self._limits, self._place)
        if self._bases is None:
            raise Unsupported(_NO_BASES)
        read = partial(
            factored.announced,
            limits=self._limits,
            store=self._bases,
            owner=owner_of(caller()),
            device=self._engine.device,
        )
        return await self._exchange.checked(read, message)

    def _place(self) -> torch.device:
        """Where dense embeddings lie until they are computed with."""
        few = self._worker.depth < _ON_DEVICE
        return self._engine.device if few else torch.device("cpu")

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
                body_bytes=CHUNK_BYTES,
            ),
            forms=["dense", "factored"] if self._bases is not None else ["dense"],
            wire_dtypes=codec.FLOATS,
            load=llm_pb2.Load(queued=self._worker.depth, busy=self._worker.busy),
            replica=self._replica,
            version=__version__,
            protocol=PROTOCOL,
        )


def _checked(found: ScoreResult) -> ScoreResult:
    """Copied to the CPU off the event loop."""
    losses, counts = found.loss_sums.cpu(), found.token_counts.cpu()
    _check_losses(losses)
    return ScoreResult(losses, counts, found.correct_counts.cpu())


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
