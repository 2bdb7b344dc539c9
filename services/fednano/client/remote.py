"""The LLM behind gRPC, as a LanguageModel: what the trainer uses in a federation."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch

from fednano.client.meter import Kind, Meter
from fednano.client.replicas import Replica, Replicas
from fednano.client.retries import retried
from fednano.models.language_model import (
    ForwardResult,
    LowRank,
    NewToken,
    Sampling,
    ScoreResult,
    Sequences,
    StepResult,
)
from fednano.wire import codec, llm_pb2, torch_codec
from fednano.wire.channels import translated
from fednano.wire.errors import RETRYABLE, Unavailable, UnknownActivation
from fednano.wire.interceptors import bearer
from fednano.wire.tensor_pb2 import FP32, DType, Header, Tensor, TensorSpec

log = logging.getLogger(__name__)

T = TypeVar("T")
_REPLY_LIMIT = 1 << 34
_CHUNK_KINDS: dict[str, tuple[Kind, Kind]] = {  # of chunks sent and received
    "ForwardBackward": ("embeddings", "gradients"),
    "Score": ("embeddings", "control"),
    "Forward": ("embeddings", "logits"),
    "Backward": ("logits", "gradients"),
    "Generate": ("embeddings", "control"),
    "Embed": ("control", "embeddings"),
}


@dataclass(frozen=True)
class Caller:
    """Who calls: makes headers, and knows the newest token."""

    header: Callable[[], Header]
    token: Callable[[], str]


class RemoteLanguageModel:
    """Every call is tried again, on another replica where there is one, until `retry_seconds` are
    over; a call is safe to repeat as the service keeps nothing that it can't lose."""

    def __init__(
        self,
        replicas: Replicas,
        caller: Caller,
        meter: Meter | None = None,
        wire_dtype: DType = FP32,
        retry_seconds: float = 120.0,
        call_seconds: float = 120.0,
    ) -> None:
        """Asks the service what it is; raises what `Describe` raises."""
        self._replicas = replicas
        self._caller = caller
        self._meter = meter if meter is not None else Meter()
        self._dtype = wire_dtype
        self._call_seconds = call_seconds
        self._retry_seconds = retry_seconds
        self._homes: dict[str, str] = {}  # activation -> address of the replica that holds it
        self.card = self.describe()

    @property
    def hidden_size(self) -> int:
        return self.card.hidden_size

    @property
    def fingerprint(self) -> str:
        return self.card.fingerprint

    def describe(self) -> llm_pb2.DescribeReply:
        """The model card, from any replica."""
        request = llm_pb2.DescribeRequest(header=self._caller.header())

        def call(replica: Replica) -> llm_pb2.DescribeReply:
            self._meter.add("sent", "control", request.ByteSize())
            with translated():
                reply = replica.stub.Describe(request, **self._options())
            self._meter.add("received", "control", reply.ByteSize())
            return reply

        return self._retried(call)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [tokens] to [tokens, hidden] float32."""
        request = llm_pb2.EmbedRequest(
            header=self._header(), ids=codec.encode(ids.numpy()), dtype=FP32
        )

        def call(replica: Replica) -> torch.Tensor:
            self._meter.add("sent", "control", request.ByteSize())
            with translated():
                replies = replica.stub.Embed(request, **self._options())
                _, values = self._collect("Embed", replies, lambda r: [r.values])
            return values[0]

        return self._retried(call)

    def step(self, sequences: Sequences, labels: torch.Tensor, weights: torch.Tensor) -> StepResult:
        head = llm_pb2.ForwardBackwardHead(
            header=self._header(),
            embeddings=self._embeddings(sequences),
            labels=_integers(labels),
            weights=codec.encode(weights.float().numpy()),
            gradient_dtype=self._dtype,
        )
        body = [torch_codec.pack(sequences.values, self._dtype)]

        def call(replica: Replica) -> StepResult:
            requests = self._stream("ForwardBackward", llm_pb2.ForwardBackwardRequest, head, body)
            with translated():
                replies = replica.stub.ForwardBackward(requests, **self._options())
                first, values = self._collect(
                    "ForwardBackward", replies, lambda r: [r.result.gradient.dense.values]
                )
            self._spent(first.result.spent)
            return StepResult(
                _tensor(first.result.loss_sums), _tensor(first.result.token_counts), values[0]
            )

        return self._retried(call)

    def score(self, sequences: Sequences, labels: torch.Tensor) -> ScoreResult:
        head = llm_pb2.ScoreHead(
            header=self._header(),
            embeddings=self._embeddings(sequences),
            labels=_integers(labels),
        )
        body = [torch_codec.pack(sequences.values, self._dtype)]

        def call(replica: Replica) -> ScoreResult:
            requests = self._stream("Score", llm_pb2.ScoreRequest, head, body)
            with translated():
                reply = replica.stub.Score(requests, **self._options())
            self._meter.add("received", "control", reply.ByteSize())
            self._spent(reply.spent)
            return ScoreResult(
                _tensor(reply.loss_sums),
                _tensor(reply.token_counts),
                _tensor(reply.correct_counts),
            )

        return self._retried(call)

    def forward(
        self, sequences: Sequences, positions: torch.Tensor, keep: bool = True
    ) -> ForwardResult:
        head = llm_pb2.ForwardHead(
            header=self._header(),
            embeddings=self._embeddings(sequences),
            positions=_integers(positions),
            keep=keep,
        )
        body = [torch_codec.pack(sequences.values, self._dtype)]

        def call(replica: Replica) -> ForwardResult:
            requests = self._stream("Forward", llm_pb2.ForwardRequest, head, body)
            with translated():
                replies = replica.stub.Forward(requests, **self._options())
                first, values = self._collect("Forward", replies, lambda r: [r.result.logits])
            if first.result.activation:
                self._homes[first.result.activation] = replica.address
            return ForwardResult(first.result.activation, values[0])

        return self._retried(call)

    def backward(
        self,
        activation: str,
        logits_gradient: torch.Tensor,
        sequences: Sequences,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Goes to the replica that holds the activation; elsewhere it is computed again."""
        home = self._replicas.at(self._homes.pop(activation, ""))
        if home is not None:
            try:
                return self._backward(home, activation, logits_gradient, None, positions)
            except (UnknownActivation, *RETRYABLE) as error:
                log.info("activation computed again", extra={"reason": str(error)})
        return self._retried(
            lambda replica: self._backward(replica, "", logits_gradient, sequences, positions)
        )

    def _backward(
        self,
        replica: Replica,
        activation: str,
        logits_gradient: torch.Tensor,
        sequences: Sequences | None,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        head = llm_pb2.BackwardHead(
            header=self._header(),
            activation=activation,
            logits_gradient=torch_codec.spec_of("logits_gradient", logits_gradient, FP32),
            gradient_dtype=self._dtype,
        )
        body = [torch_codec.pack(logits_gradient, FP32)]
        if sequences is not None:
            head.embeddings.CopyFrom(self._embeddings(sequences))
            head.positions.CopyFrom(_integers(positions))
            body.append(torch_codec.pack(sequences.values, self._dtype))
        requests = self._stream("Backward", llm_pb2.BackwardRequest, head, body)
        with translated():
            replies = replica.stub.Backward(requests, **self._options())
            _, values = self._collect("Backward", replies, lambda r: [r.gradient.dense.values])
        return values[0]

    def generate(
        self, sequences: Sequences, sampling: Sampling, text_adapter: LowRank | None = None
    ) -> Iterator[list[NewToken]]:
        """Where a replica is lost in mid-answer the same request is written again elsewhere, and what
        has been handed out is skipped: equal requests give equal tokens."""
        head = llm_pb2.GenerateHead(
            header=self._header(),
            embeddings=self._embeddings(sequences),
            sampling=llm_pb2.Sampling(
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=sampling.seed,
                stop_ids=sampling.stop_ids,
            ),
        )
        body = [torch_codec.pack(sequences.values, self._dtype)]
        if text_adapter is not None:
            head.text_adapter.CopyFrom(_low_rank(text_adapter))
            body += [torch_codec.pack(t, FP32) for t in (text_adapter.down, text_adapter.up)]

        written = 0
        patience = time.monotonic() + self._retry_seconds
        while True:
            try:
                for reply in islice(self._written(head, body), written, None):
                    patience = time.monotonic() + self._retry_seconds
                    written += 1
                    yield self._tokens(reply)
                return
            except RETRYABLE as error:
                if time.monotonic() > patience:
                    raise
                self._note_failure(error)
                time.sleep(random.uniform(0.1, 1.0))

    def _written(
        self, head: llm_pb2.GenerateHead, body: list[codec.Buffer]
    ) -> Iterator[llm_pb2.GenerateReply]:
        requests = self._stream("Generate", llm_pb2.GenerateRequest, head, body)
        with translated():
            yield from self._replicas.next().stub.Generate(requests, **self._options())

    def _tokens(self, reply: llm_pb2.GenerateReply) -> list[NewToken]:
        self._meter.add("received", "control", reply.ByteSize())
        self._spent(reply.spent)
        return [NewToken(t.sample, t.id, t.end) for t in reply.tokens]

    def _retried(self, call: Callable[[Replica], T]) -> T:
        return retried(lambda: call(self._replicas.next()), self._retry_seconds, self._note_failure)

    def _note_failure(self, error: BaseException) -> None:
        self._replicas.failed()
        log.warning("the LLM service is asked again", extra={"reason": str(error)})

    def _options(self) -> dict[str, Any]:
        return {"metadata": bearer(self._caller.token()), "timeout": self._call_seconds}

    def _header(self) -> Header:
        header = self._caller.header()
        header.fingerprint = self.fingerprint
        return header

    def _embeddings(self, sequences: Sequences) -> llm_pb2.Embeddings:
        return announced(sequences, self._dtype)

    def _stream(
        self, rpc: str, request: Callable[..., Any], head: Any, body: Iterable[codec.Buffer]
    ) -> Iterator[Any]:
        first = request(head=head)
        self._meter.add("sent", "control", first.ByteSize())
        yield first
        for chunk in codec.chunked(body):
            self._meter.add("sent", _CHUNK_KINDS[rpc][0], len(chunk))
            yield request(chunk=chunk)

    def _collect(
        self, rpc: str, replies: Iterator[Any], specs: Callable[[Any], list[TensorSpec]]
    ) -> tuple[Any, list[torch.Tensor]]:
        """The first message of a reply stream and the tensors that it announced."""
        first = next(replies, None)
        if first is None:
            raise Unavailable(f"{rpc} ended without a reply")
        self._meter.add("received", "control", first.ByteSize())
        announced = specs(first)
        payload = codec.Payload(announced, _REPLY_LIMIT)
        for reply in replies:
            self._meter.add("received", _CHUNK_KINDS[rpc][1], len(reply.chunk))
            payload.feed(reply.chunk)
        buffers = payload.buffers()
        return first, [
            torch_codec.to_torch(s.dtype, s.shape, buffers[s.name], s.name).float()
            for s in announced
        ]

    def _spent(self, spent: llm_pb2.Spent) -> None:
        self._meter.add_server_seconds(spent.compute_seconds)


def announced(sequences: Sequences, dtype: DType) -> llm_pb2.Embeddings:
    """The first message's part of a batch; its values follow in chunks."""
    samples = [
        llm_pb2.Sample(
            segments=[
                llm_pb2.Segment(
                    modality=llm_pb2.Modality.Name(s.modality), start=s.start, length=s.length
                )
                for s in sample
            ]
        )
        for sample in sequences.segments
    ]
    spec = torch_codec.spec_of("embeddings", sequences.values, dtype)
    return llm_pb2.Embeddings(samples=samples, dense=llm_pb2.DenseForm(values=spec))


def _integers(tensor: torch.Tensor) -> Tensor:
    return codec.encode(tensor.to(torch.int32).numpy())


def _tensor(message: Tensor) -> torch.Tensor:
    return torch.from_numpy(codec.decode(message).copy())


def _low_rank(adapter: LowRank) -> llm_pb2.LowRank:
    return llm_pb2.LowRank(
        down=torch_codec.spec_of("down", adapter.down, FP32),
        up=torch_codec.spec_of("up", adapter.up, FP32),
        scale=adapter.scale,
    )
