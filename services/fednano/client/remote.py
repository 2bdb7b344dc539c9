"""The LLM behind gRPC, as a LanguageModel: what the trainer uses in a federation."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import Any

import torch

from fednano.client.calls import Caller as Caller
from fednano.client.calls import Calls
from fednano.client.messages import (
    Around,
    Sent,
    announced,
    gradient_specs,
    integers,
    low_rank,
    low_rank_size,
    sampling_of,
    tensor,
)
from fednano.client.meter import Meter
from fednano.client.passes import Passes
from fednano.client.portions import WHOLE, Portion, cut, joined
from fednano.client.replicas import Replica, Replicas
from fednano.models.language_model import (
    IGNORED,
    ForwardResult,
    LowRank,
    NewToken,
    Sampling,
    ScoreResult,
    Sequences,
    StepResult,
)
from fednano.wire import codec, llm_pb2, torch_codec
from fednano.wire.errors import RETRYABLE, Unavailable
from fednano.wire.tensor_pb2 import FP32, DType, Header

Stepped = tuple[llm_pb2.ForwardBackwardResult, list[torch.Tensor]]
"""A reply, and its gradient's tensors in the order of `gradient_specs`."""


class RemoteLanguageModel:
    """Embeddings travel in dense form, in as many requests as the service's limits ask for: where a
    sample alone is too much, InvalidRequest is raised before anything is sent. See `Calls` for what
    becomes of failures."""

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
        self.card = self.describe()
        self.passes = Passes(self.calls, self.header, wire_dtype)

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
            self.calls.sent(request)
            with self.calls.calling("Describe", request.header) as options:
                reply = replica.stub.Describe(request, **options)
            self.calls.received(reply)
            return reply

        return self.calls.retried(request.header, call)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [tokens] to [tokens, hidden] float32."""
        request = llm_pb2.EmbedRequest(
            header=self.header(), ids=codec.encode(ids.numpy()), dtype=FP32
        )

        def call(replica: Replica) -> torch.Tensor:
            self.calls.sent(request)
            with self.calls.calling("Embed", request.header) as options:
                replies = replica.stub.Embed(request, **options)
                _, values = self.calls.collect("Embed", replies, lambda r: [r.values])
            return values[0]

        return self.calls.retried(request.header, call)

    def step(self, sequences: Sequences, labels: torch.Tensor, weights: torch.Tensor) -> StepResult:
        found = [self.stepped(sent, labels, weights) for sent in self.sent(sequences)]
        loss_sums, counts = losses([result for result, _ in found])
        return StepResult(loss_sums, counts, joined([values[0] for _, values in found]))

    def stepped(
        self, sent: Sent, labels: torch.Tensor, weights: torch.Tensor, want_fisher: bool = False
    ) -> Stepped:
        """`step` for a portion in any form, of a batch with these labels and weights."""
        head = llm_pb2.ForwardBackwardHead(
            header=self.header(),
            embeddings=sent.embeddings,
            labels=integers(labels[sent.portion.tokens]),
            weights=codec.encode(weights[sent.portion.samples].float().numpy()),
            want_fisher=want_fisher,
            gradient_dtype=self.wire_dtype,
        )

        def call(replica: Replica) -> Stepped:
            with self.calls.calling("ForwardBackward", head.header) as options:
                replies = self._replies_to_step(replica, head, sent, options)
                first, values = self.calls.collect(
                    "ForwardBackward", replies, lambda r: gradient_specs(r.result.gradient)
                )
            self.calls.spent(first.result.spent)
            return first.result, values

        return self.calls.retried(head.header, lambda at: sent.around(at, lambda: call(at)))

    def _replies_to_step(
        self,
        replica: Replica,
        head: llm_pb2.ForwardBackwardHead,
        sent: Sent,
        options: dict[str, Any],
    ) -> Iterator[llm_pb2.ForwardBackwardReply]:
        """A small step is one message each way, if the service takes that: its gradient is as large
        as what was sent."""
        dense = sent.embeddings.WhichOneof("form") == "dense"
        if dense and 0 < sum(map(len, sent.body)) <= self.card.limits.body_bytes:
            message = self.calls.whole(head, sent.body)
            return iter([replica.step_in_one(message, **options)])
        requests = self.calls.stream(
            "ForwardBackward", llm_pb2.ForwardBackwardRequest, head, sent.body, sent.under_way
        )
        return replica.stub.ForwardBackward(requests, **options)

    def score(self, sequences: Sequences, labels: torch.Tensor) -> ScoreResult:
        return self.scored(self.sent(sequences), labels)

    def scored(self, portions: Iterable[Sent], labels: torch.Tensor) -> ScoreResult:
        """`score` for embeddings of any form."""
        found = [self._scored(sent, labels[sent.portion.tokens]) for sent in portions]
        return ScoreResult(
            joined([tensor(reply.loss_sums) for reply in found]),
            joined([tensor(reply.token_counts) for reply in found]),
            joined([tensor(reply.correct_counts) for reply in found]),
        )

    def _scored(self, sent: Sent, labels: torch.Tensor) -> llm_pb2.ScoreReply:
        head = llm_pb2.ScoreHead(
            header=self.header(), embeddings=sent.embeddings, labels=integers(labels)
        )

        def call(replica: Replica) -> llm_pb2.ScoreReply:
            requests = self.calls.stream("Score", llm_pb2.ScoreRequest, head, sent.body)
            with self.calls.calling("Score", head.header) as options:
                reply = replica.stub.Score(requests, **options)
            self.calls.received(reply)
            self.calls.spent(reply.spent)
            return reply

        return self.calls.retried(head.header, lambda at: sent.around(at, lambda: call(at)))

    def forward(
        self, sequences: Sequences, positions: torch.Tensor, keep: bool = True
    ) -> ForwardResult:
        return self.passes.forward(self._whole(sequences), positions, keep)

    def backward(
        self,
        activation: str,
        logits_gradient: torch.Tensor,
        sequences: Sequences,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        again = partial(self._whole, sequences)
        _, values = self.passes.backward(activation, logits_gradient, again, positions)
        return values[0]

    def generate(
        self, sequences: Sequences, sampling: Sampling, text_adapter: LowRank | None = None
    ) -> Iterator[list[NewToken]]:
        portions = self.sent(sequences, low_rank_size(text_adapter))
        return self.generated(portions, sampling, text_adapter)

    def generated(
        self, portions: Iterable[Sent], sampling: Sampling, text_adapter: LowRank | None = None
    ) -> Iterator[list[NewToken]]:
        """`generate` for embeddings of any form, one portion after the other."""
        for sent in portions:
            first = sent.portion.samples.start or 0
            for tokens in self._answered(sent, first, sampling, text_adapter):
                yield [replace(token, sample=first + token.sample) for token in tokens]

    def _answered(
        self, sent: Sent, first: int, sampling: Sampling, text_adapter: LowRank | None
    ) -> Iterator[list[NewToken]]:
        """Where a replica is lost in mid-answer the same request is written again elsewhere, and what
        has been handed out is skipped: equal requests give equal tokens."""
        head = llm_pb2.GenerateHead(
            header=self.header(),
            embeddings=sent.embeddings,
            # Samples draw by their place in a request: those of two portions must not draw alike.
            sampling=sampling_of(sampling, sampling.seed + first),
        )
        body = list(sent.body)
        if text_adapter is not None:
            head.text_adapter.CopyFrom(low_rank(text_adapter))
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
            first = next(replies, None)
            if first is None:
                raise Unavailable("Generate ended without a reply")
            return chain([first], replies)

        yield from around(replica, begun)

    def _replies(
        self, replica: Replica, head: llm_pb2.GenerateHead, body: list[codec.Buffer]
    ) -> Iterator[llm_pb2.GenerateReply]:
        requests = self.calls.stream("Generate", llm_pb2.GenerateRequest, head, body)
        with self.calls.calling("Generate", head.header) as options:
            yield from replica.stub.Generate(requests, **options)

    def _tokens(self, reply: llm_pb2.GenerateReply) -> list[NewToken]:
        self.calls.received(reply)
        self.calls.spent(reply.spent)
        return [NewToken(t.sample, t.id, t.end) for t in reply.tokens]

    def header(self) -> Header:
        """Of a request about this model."""
        header = self.calls.caller.header()
        header.fingerprint = self.fingerprint
        return header

    def portions(self, sequences: Sequences, labels: torch.Tensor) -> list[Portion]:
        """For a loss of the client's own: what can be sent together with the logits of its labels, as
        Backward has to where an activation is gone."""
        beside = self.logits_sizes(sequences.lengths, labels)
        sizes = [sum(both) for both in zip(self._sizes(sequences), beside, strict=True)]
        return cut(sequences.lengths, sizes, self.card.limits)

    def logits_sizes(self, lengths: Sequence[int], labels: torch.Tensor) -> list[int]:
        """Bytes of the logits of each sample's labels [tokens]."""
        wanted = [int((part != IGNORED).sum()) for part in labels.split(list(lengths))]
        return [codec.byte_size(FP32, (count, self.card.vocabulary)) for count in wanted]

    def sent(self, sequences: Sequences, beside: int = 0) -> Iterator[Sent]:
        """Dense embeddings as they travel, with `beside` bytes of something else in each request."""
        for portion in cut(sequences.lengths, self._sizes(sequences), self.card.limits, beside):
            yield self._whole(portion.of(sequences), portion)

    def _whole(self, sequences: Sequences, portion: Portion = WHOLE) -> Sent:
        body = [torch_codec.pack(sequences.values, self.wire_dtype)]
        return Sent(announced(sequences, self.wire_dtype), body, portion)

    def _sizes(self, sequences: Sequences) -> list[int]:
        """Bytes of each sample."""
        row = codec.byte_size(self.wire_dtype, (1, sequences.values.shape[-1]))
        return [row * length for length in sequences.lengths]


def losses(results: Sequence[llm_pb2.ForwardBackwardResult]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every sample: the sum over its labelled tokens, and how many they are."""
    sums = joined([tensor(result.loss_sums) for result in results])
    return sums, joined([tensor(result.token_counts) for result in results])
