"""What the client says to the LLM service, in the words of the contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from fednano.client.portions import WHOLE, Portion
from fednano.client.replicas import Replica
from fednano.models.language_model import LowRank, Sampling, Segment, Sequences
from fednano.wire import codec, llm_pb2, torch_codec
from fednano.wire.tensor_pb2 import FP32, DType, Tensor, TensorSpec

T = TypeVar("T")


class Around(Protocol):
    """Makes a call at a replica: as it is, or again once what the replica lacks has been sent."""

    def __call__(self, replica: Replica, call: Callable[[], T]) -> T: ...


def _plainly(replica: Replica, call: Callable[[], T]) -> T:
    return call()


def unheard() -> None:
    """Where nobody waits for a request to be under way."""


@dataclass(frozen=True)
class Sent:
    """Embeddings as they travel in one request: the first message's part, and the bytes that follow."""

    embeddings: llm_pb2.Embeddings
    body: list[codec.Buffer]
    portion: Portion = WHOLE
    """Of a batch: which part of it these are."""
    around: Around = _plainly
    under_way: Callable[[], None] = unheard
    """Told by gRPC's thread, at each try, once the last of it has been handed over."""


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


def sampling_of(sampling: Sampling, seed: int) -> llm_pb2.Sampling:
    return llm_pb2.Sampling(
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=seed,
        stop_ids=sampling.stop_ids,
    )


def low_rank(adapter: LowRank) -> llm_pb2.LowRank:
    """A text adapter, whose tensors' bytes follow those of the embeddings."""
    return llm_pb2.LowRank(
        down=torch_codec.spec_of("down", adapter.down, FP32),
        up=torch_codec.spec_of("up", adapter.up, FP32),
        scale=adapter.scale,
    )


def low_rank_size(adapter: LowRank | None) -> int:
    """Those bytes."""
    shapes = (adapter.down.shape, adapter.up.shape) if adapter else ()
    return sum(codec.byte_size(FP32, shape) for shape in shapes)


def integers(tensor: torch.Tensor) -> Tensor:
    return codec.encode(tensor.to(torch.int32).numpy())


def tensor(message: Tensor) -> torch.Tensor:
    return torch.from_numpy(codec.decode(message).copy())
