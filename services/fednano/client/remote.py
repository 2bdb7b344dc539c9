"""The LLM behind gRPC, as a LanguageModel: what the trainer uses in a federation."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from structlog.contextvars import bound_contextvars

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
from fednano.wire.channels import calling
from fednano.wire.errors import RETRYABLE, Unavailable, UnknownActivation
from fednano.wire.tensor_pb2 import FP32, DType, Header, Tensor, TensorSpec

log = logging.getLogger(__name__)

T = TypeVar("T")
_SERVICE = f"/{llm_pb2.DESCRIPTOR.services_by_name['LanguageModel'].full_name}"
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
            with self._calling("Describe", request.header) as options:
                reply = replica.stub.Describe(request, **options)
            self._meter.add("received", "control", reply.ByteSize())
            return reply

        return self._retried(request.header, call)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [tokens] to [tokens, hidden] float32."""
        request = llm_pb2.EmbedRequest(
            header=self._header(), ids=codec.encode(ids.numpy()), dtype=FP32
        )

        def call(replica: Replica) -> torch.Tensor:
            self._meter.add("sent", "control", request.ByteSize())
            with self._calling("Embed", request.header) as options:
                replies = replica.stub.Embed(request, **options)
                _, values = self._collect("Embed", replies, lambda r: [r.values])
            return values[0]

        return self._retried(request.header, call)

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
            with self._calling("ForwardBackward", head.header) as options:
                replies = replica.stub.ForwardBackward(requests, **options)
                first, values = self._collect(
                    "ForwardBackward", replies, lambda r: [r.result.gradient.dense.values]
                )
            self._spent(first.result.spent)
            return StepResult(
                _tensor(first.result.loss_sums), _tensor(first.result.token_counts), values[0]
            )

        return self._retried(head.header, call)

    def score(self, sequences: Sequences, labels: torch.Tensor) -> ScoreResult:
        head = llm_pb2.ScoreHead(
            header=self._header(),
            embeddings=self._embeddings(sequences),
            labels=_integers(labels),
        )
        body = [torch_codec.pack(sequences.values, self._dtype)]

        def call(replica: Replica) -> ScoreResult:
            requests = self._stream("Score", llm_pb2.ScoreRequest, head, body)
            with self._calling("Score", head.header) as options:
                reply = replica.stub.Score(requests, **options)
            self._meter.add("received", "control", reply.ByteSize())
            self._spent(reply.spent)
            return ScoreResult(
                _tensor(reply.loss_sums),
                _tensor(reply.token_counts),
                _tensor(reply.correct_counts),
            )

        return self._retried(head.header, call)

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
            with self._calling("Forward", head.header) as options:
                replies = replica.stub.Forward(requests, **options)
                first, values = self._collect("Forward", replies, lambda r: [r.result.logits])
            if first.result.activation:
                self._homes[first.result.activation] = replica.address
            return ForwardResult(first.result.activation, values[0])

        return self._retried(head.header, call)

    def backward(
        self,
        activation: str,
        logits_gradient: torch.Tensor,
        sequences: Sequences,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Goes to the replica that holds the activation; elsewhere it is computed again."""
        header = self._header()
        home = self._replicas.at(self._homes.pop(activation, ""))
        if home is not None:
            try:
                return self._backward(home, header, logits_gradient, activation)
            except (UnknownActivation, *RETRYABLE) as error:
                extra = {"reason": str(error), "request_id": header.request}
                log.info("activation computed again", extra=extra)
        again = sequences, positions
        return self._retried(
            header, lambda replica: self._backward(replica, header, logits_gradient, "", again)
        )

    def _backward(
        self,
        replica: Replica,
        header: Header,
        logits_gradient: torch.Tensor,
        activation: str,
        again: tuple[Sequences, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """`again` is what an activation is computed from, where there is none."""
        head = llm_pb2.BackwardHead(
            header=header,
            activation=activation,
            logits_gradient=torch_codec.spec_of("logits_gradient", logits_gradient, FP32),
            gradient_dtype=self._dtype,
        )
        body = [torch_codec.pack(logits_gradient, FP32)]
        if again is not None:
            sequences, positions = again
            head.embeddings.CopyFrom(self._embeddings(sequences))
            head.positions.CopyFrom(_integers(positions))
            body.append(torch_codec.pack(sequences.values, self._dtype))
        requests = self._stream("Backward", llm_pb2.BackwardRequest, head, body)
        with self._calling("Backward", header) as options:
            replies = replica.stub.Backward(requests, **options)
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
                self._note_failure(error, head.header)
                time.sleep(random.uniform(0.1, 1.0))

    def _written(
        self, head: llm_pb2.GenerateHead, body: list[codec.Buffer]
    ) -> Iterator[llm_pb2.GenerateReply]:
        requests = self._stream("Generate", llm_pb2.GenerateRequest, head, body)
        with self._calling("Generate", head.header) as options:
            yield from self._replicas.next().stub.Generate(requests, **options)

    def _tokens(self, reply: llm_pb2.GenerateReply) -> list[NewToken]:
        self._meter.add("received", "control", reply.ByteSize())
        self._spent(reply.spent)
        return [NewToken(t.sample, t.id, t.end) for t in reply.tokens]

    def _retried(self, header: Header, call: Callable[[Replica], T]) -> T:
        with bound_contextvars(request_id=header.request):
            return retried(
                lambda: call(self._replicas.next()),
                self._retry_seconds,
                lambda error: self._note_failure(error, header),
            )

    def _note_failure(self, error: BaseException, header: Header) -> None:
        self._replicas.failed()
        extra = {"reason": str(error), "request_id": header.request}
        log.warning("the LLM service is asked again", extra=extra)

    @contextmanager
    def _calling(self, rpc: str, header: Header) -> Iterator[dict[str, Any]]:
        """Around one try: the options of the stub's method."""
        with calling(f"{_SERVICE}/{rpc}", header, self._caller.token()) as metadata:
            yield {"metadata": metadata, "timeout": self._call_seconds}

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
