"""The factored wire, seen from the client: what never changes is uploaded once, the rest is small.

Of a batch's vectors e = x + U W the service holds x, in pieces, a segment each: an image that is asked
about twice is uploaded once, as is a text that samples share. A step sends U = A x and W = s B^T and
gets dL/dU and dL/dW, from which autograd goes on to A and B. Exact, by the chain rule.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate, zip_longest
from typing import TypeVar

import torch

from fednano.client.losses import LogitsLoss, client_side_step, predicting_positions
from fednano.client.messages import Sent, low_rank_size, samples_of, unheard
from fednano.client.portions import Portion, cut, joined
from fednano.client.remote import RemoteLanguageModel, losses
from fednano.client.replicas import Replica
from fednano.models.factored import Factored, FactoredGradient, base_digest
from fednano.models.language_model import (
    LowRank,
    Modality,
    NewToken,
    Sampling,
    ScoreResult,
    StepResult,
)
from fednano.wire import codec, llm_pb2, torch_codec
from fednano.wire.errors import FedNanoError, UnknownBase, Unsupported
from fednano.wire.tensor_pb2 import INT8, DType, Header, TensorSpec

log = logging.getLogger(__name__)

T = TypeVar("T")
_ROUNDS = 2
"""How often a call uploads what it has uploaded before, and then sends everything itself."""
_WORTH_THREADS = 1 << 20
"""Numbers; to hash fewer takes a millisecond, as threads do to begin."""
_DENSE_SECONDS = 60.0
"""How long everything is sent after that: a service without room would be filled at every step."""


@dataclass(frozen=True)
class Base:
    """A segment's x. Its bytes are made when they are to travel: they do so once."""

    digest: bytes
    spec: TensorSpec
    values: torch.Tensor  # [tokens, hidden], `held`

    @property
    def size(self) -> int:
        return codec.spec_size(self.spec)

    def data(self) -> codec.Buffer:
        return torch_codec.pack(self.values, self.spec.dtype)


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

    def held(self, pieces: Sequence[torch.Tensor]) -> tuple[torch.Tensor, tuple[bytes, ...]]:
        """`held` by this service."""
        return held(pieces, self._remote.wire_dtype, self._remote.fingerprint)

    def step(
        self,
        sent: Factored,
        labels: torch.Tensor,
        weights: torch.Tensor,
        want_fisher: bool = False,
        digests: Sequence[bytes] = (),
        under_way: Callable[[], None] = unheard,
    ) -> FactoredStep:
        """Loss and gradient of sum_i weights[i] * loss_i. `sent.base` is `held`; the digests are made
        again where they are not given. `under_way` is told each time that a request has been sent."""

        def of(portion: Sent) -> FactoredStep:
            told = replace(portion, under_way=under_way)
            result, values = self._remote.stepped(told, labels, weights, want_fisher)
            return FactoredStep(*losses([result]), _gradient(result.gradient.factored, values))

        def densely() -> StepResult:
            under_way()
            return self._remote.step(sent.dense(), labels, weights)

        return self._stepped(sent, self._sent(sent, digests), of, densely, want_fisher)

    def client_side_step(
        self,
        sent: Factored,
        labels: torch.Tensor,
        weights: torch.Tensor,
        want_fisher: bool = False,
        digests: Sequence[bytes] = (),
        under_way: Callable[[], None] = unheard,
    ) -> FactoredStep:
        """The same as `step`, with the loss computed here: in two round trips for each portion."""
        lengths, passes = sent.lengths, self._remote.passes

        def of(portion: Sent) -> FactoredStep:
            tokens, samples = portion.portion.tokens, portion.portion.samples
            positions = predicting_positions(lengths[samples], labels[tokens])
            found = passes.forward(replace(portion, under_way=under_way), positions)
            loss = LogitsLoss.of(
                found.logits, positions, lengths[samples], labels[tokens], weights[samples]
            )
            gradient, values = passes.backward(
                found.activation, loss.gradient, lambda: portion, positions, want_fisher
            )
            back = _gradient(gradient.factored, values)
            return FactoredStep(loss.loss_sums, loss.token_counts, back)

        def densely() -> StepResult:
            under_way()
            return client_side_step(self._remote, sent.dense(), labels, weights)

        beside = self._remote.logits_sizes(lengths, labels)
        portions = self._sent(sent, digests, 0, beside)
        return self._stepped(sent, portions, of, densely, want_fisher)

    def _stepped(
        self,
        sent: Factored,
        portions: Iterator[Sent],
        of: Callable[[Sent], FactoredStep],
        densely: Callable[[], StepResult],
        want_fisher: bool,
    ) -> FactoredStep:
        """A step of all its portions, or by the dense wire. Nothing is packed before it is needed."""

        def by_factors() -> FactoredStep:
            found = [of(portion) for portion in portions]
            return FactoredStep(
                joined([part.loss_sums for part in found]),
                joined([part.token_counts for part in found]),
                _together([part.gradient for part in found]),
            )

        def by_vectors() -> FactoredStep:
            reply = densely()
            gradient = sent.gradient(reply.gradient, want_fisher)
            return FactoredStep(reply.loss_sums, reply.token_counts, gradient)

        return self._either(by_factors, by_vectors)

    def score(
        self, sent: Factored, labels: torch.Tensor, digests: Sequence[bytes] = ()
    ) -> ScoreResult:
        """Loss and teacher-forced hits, no gradient."""
        return self._either(
            lambda: self._remote.scored(self._sent(sent, digests), labels),
            lambda: self._remote.score(sent.dense(), labels),
        )

    def generate(
        self,
        sent: Factored,
        sampling: Sampling,
        text_adapter: LowRank | None = None,
        digests: Sequence[bytes] = (),
    ) -> Iterator[list[NewToken]]:
        """As LanguageModel.generate."""
        written: Counter[int] = Counter()  # by sample
        if time.monotonic() >= self._dense_until:
            portions = self._sent(sent, digests, low_rank_size(text_adapter))
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
                self._calls.sent(request)
                with self._calls.calling("DeleteBase", request.header) as options:
                    reply = replica.stub.DeleteBase(request, **options)
                self._calls.received(reply)
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

    def _sent(
        self, sent: Factored, digests: Sequence[bytes], beside: int = 0, more: Sequence[int] = ()
    ) -> Iterator[Sent]:
        """In portions that fit, of which each has every W; see `RemoteLanguageModel.sent`. There are
        `more` bytes of each sample."""
        dtype, rank = self._remote.wire_dtype, sent.left.shape[-1]
        bases, firsts = self._bases(sent, digests), [0, *accumulate(map(len, sent.segments))]
        sizes = [
            codec.byte_size(dtype, (length, rank)) + own
            for length, own in zip_longest(sent.lengths, more, fillvalue=0)
        ]
        beside += sum(codec.byte_size(dtype, w.shape) for w in sent.right.values())
        for portion in cut(sent.lengths, sizes, self._remote.card.limits, beside):
            first, last, _ = portion.samples.indices(len(sent.segments))
            yield self._portion(sent, portion, bases[firsts[first] : firsts[last]])

    def _bases(self, sent: Factored, digests: Sequence[bytes]) -> list[Base]:
        dtype, pieces = self._remote.wire_dtype, sent.base.split(list(sent.pieces))
        specs = [torch_codec.spec_of("base", x, dtype) for x in pieces]
        if not digests:
            digests = [
                base_digest(self._remote.fingerprint, spec, torch_codec.pack(x, dtype))
                for x, spec in zip(pieces, specs, strict=True)
            ]
        return [Base(*parts) for parts in zip(digests, specs, pieces, strict=True)]

    def _portion(self, sent: Factored, portion: Portion, bases: Sequence[Base]) -> Sent:
        """U, then each W by its modality's number; the bases by their digests."""
        dtype, left = self._remote.wire_dtype, sent.left[portion.tokens]
        segments = sent.segments[portion.samples]
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
        uploaded: set[bytes] = set()
        again = 0
        while again < _ROUNDS:
            try:
                return call()
            except UnknownBase as error:  # it may name but some of them
                missing = {bases[i].digest: bases[i] for i in _places(error, len(bases))}
            again += not missing.keys() - uploaded
            if missing:
                self._upload(replica, list(missing.values()))
            uploaded |= missing.keys()
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
        self._calls.received(reply)
        return int(reply.received)

    def _messages(
        self, header: Header, bases: Sequence[Base], skip: int = 0, asking: bool = False
    ) -> Iterator[llm_pb2.UploadBaseRequest]:
        """Heads and bytes, but for the first `skip` bytes; only heads to ask what is held."""
        for base in bases:
            offset = min(skip, base.size)
            skip -= offset
            if offset == base.size and base is not bases[-1]:
                continue
            head = llm_pb2.UploadBaseHead(
                header=header, digest=base.digest, values=base.spec, offset=offset
            )
            message = llm_pb2.UploadBaseRequest(head=head)
            self._calls.sent(message)
            yield message
            if asking:
                continue
            for chunk in codec.chunked([memoryview(base.data())[offset:]]):
                self._calls.meter.chunk("sent", "bases", len(chunk))
                yield llm_pb2.UploadBaseRequest(chunk=chunk)


def held(
    pieces: Sequence[torch.Tensor], dtype: DType, fingerprint: str
) -> tuple[torch.Tensor, tuple[bytes, ...]]:
    """Each segment's x [tokens, hidden] as the service will have it, end to end, and its digest: one go
    over them, in place of the copy that packing them is. A has to see what the service has, for the
    gradient to be that of the model that is computed."""
    base = torch.empty(sum(map(len, pieces)), pieces[0].shape[-1])

    def packed() -> Iterator[tuple[TensorSpec, codec.Buffer]]:
        for own, x in zip(pieces, base.split([len(own) for own in pieces]), strict=True):
            spec, data = torch_codec.spec_of("base", x, dtype), torch_codec.pack(own, dtype)
            x.copy_(torch_codec.to_torch(dtype, spec.shape, data))
            if dtype == INT8:  # an upload packs what is held, whose scales may be rounded once more
                data = torch_codec.pack(x, dtype)
            yield spec, data

    threads = torch.get_num_threads()
    if threads == 1 or base.numel() < _WORTH_THREADS:
        return base, tuple(base_digest(fingerprint, *own) for own in packed())
    with ThreadPoolExecutor(threads, "digest") as pool:
        coming: list[Future[bytes]] = []
        for own in packed():
            coming.append(pool.submit(base_digest, fingerprint, *own))
            if len(coming) > threads:
                coming[-1 - threads].result()  # so that few are held a second time
        return base, tuple(digest.result() for digest in coming)


def _places(error: UnknownBase, bases: int) -> list[int]:
    """Which bases are missing, as the error names them: "0-3,7"."""
    named = next((p.got for p in error.problems if p.field == "embeddings.bases"), "")
    spans = [span.partition("-") for span in named.split(",") if span]
    return [
        place
        for first, _, last in spans
        for place in range(int(first), int(last or first) + 1)
        if place < bases
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
