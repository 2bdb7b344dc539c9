"""Tensors to bytes and back, in numpy. Everything is checked before anything is built.

BF16 and INT8 have no numpy dtype: they decode to float32. The torch half is `wire.torch_codec`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fednano.wire.errors import BadTensor
from fednano.wire.tensor_pb2 import (
    BF16,
    FP16,
    FP32,
    INT8,
    INT32,
    INT64,
    DType,
    Tensor,
    TensorSpec,
)

Array = NDArray[np.generic]
Buffer = bytes | bytearray | memoryview

CHUNK_BYTES = 1 << 20
MAX_DIMENSIONS = 8
_MAX_VALUES = 1 << 48

_NUMPY: dict[DType, np.dtype[np.generic]] = {
    FP32: np.dtype("<f4"),
    FP16: np.dtype("<f2"),
    INT32: np.dtype("<i4"),
    INT64: np.dtype("<i8"),
}
_WIRE = {dtype: number for number, dtype in _NUMPY.items()}
_ITEM_BYTES = {FP32: 4, FP16: 2, BF16: 2, INT8: 1, INT32: 4, INT64: 8}
FLOATS = (FP32, FP16, BF16, INT8)
INTEGERS = (INT32, INT64)


def rows(shape: Sequence[int]) -> int:
    """How many rows (all dimensions but the last) a tensor has; each has one scale in INT8."""
    return math.prod(shape[:-1]) if shape else 1


def byte_size(dtype: DType, shape: Sequence[int]) -> int:
    """Bytes that a tensor takes on the wire.

    Raises BadTensor for an unknown dtype or an impossible shape.
    """
    if dtype not in _ITEM_BYTES:
        raise BadTensor.of("dtype", f"one of {', '.join(map(DType.Name, _ITEM_BYTES))}", dtype)
    if (
        len(shape) > MAX_DIMENSIONS
        or any(size < 0 for size in shape)
        or math.prod(max(size, 1) for size in shape) > _MAX_VALUES
    ):
        expected = f"at most {MAX_DIMENSIONS} dimensions of 0 or more and 2^48 values"
        raise BadTensor.of("shape", expected, list(shape))
    size = math.prod(shape) * _ITEM_BYTES[dtype]
    return size + 4 * rows(shape) if dtype == INT8 else size


def spec_size(spec: TensorSpec) -> int:
    """Bytes that follow in the chunks for `spec`."""
    return byte_size(spec.dtype, spec.shape)


def pack(array: Array, dtype: DType | None = None) -> bytes:
    """The wire bytes of `array` as `dtype` (default: its own).

    Raises BadTensor where INT8 or an integer type can't hold the values.
    """
    wanted = dtype if dtype is not None else natural_dtype(array)
    if wanted == BF16:
        return _to_bf16(array.astype("<f4", copy=False)).tobytes()
    if wanted == INT8:
        values, scales = _quantise(array.astype("<f4", copy=False))
        return values.tobytes() + scales.tobytes()
    return np.ascontiguousarray(array, _NUMPY[wanted]).tobytes()


def unpack(dtype: DType, shape: Sequence[int], data: Buffer, name: str = "tensor") -> Array:
    """The array in `data`: a read-only view where numpy has the dtype, else float32."""
    if byte_size(dtype, shape) != len(data):
        raise BadTensor.of(
            name,
            f"{byte_size(dtype, shape)} bytes for {DType.Name(dtype)} {list(shape)}",
            len(data),
        )
    if dtype == BF16:
        halves = np.frombuffer(data, "<u2").astype("<u4") << 16
        array: Array = halves.view("<f4").reshape(shape)
    elif dtype == INT8:
        array = _dequantise(data, shape)
    else:
        array = np.frombuffer(data, _NUMPY[dtype]).reshape(shape)
    array.flags.writeable = False
    return array


def natural_dtype(array: Array) -> DType:
    """The wire dtype of a numpy dtype."""
    number = _WIRE.get(array.dtype.newbyteorder("<"))
    if number is None:
        raise BadTensor.of("dtype", "float32, float16, int32 or int64", array.dtype)
    return number


def encode(array: Array, dtype: DType | None = None) -> Tensor:
    """A small tensor, whole in its message."""
    wanted = dtype if dtype is not None else natural_dtype(array)
    return Tensor(dtype=wanted, shape=array.shape, data=pack(array, wanted))


def decode(tensor: Tensor, name: str = "tensor") -> Array:
    """A read-only view of the message; copy before writing."""
    return unpack(tensor.dtype, tensor.shape, tensor.data, name)


def spec_of(name: str, array: Array, dtype: DType | None = None) -> TensorSpec:
    """Announces `array`, whose `pack`ed bytes will follow in chunks."""
    wanted = dtype if dtype is not None else natural_dtype(array)
    return TensorSpec(name=name, dtype=wanted, shape=array.shape)


def chunked(buffers: Iterable[Buffer]) -> Iterator[bytes]:
    """The buffers' bytes in pieces of at most 1 MiB, joined across their borders."""
    pending = bytearray()
    for buffer in buffers:
        view = memoryview(buffer)
        while len(view):
            room = CHUNK_BYTES - len(pending)
            pending += view[:room]
            view = view[room:]
            if len(pending) == CHUNK_BYTES:
                yield bytes(pending)
                pending = bytearray()
    if pending:
        yield bytes(pending)


class Payload:
    """Collects the chunks of a stream for the tensors that its first message announced.

    Raises BadTensor as soon as more arrives than announced, or than `limit` bytes are announced.
    """

    def __init__(self, specs: Sequence[TensorSpec], limit: int) -> None:
        self._specs = specs
        self._sizes = [spec_size(spec) for spec in specs]
        self._size = sum(self._sizes)
        if self._size > limit:
            raise BadTensor.of("payload", f"at most {limit} bytes", f"{self._size} bytes")
        self._bytes = bytearray()

    def feed(self, chunk: bytes) -> None:
        if len(self._bytes) + len(chunk) > self._size:
            got = f"at least {len(self._bytes) + len(chunk)}"
            raise BadTensor.of("payload", f"{self._size} bytes as announced", got)
        self._bytes += chunk

    def buffers(self) -> dict[str, memoryview]:
        """Each tensor's bytes by name, once everything has arrived."""
        if len(self._bytes) != self._size:
            raise BadTensor.of("payload", f"{self._size} bytes as announced", len(self._bytes))
        view, start, found = memoryview(self._bytes), 0, {}
        for spec, size in zip(self._specs, self._sizes, strict=True):
            if spec.name in found:
                raise BadTensor.of("payload", "each tensor once", f"{spec.name!r} twice")
            found[spec.name] = view[start : start + size]
            start += size
        return found

    def arrays(self) -> dict[str, Array]:
        """Each tensor by name, as numpy."""
        buffers = self.buffers()
        return {s.name: unpack(s.dtype, s.shape, buffers[s.name], s.name) for s in self._specs}


def _to_bf16(array: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = np.ascontiguousarray(array).view("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
    quiet = (bits >> 16) | 0x40  # NaN stays NaN where rounding would carry it away
    return np.where(np.isnan(array), quiet, rounded).astype("<u2")


def _quantise(array: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric, one scale per row: scale = max |row| / 127."""
    if not np.isfinite(array).all():
        raise BadTensor.of("values", "finite numbers for INT8", "NaN or infinity")
    table = array.reshape(rows(array.shape), -1) if array.size else array.reshape(0, 1)
    scales = (np.abs(table).max(axis=1) / 127).astype("<f4")
    divisor = np.where(scales > 0, scales, 1)[:, None]
    values = np.rint(table / divisor).clip(-127, 127).astype("<i1")
    if not array.size:
        scales = np.zeros(rows(array.shape), "<f4")
    return values, scales


def _dequantise(data: Buffer, shape: Sequence[int]) -> Array:
    count = math.prod(shape)
    values = np.frombuffer(data, "<i1", count)
    scales = np.frombuffer(data, "<f4", rows(shape), offset=count)
    if not count:
        return np.zeros(shape, "<f4")
    table: NDArray[np.float32] = values.reshape(rows(shape), -1).astype("<f4") * scales[:, None]
    return table.reshape(shape)
