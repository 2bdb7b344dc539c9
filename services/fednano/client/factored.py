"""The factored wire, seen from the client: what never changes is uploaded once, the rest is small.

Of each sample's vectors e = x + U W the service holds x; a step sends U = A x and W = s B^T and gets
dL/dU and dL/dW, from which autograd goes on to A and B. Exact, by the chain rule.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TypeVar

import torch

from fednano.client.messages import low_rank_size, samples_of
from fednano.client.portions import Portion, cut, joined
from fednano.client.remote import RemoteLanguageModel, Sent, losses
from fednano.client.replicas import Replica
from fednano.models.factored import Factored, FactoredGradient, base_digest
from fednano.models.language_model import (
    LowRank,
    Modality,
    NewToken,
    Sampling,
    ScoreResult,
    Sequences,
)
from fednano.wire import codec, llm_pb2, torch_codec
from fednano.wire.errors import FedNanoError, UnknownBase, Unsupported
from fednano.wire.tensor_pb2 import FP32, DType, Header, TensorSpec

log = logging.getLogger(__name__)

T = TypeVar("T")
_ROUNDS = 3
"""How often a call uploads what is missing, before it sends everything itself."""
_DENSE_SECONDS = 60.0
"""How long everything is sent after that: a service without room would be filled at every step."""


@dataclass(frozen=True)
class Base:
    """One sample's x as it travels."""

    digest: bytes
    spec: TensorSpec
    data: codec.Buffer


class NoRoom(Exception):
    """The service does not keep what it is given; nobody outside of this file gets to see it."""


@dataclass(frozen=True)
class FactoredStep:
    """As StepResult, with the gradient of what was sent."""

    loss_sums: torch.Tensor  # [samples] float32
    token_counts: torch.Tensor  # [samples] int32
    gradient: FactoredGradient


class FactoredLanguageModel:
    """The LLM service by the factored wire. Bases that a replica lacks are uploaded to it; where that
    does not help, a call goes by the dense wire instead, with the same result but for rounding."""

    def __init__(self, remote: RemoteLanguageModel) -> None:
        self._remote = remote
        self._calls = remote.calls
        self._dense_until = float("-inf")
        self._broken_off: set[str] = set()  # addresses to which an upload was not finished

    @property
    def wire_dtype(self) -> DType:
        return self._remote.wire_dtype

    def step(
        self,
        sent: Factored,
        labels: torch.Tensor,
        weights: torch.Tensor,
        want_fisher: bool = False,
    ) -> FactoredStep:
        """Loss and gradient of sum_i weights[i] * loss_i. `sent.base` is `as_held`."""

        def by_factors() -> FactoredStep:
            found = [
                self._remote.stepped(portion, labels, weights, want_fisher)
                for portion in self._sent(sent)
            ]
            loss_sums, counts = losses([result for result, _ in found])
            parts = [_gradient(result.gradient.factored, values) for result, values in found]
            return FactoredStep(loss_sums, counts, _together(parts))

        def densely() -> FactoredStep:
            reply = self._remote.step(sent.dense(), labels, weights)
            gradient = sent.gradient(reply.gradient, want_fisher)
            return FactoredStep(reply.loss_sums, reply.token_counts, gradient)

        return self._either(by_factors, densely)

    def score(self, sent: Factored, labels: torch.Tensor) -> ScoreResult:
        """Loss and teacher-forced hits, no gradient."""
        return self._either(
            lambda: self._remote.scored(self._sent(sent), labels),
            lambda: self._remote.score(sent.dense(), labels),
        )

    def generate(
        self, sent: Factored, sampling: Sampling, text_adapter: LowRank | None = None
    ) -> Iterator[list[NewToken]]:
        """As LanguageModel.generate."""
        written: Counter[int] = Counter()  # by sample
        if time.monotonic() >= self._dense_until:
            portions = self._sent(sent, low_rank_size(text_adapter))
            try:
                for tokens in self._remote.generated(portions, sampling, text_adapter):
                    written.update(token.sample for token in tokens)
                    yield tokens
                return
            except (NoRoom, Unsupported) as error:
                self._give_up(error)
        for tokens in self._remote.generate(sent.dense(), sampling, text_adapter):
            if unseen := _unseen(tokens, written):
                yield unseen

    def forget(self) -> None:
        """Has every replica delete what was uploaded; what can't be reached forgets by itself."""
        request = llm_pb2.DeleteBaseRequest(header=self._remote.header())
        for replica in self._calls.replicas.every():
            try:
                with self._calls.calling("DeleteBase", request.header) as options:
                    replica.stub.DeleteBase(request, **options)
                self._calls.meter.add("sent", "control", request.ByteSize())
            except FedNanoError as error:
                log.info("bases not deleted", extra={"reason": str(error)})

    def _either(self, by_factors: Callable[[], T], densely: Callable[[], T]) -> T:
        if time.monotonic() >= self._dense_until:
            try:
                return by_factors()
            except (NoRoom, Unsupported) as error:
                self._give_up(error)
        return densely()

    def _give_up(self, error: Exception) -> None:
        self._dense_until = time.monotonic() + _DENSE_SECONDS
        extra = {"reason": str(error), "seconds": _DENSE_SECONDS}
        log.warning("the dense wire is used instead", extra=extra)

    def _sent(self, sent: Factored, beside: int = 0) -> Iterator[Sent]:
        """In portions that fit, of which each has every W; see `RemoteLanguageModel.sent`."""
        dtype, rank = self.wire_dtype, sent.left.shape[-1]
        sizes = [codec.byte_size(dtype, (length, rank)) for length in sent.lengths]
        beside += sum(codec.byte_size(dtype, w.shape) for w in sent.right.values())
        for portion in cut(sent.lengths, sizes, self._remote.card.limits, beside):
            yield self._portion(sent, portion)

    def _portion(self, sent: Factored, portion: Portion) -> Sent:
        """U, then each W by its modality's number; the bases by their digests."""
        dtype, left = self.wire_dtype, sent.left[portion.tokens]
        segments = sent.segments[portion.samples]
        base = portion.of(Sequences(sent.base, sent.segments))
        bases = _bases(base, dtype, self._remote.fingerprint)
        right = {int(m): sent.right[m] for m in sorted(sent.right)}
        form = llm_pb2.FactoredForm(
            bases=[base.digest for base in bases],
            left=torch_codec.spec_of("left", left, dtype),
            right={m: torch_codec.spec_of(f"right.{m}", w, dtype) for m, w in right.items()},
        )
        embeddings = llm_pb2.Embeddings(samples=samples_of(segments), factored=form)
        body = [torch_codec.pack(tensor, dtype) for tensor in (left, *right.values())]

        def around(replica: Replica, call: Callable[[], T]) -> T:
            return self._with_bases(replica, call, bases)

        return Sent(embeddings, body, portion, around)

    def _with_bases(self, replica: Replica, call: Callable[[], T], bases: Sequence[Base]) -> T:
        """`call()`, again after what this replica lacks has been uploaded. Raises NoRoom."""
        for _ in range(_ROUNDS):
            try:
                return call()
            except UnknownBase as error:
                missing = {bases[i].digest: bases[i] for i in _places(error, len(bases))}
                self._upload(replica, list(missing.values()))
        raise NoRoom(f"the service kept none of {len(bases)} bases, or not long enough")

    def _upload(self, replica: Replica, bases: Sequence[Base]) -> None:
        """All of them in one stream; after one that broke off, from where it did."""
        header, held = self._remote.header(), 0
        if replica.address in self._broken_off:
            held = self._send(replica, self._messages(header, bases, asking=True), header)
        self._broken_off.add(replica.address)
        self._send(replica, self._messages(header, bases, held), header)
        self._broken_off.discard(replica.address)

    def _send(
        self, replica: Replica, messages: Iterator[llm_pb2.UploadBaseRequest], header: Header
    ) -> int:
        """How many of all announced bytes the replica holds, in their order."""
        with self._calls.calling("UploadBase", header) as options:
            reply = replica.stub.UploadBase(messages, **options)
        self._calls.meter.add("received", "control", reply.ByteSize())
        return int(reply.received)

    def _messages(
        self, header: Header, bases: Sequence[Base], skip: int = 0, asking: bool = False
    ) -> Iterator[llm_pb2.UploadBaseRequest]:
        """Heads and bytes, but for the first `skip` bytes; only heads to ask what is held."""
        for base in bases:
            offset = min(skip, len(base.data))
            skip -= offset
            if offset == len(base.data) and base is not bases[-1]:
                continue
            head = llm_pb2.UploadBaseHead(
                header=header, digest=base.digest, values=base.spec, offset=offset
            )
            message = llm_pb2.UploadBaseRequest(head=head)
            self._calls.meter.add("sent", "control", message.ByteSize())
            yield message
            if asking:
                continue
            for chunk in codec.chunked([memoryview(base.data)[offset:]]):
                self._calls.meter.add("sent", "bases", len(chunk))
                yield llm_pb2.UploadBaseRequest(chunk=chunk)


def as_held(base: torch.Tensor, dtype: DType) -> torch.Tensor:
    """x [tokens, hidden] as the service will have it: A has to see the same, for the gradient to be
    that of the model that is computed."""
    if dtype == FP32:
        return base
    spec = torch_codec.spec_of("base", base, dtype)
    return torch_codec.to_torch(dtype, spec.shape, torch_codec.pack(base, dtype)).float()


def _bases(base: Sequences, dtype: DType, fingerprint: str) -> list[Base]:
    found = []
    for x in base.values.split(list(base.lengths)):
        spec, data = torch_codec.spec_of("base", x, dtype), torch_codec.pack(x, dtype)
        found.append(Base(base_digest(fingerprint, spec, data), spec, data))
    return found


def _places(error: UnknownBase, samples: int) -> list[int]:
    """The samples whose bases are missing, as the error names them: "0-3,7"."""
    named = next((p.got for p in error.problems if p.field == "embeddings.bases"), "")
    spans = [span.partition("-") for span in named.split(",") if span]
    return [
        place
        for first, _, last in spans
        for place in range(int(first), int(last or first) + 1)
        if place < samples
    ]


def _gradient(form: llm_pb2.FactoredGradient, values: list[torch.Tensor]) -> FactoredGradient:
    """`values` lie in the order of `gradient_specs`."""
    rest = iter(values)
    left = next(rest)
    right = {Modality(m): next(rest) for m in sorted(form.right)}
    return FactoredGradient(left, right, {Modality(m): next(rest) for m in sorted(form.fisher)})


def _unseen(tokens: Sequence[NewToken], written: Counter[int]) -> list[NewToken]:
    """What is new of an answer that is written again; the rest is taken off what was `written`."""
    unseen = []
    for token in tokens:
        if written[token.sample]:
            written[token.sample] -= 1
        else:
            unseen.append(token)
    return unseen


def _together(parts: Sequence[FactoredGradient]) -> FactoredGradient:
    """Of a whole batch: dL/dU is a matter of each token, the others are sums over samples."""
    return FactoredGradient(
        joined([part.left for part in parts]),
        _added([part.right for part in parts]),
        _added([part.fisher for part in parts]),
    )


def _added(parts: Sequence[dict[Modality, torch.Tensor]]) -> dict[Modality, torch.Tensor]:
    return {m: reduce(torch.add, [part[m] for part in parts]) for m in parts[0]}
