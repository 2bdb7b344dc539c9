"""Bytes that a client sends and receives, from the messages that it would: they are made as the client
and the services make them, with payloads that are announced and never allocated.

Counted are messages and payloads, as the client's meter counts them. The frames of gRPC, HTTP/2 and
TLS around them are not.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from fednano.models.factored import fisher_dtype
from fednano.models.language_model import Modality, Segment
from fednano.wire import codec, llm_pb2
from fednano.wire import coordinator_pb2 as pb
from fednano.wire.headers import make_header
from fednano.wire.tensor_pb2 import FP32, INT32, DType, Header, Tensor, TensorSpec

Shapes = Mapping[str, tuple[int, ...]]
"""Tensors that are exchanged every round, by name."""
_DIGEST = "0" * 64  # SHA-256 in hexadecimal


@dataclass(frozen=True)
class Traffic:
    """Bytes of one client, by the kinds of the ledger."""

    sent: Mapping[str, int] = field(default_factory=dict)
    received: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(_sum(self.sent, other.sent), _sum(self.received, other.received))

    def __mul__(self, times: int) -> Traffic:
        sent, received = ({k: n * times for k, n in a.items()} for a in (self.sent, self.received))
        return Traffic(sent, received)

    @property
    def bytes_sent(self) -> int:
        return sum(self.sent.values())

    @property
    def bytes_received(self) -> int:
        return sum(self.received.values())

    @property
    def total(self) -> int:
        """Both directions."""
        return self.bytes_sent + self.bytes_received


@dataclass(frozen=True)
class Step:
    """What one step of training is made of; its samples are all alike."""

    samples: int
    segments: tuple[Segment, ...]  # of each sample
    hidden: int
    rank: int
    modalities: frozenset[Modality]  # that have an adapter
    dtype: DType

    @property
    def length(self) -> int:
        """Tokens of one sample."""
        return sum(s.length for s in self.segments)

    @property
    def tokens(self) -> int:
        return self.samples * self.length

    def dense(self) -> Traffic:
        """Embeddings there, their gradient back."""
        values = self._spec("embeddings", self.tokens, self.hidden)
        gradient = self._spec("gradient", self.tokens, self.hidden)
        return self._traffic(
            llm_pb2.Embeddings(samples=self._samples(), dense=llm_pb2.DenseForm(values=values)),
            [values],
            llm_pb2.Gradient(dense=llm_pb2.DenseForm(values=gradient)),
            [gradient],
        )

    def factored(self, want_fisher: bool = False) -> Traffic:
        """U and W there, their gradients back; bases are at the service already."""
        left = self._spec("left", self.tokens, self.rank)
        right = {m: self._spec(f"right.{m}", self.rank, self.hidden) for m in self._adapted()}
        bases = [bytes.fromhex(_DIGEST)] * (self.samples * len(self.segments))
        form = llm_pb2.FactoredForm(bases=bases, left=left, right=right)
        squared = fisher_dtype(self.dtype)
        fisher = {
            m: TensorSpec(name=f"fisher.{m}", dtype=squared, shape=(self.rank, self.hidden))
            for m in (self._adapted() if want_fisher else ())
        }
        gradient = llm_pb2.FactoredGradient(left=left, right=right, fisher=fisher)
        return self._traffic(
            llm_pb2.Embeddings(samples=self._samples(), factored=form),
            [left, *right.values()],
            llm_pb2.Gradient(factored=gradient),
            [left, *right.values(), *fisher.values()],
            want_fisher,
        )

    def first(self) -> Traffic:
        """What a batch costs once more than any later time: its bases, no two of them alike, and a
        request that is made twice because the first one only hears which bases are missing."""
        upload = sum((self._upload(s.length) for s in self.segments), Traffic()) * self.samples
        reply = llm_pb2.UploadBaseReply(received=upload.sent["bases"]).ByteSize()
        return upload + Traffic(self.factored().sent, {"control": reply})

    def _upload(self, tokens: int) -> Traffic:
        """Of one base."""
        base = self._spec("base", tokens, self.hidden)
        head = llm_pb2.UploadBaseHead(header=_header(), digest=bytes.fromhex(_DIGEST), values=base)
        message = llm_pb2.UploadBaseRequest(head=head).ByteSize()
        return Traffic({"bases": codec.spec_size(base), "control": message})

    def _traffic(
        self,
        embeddings: llm_pb2.Embeddings,
        there: Iterable[TensorSpec],
        gradient: llm_pb2.Gradient,
        back: Iterable[TensorSpec],
        want_fisher: bool = False,
    ) -> Traffic:
        head = llm_pb2.ForwardBackwardHead(
            header=_header(),
            embeddings=embeddings,
            labels=_tensor(INT32, self.tokens),
            weights=_tensor(FP32, self.samples),
            want_fisher=want_fisher,
            gradient_dtype=self.dtype,
        )
        result = llm_pb2.ForwardBackwardResult(
            loss_sums=_tensor(FP32, self.samples),
            token_counts=_tensor(INT32, self.samples),
            gradient=gradient,
            spent=llm_pb2.Spent(queue_seconds=1, compute_seconds=1),
        )
        request = llm_pb2.ForwardBackwardRequest(head=head).ByteSize()
        reply = llm_pb2.ForwardBackwardReply(result=result).ByteSize()
        return Traffic(
            {"embeddings": _payload(there), "control": request},
            {"gradients": _payload(back), "control": reply},
        )

    def _adapted(self) -> list[int]:
        """Modalities that have both an adapter and tokens."""
        return sorted(self.modalities & {s.modality for s in self.segments})

    def _samples(self) -> list[llm_pb2.Sample]:
        segments = [
            llm_pb2.Segment(
                modality=llm_pb2.Modality.Name(s.modality), start=s.start, length=s.length
            )
            for s in self.segments
        ]
        return [llm_pb2.Sample(segments=segments)] * self.samples

    def _spec(self, name: str, rows: int, columns: int) -> TensorSpec:
        return TensorSpec(name=name, dtype=self.dtype, shape=(rows, columns))


@dataclass(frozen=True)
class Epoch:
    """One pass over a client's samples, the last batch being what is left."""

    batches: tuple[tuple[Step, int], ...]  # and how many there are of each

    @classmethod
    def of(cls, step: Step, samples: int) -> Epoch:
        full, rest = divmod(samples, step.samples)
        batches = [(step, full), (replace(step, samples=rest), 1 if rest else 0)]
        return cls(tuple((batch, count) for batch, count in batches if count))

    def dense(self) -> Traffic:
        return sum((b.dense() * n for b, n in self.batches), Traffic())

    def factored(self, want_fisher: bool = False) -> Traffic:
        return sum((b.factored(want_fisher) * n for b, n in self.batches), Traffic())

    def first(self) -> Traffic:
        return sum((b.first() * n for b, n in self.batches), Traffic())


def exchange(shapes: Shapes, fisher: bool) -> Traffic:
    """One round with the coordinator: the adapter fetched; the tuned one submitted, with its Fisher
    where one is wanted. Everything in fp32."""
    tensors = [TensorSpec(name=n, dtype=FP32, shape=shapes[n]) for n in sorted(shapes)]
    squares = [TensorSpec(name=f"fisher.{t.name}", dtype=FP32, shape=t.shape) for t in tensors]
    auxiliary = squares if fisher else []
    ask = pb.GetAdapterRequest(header=_header(""), run="run", digest=_DIGEST)
    head = pb.AdapterHead(tensors=tensors, scale=1, digest=_DIGEST, round=1)
    submit = pb.SubmitHead(
        header=_header(""),
        base=_DIGEST,
        tensors=tensors,
        auxiliary=auxiliary,
        digest=_DIGEST,
        samples=1 << 10,
        metrics={"train_loss": 1},
    )
    reply = pb.SubmitReply(result=pb.SubmitReply.ACCEPTED)
    return Traffic(
        {
            "adapters": _payload([*tensors, *auxiliary]),
            "control": ask.ByteSize() + submit.ByteSize(),
        },
        {"adapters": _payload(tensors), "control": head.ByteSize() + reply.ByteSize()},
    )


def _header(fingerprint: str = _DIGEST) -> Header:
    """As a member's in a run; names of people's own choice make it a few bytes longer."""
    session = uuid.uuid4().hex
    return make_header(
        "client", run="run", session=session, round_number=1, attempt=1, fingerprint=fingerprint
    )


def _tensor(dtype: DType, size: int) -> Tensor:
    return Tensor(dtype=dtype, shape=(size,), data=bytes(codec.byte_size(dtype, (size,))))


def _payload(specs: Iterable[TensorSpec]) -> int:
    return sum(map(codec.spec_size, specs))


def _sum(left: Mapping[str, int], right: Mapping[str, int]) -> dict[str, int]:
    return {kind: left.get(kind, 0) + right.get(kind, 0) for kind in {**left, **right}}
