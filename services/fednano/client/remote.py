"""The LLM behind gRPC, as a LanguageModel: what the trainer uses in a federation."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Protocol, TypeVar

import torch

from fednano.client.calls import Caller as Caller
from fednano.client.calls import Calls
from fednano.client.meter import Meter
from fednano.client.replicas import Replica, Replicas
from fednano.models.language_model import (
    ForwardResult,
    LowRank,
    NewToken,
    Sampling,
    ScoreResult,
    Segment,
    Sequences,
    StepResult,
)
from fednano.wire import codec, llm_pb2, torch_codec
from fednano.wire.errors import RETRYABLE, UnknownActivation
from fednano.wire.tensor_pb2 import FP32, DType, Header, Tensor, TensorSpec

log = logging.getLogger(__name__)

T = TypeVar("T")


class Around(Protocol):
    """Makes a call at a replica: as it is, or again once what the replica lacks has been sent."""

    def __call__(self, replica: Replica, call: Callable[[], T]) -> T: ...


def _plainly(replica: Replica, call: Callable[[], T]) -> T:
    return call()


@dataclass(frozen=True)
class Sent:
    """Embeddings as they travel: the first message's part, and the bytes that follow."""

    embeddings: llm_pb2.Embeddings
    body: list[codec.Buffer]
    around: Around = _plainly


class RemoteLanguageModel:
    """Embeddings travel in dense form. See `Calls` for what becomes of failures."""

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
        meter = meter if meter is not None else Meter()
        self.calls = Calls(replicas, caller, meter, retry_seconds, call_seconds)
        self.wire_dtype = wire_dtype
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
        request = llm_pb2.DescribeRequest(header=self.calls.caller.header())

        def call(replica: Replica) -> llm_pb2.DescribeReply:
            self.calls.meter.add("sent", "control", request.ByteSize())
            with self.calls.calling("Describe", request.header) as options:
                reply = replica.stub.Describe(request, **options)
            self.calls.meter.add("received", "control", reply.ByteSize())
            return reply

        return self.calls.retried(request.header, call)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [tokens] to [tokens, hidden] float32."""
        request = llm_pb2.EmbedRequest(
            header=self.header(), ids=codec.encode(ids.numpy()), dtype=FP32
        )

        def call(replica: Replica) -> torch.Tensor:
            self.calls.meter.add("sent", "control", request.ByteSize())
            with self.calls.calling("Embed", request.header) as options:
                replies = replica.stub.Embed(request, **options)
                _, values = self.calls.collect("Embed", replies, lambda r: [r.values])
            return values[0]

        return self.calls.retried(request.header, call)

    def step(self, sequences: Sequences, labels: torch.Tensor, weights: torch.Tensor) -> StepResult:
        result, values = self.stepped(self.sent(sequences), labels, weights)
        return StepResult(_tensor(result.loss_sums), _tensor(result.token_counts), values[0])

    def stepped(
        self, sent: Sent, labels: torch.Tensor, weights: torch.Tensor, want_fisher: bool = False
    ) -> tuple[llm_pb2.ForwardBackwardResult, list[torch.Tensor]]:
        """`step` for embeddings of any form: the reply, and the gradient's tensors in its order."""
        head = llm_pb2.ForwardBackwardHead(
            header=self.header(),
            embeddings=sent.embeddings,
            labels=_integers(labels),
            weights=codec.encode(weights.float().numpy()),
            want_fisher=want_fisher,
            gradient_dtype=self.wire_dtype,
        )

        def call(
            replica: Replica,
        ) -> tuple[llm_pb2.ForwardBackwardResult, list[torch.Tensor]]:
            requests = self.calls.stream(
                "ForwardBackward", llm_pb2.ForwardBackwardRequest, head, sent.body
            )
            with self.calls.calling("ForwardBackward", head.header) as options:
                replies = replica.stub.ForwardBackward(requests, **options)
                first, values = self.calls.collect(
                    "ForwardBackward", replies, lambda r: gradient_specs(r.result.gradient)
                )
            self.calls.spent(first.result.spent)
            return first.result, values

        return self.calls.retried(head.header, lambda at: sent.around(at, lambda: call(at)))

    def score(self, sequences: Sequences, labels: torch.Tensor) -> ScoreResult:
        return self.scored(self.sent(sequences), labels)

    def scored(self, sent: Sent, labels: torch.Tensor) -> ScoreResult:
        """`score` for embeddings of any form."""
        head = llm_pb2.ScoreHead(
            header=self.header(), embeddings=sent.embeddings, labels=_integers(labels)
        )

        def call(replica: Replica) -> ScoreResult:
            requests = self.calls.stream("Score", llm_pb2.ScoreRequest, head, sent.body)
            with self.calls.calling("Score", head.header) as options:
                reply = replica.stub.Score(requests, **options)
            self.calls.meter.add("received", "control", reply.ByteSize())
            self.calls.spent(reply.spent)
            return ScoreResult(
                _tensor(reply.loss_sums),
                _tensor(reply.token_counts),
                _tensor(reply.correct_counts),
            )

        return self.calls.retried(head.header, lambda at: sent.around(at, lambda: call(at)))

    def forward(
        self, sequences: Sequences, positions: torch.Tensor, keep: bool = True
    ) -> ForwardResult:
        head = llm_pb2.ForwardHead(
            header=self.header(),
            embeddings=self._embeddings(sequences),
            positions=_integers(positions),
            keep=keep,
        )
        body = [torch_codec.pack(sequences.values, self.wire_dtype)]

        def call(replica: Replica) -> ForwardResult:
            requests = self.calls.stream("Forward", llm_pb2.ForwardRequest, head, body)
            with self.calls.calling("Forward", head.header) as options:
                replies = replica.stub.Forward(requests, **options)
                first, values = self.calls.collect("Forward", replies, lambda r: [r.result.logits])
            if first.result.activation:
                self._homes[first.result.activation] = replica.address
            return ForwardResult(first.result.activation, values[0])

        return self.calls.retried(head.header, call)

    def backward(
        self,
        activation: str,
        logits_gradient: torch.Tensor,
        sequences: Sequences,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Goes to the replica that holds the activation; elsewhere it is computed again."""
        header = self.header()
        home = self.calls.replicas.at(self._homes.pop(activation, ""))
        if home is not None:
            try:
                return self._backward(home, header, logits_gradient, activation)
            except (UnknownActivation, *RETRYABLE) as error:
                extra = {"reason": str(error), "request_id": header.request}
                log.info("activation computed again", extra=extra)
        again = sequences, positions
        return self.calls.retried(
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
            gradient_dtype=self.wire_dtype,
        )
        body = [torch_codec.pack(logits_gradient, FP32)]
        if again is not None:
            sequences, positions = again
            head.embeddings.CopyFrom(self._embeddings(sequences))
            head.positions.CopyFrom(_integers(positions))
            body.append(torch_codec.pack(sequences.values, self.wire_dtype))
        requests = self.calls.stream("Backward", llm_pb2.BackwardRequest, head, body)
        with self.calls.calling("Backward", header) as options:
            replies = replica.stub.Backward(requests, **options)
            _, values = self.calls.collect("Backward", replies, lambda r: [r.gradient.dense.values])
        return values[0]

    def generate(
        self, sequences: Sequences, sampling: Sampling, text_adapter: LowRank | None = None
    ) -> Iterator[list[NewToken]]:
        return self.generated(self.sent(sequences), sampling, text_adapter)

    def generated(
        self, sent: Sent, sampling: Sampling, text_adapter: LowRank | None = None
    ) -> Iterator[list[NewToken]]:
        """`generate` for embeddings of any form. Where a replica is lost in mid-answer the same
        request is written again elsewhere, and what has been handed out is skipped: equal requests
        give equal tokens."""
        head = llm_pb2.GenerateHead(
            header=self.header(),
            embeddings=sent.embeddings,
            sampling=llm_pb2.Sampling(
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=sampling.seed,
                stop_ids=sampling.stop_ids,
            ),
        )
        body = list(sent.body)
        if text_adapter is not None:
            head.text_adapter.CopyFrom(_low_rank(text_adapter))
            body += [torch_codec.pack(t, FP32) for t in (text_adapter.down, text_adapter.up)]

        written = 0
        patience = time.monotonic() + self.calls.retry_seconds
        while True:
            try:
                for reply in islice(self._written(head, body, sent.around), written, None):
                    patience = time.monotonic() + self.calls.retry_seconds
                    written += 1
                    yield self._tokens(reply)
                return
            except RETRYABLE as error:
                if time.monotonic() > patience:
                    raise
                self.calls.note_failure(error, head.header)
                time.sleep(random.uniform(0.1, 1.0))

    def _written(
        self, head: llm_pb2.GenerateHead, body: list[codec.Buffer], around: Around
    ) -> Iterator[llm_pb2.GenerateReply]:
        replica = self.calls.replicas.next()

        def begun() -> Iterator[llm_pb2.GenerateReply]:
            replies = self._replies(replica, head, body)
            return chain([next(replies)], replies)

        yield from around(replica, begun)

    def _replies(
        self, replica: Replica, head: llm_pb2.GenerateHead, body: list[codec.Buffer]
    ) -> Iterator[llm_pb2.GenerateReply]:
        requests = self.calls.stream("Generate", llm_pb2.GenerateRequest, head, body)
        with self.calls.calling("Generate", head.header) as options:
            yield from replica.stub.Generate(requests, **options)

    def _tokens(self, reply: llm_pb2.GenerateReply) -> list[NewToken]:
        self.calls.meter.add("received", "control", reply.ByteSize())
        self.calls.spent(reply.spent)
        return [NewToken(t.sample, t.id, t.end) for t in reply.tokens]

    def header(self) -> Header:
        """Of a request about this model."""
        header = self.calls.caller.header()
        header.fingerprint = self.fingerprint
        return header

    def sent(self, sequences: Sequences) -> Sent:
        """Dense embeddings as they travel."""
        body = [torch_codec.pack(sequences.values, self.wire_dtype)]
        return Sent(announced(sequences, self.wire_dtype), body)

    def _embeddings(self, sequences: Sequences) -> llm_pb2.Embeddings:
        return announced(sequences, self.wire_dtype)


def announced(sequences: Sequences, dtype: DType) -> llm_pb2.Embeddings:
    """The first message's part of a batch; its values follow in chunks."""
    spec = torch_codec.spec_of("embeddings", sequences.values, dtype)
    dense = llm_pb2.DenseForm(values=spec)
    return llm_pb2.Embeddings(samples=samples_of(sequences.segments), dense=dense)


def samples_of(segments: tuple[tuple[Segment, ...], ...]) -> list[llm_pb2.Sample]:
    """Where which tokens are."""
    return [
        llm_pb2.Sample(
            segments=[
                llm_pb2.Segment(
                    modality=llm_pb2.Modality.Name(s.modality), start=s.start, length=s.length
                )
                for s in sample
            ]
        )
        for sample in segments
    ]


def gradient_specs(gradient: llm_pb2.Gradient) -> list[TensorSpec]:
    """The tensors of a gradient in the order in which their bytes come: dense, or dL/dU, each dL/dW
    and each Fisher part by their modality's number."""
    if gradient.WhichOneof("form") == "dense":
        return [gradient.dense.values]
    found = gradient.factored
    return [found.left, *(specs[m] for specs in (found.right, found.fisher) for m in sorted(specs))]


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
