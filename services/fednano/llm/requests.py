"""From messages to what the engine takes: everything that a caller sent is checked here.

Each function raises InvalidRequest or BadTensor with the field, what was expected and what came.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from fednano.models.factored import Factored
from fednano.models.language_model import (
    IGNORED,
    LowRank,
    Modality,
    Sampling,
    Segment,
    Sequences,
)
from fednano.wire import codec, llm_pb2, torch_codec
from fednano.wire.errors import BadTensor, Busy, InvalidRequest, Unsupported
from fednano.wire.tensor_pb2 import BF16, FP32, INT8, DType, Tensor, TensorSpec

if TYPE_CHECKING:
    from fednano.llm.factored import Factors

Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]
_MODALITIES = frozenset(int(modality) for modality in Modality)


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and the model's own sizes."""

    hidden: int
    vocabulary: int  # width of the logits
    table_rows: int  # of the embedding table
    tokens_per_sample: int
    tokens_per_request: int  # each sample counted as long as the longest
    samples_per_request: int
    new_tokens: int
    message_bytes: int  # of one request or one reply


@dataclass(frozen=True)
class Received:
    """Embeddings, whole."""

    sequences: Sequences
    factored: Factored | None = None
    """What the sequences were made of, and what their gradient goes back to."""


@dataclass(frozen=True)
class Layout:
    """Which tokens embeddings consist of, in whatever form they come."""

    segments: tuple[tuple[Segment, ...], ...]

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [sum(s.length for s in sample) for sample in self.segments]

    @cached_property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def starts(self) -> list[int]:
        """Each sample's first token, as an index into the packed tokens."""
        return [0, *accumulate(self.lengths)][:-1]


@dataclass(frozen=True)
class Announced(Layout):
    """Embeddings whose values follow in chunks."""

    spec: TensorSpec
    place: Callable[[], torch.device]  # where they go, asked when they have come

    @property
    def specs(self) -> list[TensorSpec]:
        """In the order in which their bytes come."""
        return [self.spec]

    def read(self, data: Sequence[memoryview]) -> Received:
        """The whole, from the buffers of `specs`. Raises BadTensor, or Busy."""
        values = floats("embeddings", self.spec, data[0])
        with room_on_device():
            return Received(Sequences(values.to(self.place()), self.segments))


def announced(
    message: llm_pb2.Embeddings, limits: Limits, place: Callable[[], torch.device]
) -> Announced:
    """The first message's half of the embeddings, which must be dense."""
    found, spec = layout(message, limits), message.dense.values
    check_spec("embeddings", spec, (found.tokens, limits.hidden))
    return Announced(found.segments, spec, place)


@contextmanager
def room_on_device() -> Iterator[None]:
    """Raises Busy where there is none for a request."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise Busy("the device has no memory for this; send less, or try later") from error


def layout(message: llm_pb2.Embeddings, limits: Limits) -> Layout:
    """The samples and their segments."""
    _check_form(message)
    if not 1 <= len(message.samples) <= limits.samples_per_request:
        raise InvalidRequest.of(
            "embeddings.samples", f"1 to {limits.samples_per_request}", len(message.samples)
        )
    segments = tuple(
        _segments(f"embeddings.samples[{i}]", sample, limits)
        for i, sample in enumerate(message.samples)
    )
    found = Layout(segments)
    lengths = found.lengths
    padded = max(lengths) * len(lengths)
    if padded > limits.tokens_per_request:
        raise InvalidRequest.of(
            "embeddings.samples",
            f"at most {limits.tokens_per_request} tokens with all samples padded to the longest",
            f"{len(lengths)} samples of up to {max(lengths)} tokens",
        )
    return found


def _check_form(message: llm_pb2.Embeddings) -> None:
    if message.WhichOneof("form") is None:
        raise InvalidRequest.of("embeddings.form", "dense", "nothing")
    for field in ("position_ids", "token_types"):
        if message.HasField(field):
            raise Unsupported(f"embeddings.{field} is not offered by this service; leave it out")
    if message.deep_features:
        raise Unsupported("embeddings.deep_features is not offered by this service; leave it out")


def _segments(field: str, sample: llm_pb2.Sample, limits: Limits) -> tuple[Segment, ...]:
    """A sample's segments, in order, without gap or overlap."""
    found, end = [], 0
    for i, segment in enumerate(sample.segments):
        where = f"{field}.segments[{i}]"
        if segment.modality not in _MODALITIES:
            raise InvalidRequest.of(f"{where}.modality", "RAW, TEXT or IMAGE", segment.modality)
        if segment.start != end:
            raise InvalidRequest.of(f"{where}.start", f"{end}, where the last ended", segment.start)
        if segment.length < 1:
            raise InvalidRequest.of(f"{where}.length", "1 or more", segment.length)
        found.append(Segment(Modality(segment.modality), segment.start, segment.length))
        end += segment.length
    if not 1 <= end <= limits.tokens_per_sample:
        raise InvalidRequest.of(field, f"1 to {limits.tokens_per_sample} tokens", end)
    return tuple(found)


@dataclass(frozen=True)
class LogitsGradient:
    """What Backward starts from, and what the activation is computed from where it is gone."""

    spec: TensorSpec  # [wanted, vocabulary]
    embeddings: Announced | Factors | None
    positions: torch.Tensor | None

    @property
    def specs(self) -> list[TensorSpec]:
        """In the order in which their bytes come."""
        return [self.spec, *(self.embeddings.specs if self.embeddings else [])]

    def read(self, data: Sequence[memoryview]) -> tuple[torch.Tensor, Received | None]:
        """The gradient and, where they were sent again, the embeddings. Raises BadTensor."""
        gradient = floats("logits_gradient", self.spec, data[0])
        return gradient, self.embeddings.read(data[1:]) if self.embeddings else None


def logits_gradient(
    head: llm_pb2.BackwardHead, embeddings: Announced | Factors | None, limits: Limits
) -> LogitsGradient:
    """The first message of Backward; `embeddings` are those that it announces."""
    spec = head.logits_gradient
    if embeddings is None:
        if not head.activation:
            raise InvalidRequest.of("activation", "a name, or embeddings", "neither")
        wanted = max(1, spec.shape[0]) if spec.shape else 1
        check_spec("logits_gradient", spec, (wanted, limits.vocabulary))
        return LogitsGradient(spec, None, None)
    places = positions(head.positions, embeddings.tokens, limits)
    check_spec("logits_gradient", spec, (len(places), limits.vocabulary))
    return LogitsGradient(spec, embeddings, places)


def labels(message: Tensor, embeddings: Layout, limits: Limits) -> torch.Tensor:
    """[tokens] int64; somewhere there is something to predict."""
    values = integers("labels", message, embeddings.tokens)
    bad = (values != IGNORED) & ((values < 0) | (values >= limits.vocabulary))
    if bad.any():
        expected = f"{IGNORED} or 0 to {limits.vocabulary - 1}"
        raise InvalidRequest.of("labels", expected, _first(values, bad))
    labelled = values != IGNORED
    labelled[embeddings.starts] = False
    if not labelled.any():
        expected = "at least one labelled token after the first of its sample"
        raise InvalidRequest.of("labels", expected, "none")
    return torch.from_numpy(values)


def weights(message: Tensor, samples: int) -> torch.Tensor:
    """[samples] float32."""
    return small_floats("weights", message, (samples,))


def positions(message: Tensor, tokens: int, limits: Limits) -> torch.Tensor:
    """[wanted] int64, indices into the packed tokens."""
    values = integers("positions", message)
    bad = (values < 0) | (values >= tokens)
    if bad.any():
        raise InvalidRequest.of("positions", f"0 to {tokens - 1}", _first(values, bad))
    most = limits.message_bytes // (4 * limits.vocabulary)
    if not 1 <= len(values) <= most:
        expected = f"1 to {most}, so that the logits fit in a reply"
        raise InvalidRequest.of("positions", expected, len(values))
    return torch.from_numpy(values)


def ids(message: Tensor, limits: Limits) -> torch.Tensor:
    """[tokens] int64, rows of the embedding table."""
    values = integers("ids", message)
    if not 1 <= len(values) <= limits.tokens_per_request:
        raise InvalidRequest.of("ids", f"1 to {limits.tokens_per_request}", len(values))
    bad = (values < 0) | (values >= limits.table_rows)
    if bad.any():
        raise InvalidRequest.of("ids", f"0 to {limits.table_rows - 1}", _first(values, bad))
    return torch.from_numpy(values)


def sampling(message: llm_pb2.Sampling, limits: Limits) -> Sampling:
    if not 1 <= message.max_new_tokens <= limits.new_tokens:
        raise InvalidRequest.of(
            "sampling.max_new_tokens", f"1 to {limits.new_tokens}", message.max_new_tokens
        )
    if not (math.isfinite(message.temperature) and message.temperature >= 0):
        raise InvalidRequest.of("sampling.temperature", "0 or more", message.temperature)
    if not 0 <= message.top_p <= 1:
        raise InvalidRequest.of("sampling.top_p", "0 to 1", message.top_p)
    for token in message.stop_ids:
        if not 0 <= token < limits.vocabulary:
            raise InvalidRequest.of("sampling.stop_ids", f"0 to {limits.vocabulary - 1}", token)
    return Sampling(
        max_new_tokens=message.max_new_tokens,
        temperature=message.temperature,
        top_p=message.top_p or 1.0,
        seed=message.seed,
        stop_ids=tuple(message.stop_ids),
    )


@dataclass(frozen=True)
class Prompt:
    """What Generate starts from: embeddings and, where there is one, the text adapter."""

    embeddings: Announced | Factors
    adapter: llm_pb2.LowRank | None

    @property
    def specs(self) -> list[TensorSpec]:
        """In the order in which their bytes come."""
        more = [self.adapter.down, self.adapter.up] if self.adapter else []
        return [*self.embeddings.specs, *more]

    def read(self, data: Sequence[memoryview]) -> tuple[Sequences, LowRank | None]:
        """Raises BadTensor."""
        sequences = self.embeddings.read(data).sequences
        if self.adapter is None:
            return sequences, None
        down = floats("text_adapter.down", self.adapter.down, data[-2])
        up = floats("text_adapter.up", self.adapter.up, data[-1])
        return sequences, LowRank(down, up, self.adapter.scale)


def prompt(head: llm_pb2.GenerateHead, embeddings: Announced | Factors, limits: Limits) -> Prompt:
    """The first message of Generate; the adapter is A [rank, hidden], B [hidden, rank]."""
    if not head.HasField("text_adapter"):
        return Prompt(embeddings, None)
    adapter = head.text_adapter
    rank = adapter.down.shape[0] if adapter.down.shape else 0
    if not 1 <= rank <= limits.hidden:
        raise InvalidRequest.of("text_adapter.down", f"a rank of 1 to {limits.hidden}", rank)
    if not math.isfinite(adapter.scale):
        raise InvalidRequest.of("text_adapter.scale", "a finite number", adapter.scale)
    check_spec("text_adapter.down", adapter.down, (rank, limits.hidden))
    check_spec("text_adapter.up", adapter.up, (limits.hidden, rank))
    return Prompt(embeddings, adapter)


def reply_dtype(field: str, dtype: DType) -> DType:
    """The dtype that the caller wants; FP32 where it doesn't say."""
    if not dtype:
        return FP32
    _check_float(field, dtype)
    return dtype


def check_spec(field: str, spec: TensorSpec, shape: Sequence[int]) -> None:
    """A floating tensor of this shape."""
    _check_float(f"{field}.dtype", spec.dtype)
    if tuple(spec.shape) != tuple(shape):
        raise BadTensor.of(field, list(shape), list(spec.shape))


def floats(field: str, spec: TensorSpec, data: codec.Buffer) -> torch.Tensor:
    """The values of a checked spec. Raises BadTensor for NaN and infinity."""
    values = torch_codec.to_torch(spec.dtype, spec.shape, data, field)
    bad = _not_finite(spec, data)
    if bad.any():
        row = int(bad.argmax()) // (1 if spec.dtype == INT8 else max(1, spec.shape[-1]))
        raise BadTensor.of(field, "finite numbers", f"NaN or infinity in row {row}")
    return values


def small_floats(field: str, message: Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A floating tensor that came whole in its message, as float32."""
    spec = TensorSpec(name=field, dtype=message.dtype, shape=message.shape)
    check_spec(field, spec, shape)
    return floats(field, spec, message.data).float()


def integers(field: str, message: Tensor, length: int | None = None) -> Integers:
    """[length] int64."""
    if message.dtype not in codec.INTEGERS:
        raise BadTensor.of(f"{field}.dtype", "INT32 or INT64", _name(message.dtype))
    if len(message.shape) != 1 or length not in (None, message.shape[0]):
        raise BadTensor.of(field, [length or "any"], list(message.shape))
    return codec.decode(message, field).astype(np.int64)


def _check_float(field: str, dtype: DType) -> None:
    if dtype not in codec.FLOATS:
        raise BadTensor.of(field, "FP32, FP16, BF16 or INT8", _name(dtype))


def _name(dtype: DType) -> str:
    if not dtype:
        return "nothing"
    return DType.Name(dtype) if dtype in DType.values() else str(dtype)


def _not_finite(spec: TensorSpec, data: codec.Buffer) -> Flags:
    """By element; by row for INT8, where only the scales can be other than finite.

    In numpy, as torch would start threads of its own for each of ours.
    """
    flags: Flags
    if spec.dtype == INT8:
        flags = ~np.isfinite(np.frombuffer(data, "<f4", offset=math.prod(spec.shape)))
    elif spec.dtype == BF16:
        flags = (np.frombuffer(data, "<u2") & 0x7F80) == 0x7F80
    else:
        flags = ~np.isfinite(np.frombuffer(data, "<f4" if spec.dtype == FP32 else "<f2"))
    return flags


def _first(values: Integers, bad: Flags) -> str:
    index = int(bad.argmax())
    return f"{values[index]} at index {index}"
