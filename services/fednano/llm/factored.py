"""Embeddings in factored form, as a request announces them: the bases are held here, U and W follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fednano.llm import requests
from fednano.llm.bases import Base, BaseStore, Owner
from fednano.llm.exchange import Packed
from fednano.llm.requests import Layout, Limits, Received
from fednano.models.factored import Factored, FactoredGradient, fisher_dtype
from fednano.models.language_model import Modality
from fednano.wire import llm_pb2
from fednano.wire.errors import BadTensor, InvalidRequest, Unsupported
from fednano.wire.tensor_pb2 import DType, TensorSpec

PackedGradient = tuple[llm_pb2.Gradient, list[Packed]]


@dataclass(frozen=True)
class Factors(Layout):
    """U and W, whose values follow in chunks: U first, then each W by its modality's number."""

    bases: tuple[Base, ...]  # end to end
    left: TensorSpec  # U [tokens, rank]
    right: dict[Modality, TensorSpec]  # W [rank, hidden]
    device: torch.device

    @property
    def specs(self) -> list[TensorSpec]:
        """In the order in which their bytes come."""
        return [self.left, *self.right.values()]

    def read(self, data: Sequence[memoryview]) -> Received:
        """x + U W, once the bytes have come. Raises BadTensor for NaN and infinity, or Busy."""
        left = requests.floats("embeddings.left", self.left, data[0])
        right = {
            modality: requests.floats(f"embeddings.right[{int(modality)}]", spec, buffer)
            for (modality, spec), buffer in zip(self.right.items(), data[1:], strict=False)
        }
        with requests.room_on_device():
            there = {
                id(base): base.tensor().to(self.device, non_blocking=True)
                for base in {id(base): base for base in self.bases}.values()
            }
            x = torch.cat([there[id(base)] for base in self.bases])
            factored = Factored(x, left, right, self.segments).to(self.device)
            return Received(factored.dense(), factored)


def announced(
    message: llm_pb2.Embeddings,
    limits: Limits,
    store: BaseStore,
    owner: Owner,
    device: torch.device,
) -> Factors:
    """The first message's half; reads files. Raises UnknownBase where `owner` has no such base here."""
    found, form = requests.layout(message, limits), message.factored
    if len(form.bases) > found.tokens:
        expected = f"at most {found.tokens}, of a token or more each"
        raise InvalidRequest.of("embeddings.bases", expected, len(form.bases))
    rank = form.left.shape[-1] if form.left.shape else 0
    if not 1 <= rank <= limits.hidden:
        raise InvalidRequest.of("embeddings.left", f"a rank of 1 to {limits.hidden}", rank)
    requests.check_spec("embeddings.left", form.left, (found.tokens, rank))
    right = {_modality(number): form.right[number] for number in sorted(form.right)}
    for modality, spec in right.items():
        requests.check_spec(f"embeddings.right[{int(modality)}]", spec, (rank, limits.hidden))
    bases = store.get(owner, form.bases, lambda tokens: _check_lengths(tokens, found))
    return Factors(found.segments, tuple(bases), form.left, right, device)


def _check_lengths(bases: Sequence[int], found: Layout) -> None:
    """A sample's tokens are those of one base, or of several end to end."""
    rest, samples = 0, iter(found.lengths)
    for place, tokens in enumerate(bases):
        rest = rest or next(samples, 0)
        if tokens > rest:
            expected = f"at most {rest} tokens, what is left of its sample"
            raise InvalidRequest.of(f"embeddings.bases[{place}]", expected, tokens)
        rest -= tokens
    if sum(bases) < found.tokens:
        raise InvalidRequest.of("embeddings.bases", f"{found.tokens} tokens in all", sum(bases))


def _modality(number: int) -> Modality:
    if number not in (Modality.TEXT, Modality.IMAGE):
        raise InvalidRequest.of("embeddings.right", "TEXT and IMAGE", number)
    return Modality(number)


def packed_gradient(
    origin: Factored | None, gradient: torch.Tensor, dtype: DType, want_fisher: bool
) -> PackedGradient:
    """The gradient in the form in which the embeddings came. Raises InvalidRequest, as `packed`, and
    Unsupported for a Fisher part of the dense form."""
    if origin is not None:
        return _factored_gradient(origin.gradient(gradient, want_fisher), dtype)
    check_fisher(want_fisher, factored=False)
    body = packed("gradient", gradient, dtype)
    return llm_pb2.Gradient(dense=llm_pb2.DenseForm(values=body.spec)), [body]


def check_fisher(wanted: bool, factored: bool) -> None:
    if wanted and not factored:
        raise Unsupported("want_fisher belongs to the factored form; leave it out")


def packed(name: str, gradient: torch.Tensor, dtype: DType) -> Packed:
    """Raises InvalidRequest where the caller's numbers left no finite gradient as `dtype`."""
    try:
        return Packed.of(name, gradient, dtype)
    except BadTensor:  # INT8 can't hold NaN or infinity
        raise InvalidRequest.of(
            "embeddings", "values that give a finite gradient", "NaN or infinity"
        ) from None


def _factored_gradient(found: FactoredGradient, dtype: DType) -> PackedGradient:
    left = packed("left", found.left, dtype)
    right = {m: packed(f"right.{m:d}", w, dtype) for m, w in found.right.items()}
    fisher = {m: packed(f"fisher.{m:d}", f, fisher_dtype(dtype)) for m, f in found.fisher.items()}
    message = llm_pb2.FactoredGradient(left=left.spec)
    for parts, specs in ((right, message.right), (fisher, message.fisher)):
        for modality, part in parts.items():
            specs[int(modality)].CopyFrom(part.spec)
    bodies = [left, *right.values(), *fisher.values()]
    return llm_pb2.Gradient(factored=message), bodies
