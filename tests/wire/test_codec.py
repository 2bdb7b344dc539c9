"""The tensor codec: what goes in comes out, and what is wrong is refused before it is built."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fednano.wire import codec, torch_codec
from fednano.wire.errors import BadTensor, FedNanoError
from fednano.wire.tensor_pb2 import BF16, FP16, FP32, INT8, INT32, INT64, DType, Tensor, TensorSpec
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
plain = st.sampled_from(["<f4", "<f2", "<i4", "<i8"]).flatmap(
    lambda dtype: hnp.arrays(np.dtype(dtype), shapes)
)
floats = hnp.arrays(np.float32, shapes, elements=st.floats(-1e6, 1e6, width=32))


@given(plain)
def test_every_dtype_and_shape_comes_back_bit_for_bit(array: np.ndarray) -> None:
    again = codec.decode(codec.encode(array))
    assert again.dtype == array.dtype
    assert again.shape == array.shape
    assert again.tobytes() == array.tobytes()


@given(floats)
def test_bf16_is_torchs_bf16(array: np.ndarray) -> None:
    wanted = torch.from_numpy(array.copy()).bfloat16().float().numpy()
    np.testing.assert_array_equal(codec.decode(codec.encode(array, BF16)), wanted)


def test_bf16_keeps_nan_and_infinity() -> None:
    array = np.array([np.nan, np.inf, -np.inf, 3.4e38], np.float32)
    again = codec.decode(codec.encode(array, BF16))
    assert np.isnan(again[0])
    assert again[1] == np.inf
    assert again[2] == -np.inf


@given(floats)
def test_int8_is_within_half_a_step_of_each_row(array: np.ndarray) -> None:
    again = codec.decode(codec.encode(array, INT8))
    assert again.shape == array.shape
    if array.size:
        step = np.abs(array).max(axis=-1, keepdims=True) / 127 if array.ndim else abs(array) / 127
        assert (np.abs(again - array) <= step * 0.51 + 1e-30).all()


def test_int8_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(BadTensor, match="finite"):
        codec.encode(np.array([1.0, np.nan], np.float32), INT8)


@given(floats, st.sampled_from([FP32, FP16, BF16, INT8]))
def test_the_torch_half_speaks_the_same_bytes(array: np.ndarray, dtype: DType) -> None:
    with np.errstate(over="ignore"):
        mine = codec.pack(array, dtype)
    theirs = bytes(torch_codec.pack(torch.from_numpy(array.copy()), dtype))
    assert mine == theirs
    again = torch_codec.to_torch(dtype, array.shape, bytearray(theirs)).float().numpy()
    np.testing.assert_array_equal(again, codec.unpack(dtype, array.shape, mine).astype("<f4"))


@given(st.binary(max_size=64))
def test_arbitrary_bytes_never_crash_it(data: bytes) -> None:
    message = Tensor()
    try:
        message.ParseFromString(data)
    except Exception:  # protobuf's own; not what is tested here
        return
    try:
        codec.decode(message)
    except FedNanoError as error:
        assert error.problems


@given(
    st.integers(-3, 20),
    st.lists(st.integers(-(2**62), 2**62), max_size=10),
    st.binary(max_size=32),
)
def test_made_up_headers_are_refused_or_fit(dtype: int, shape: list[int], data: bytes) -> None:
    message = Tensor(shape=shape, data=data)
    message.dtype = dtype  # type: ignore[assignment]
    try:
        array = codec.decode(message)
    except BadTensor as error:
        assert error.problems[0].expected
    else:
        assert array.size * 1 <= len(data)


@pytest.mark.parametrize("shape", [[0, 2**62], [2**40, 0, 2**40], [1] * 9, [-1]])
def test_impossible_shapes_are_refused(shape: list[int]) -> None:
    with pytest.raises(BadTensor, match="shape: expected"):
        codec.decode(Tensor(dtype=FP32, shape=shape, data=b""))


def test_a_view_of_a_message_is_read_only() -> None:
    array = codec.decode(codec.encode(np.ones(3, np.float32)))
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 2


@given(st.lists(st.integers(0, 3_000_000), max_size=4))
def test_chunks_are_small_and_lose_nothing(sizes: list[int]) -> None:
    buffers = [bytes([n % 251]) * size for n, size in enumerate(sizes)]
    chunks = list(codec.chunked(buffers))
    assert all(0 < len(chunk) <= codec.CHUNK_BYTES for chunk in chunks)
    assert b"".join(chunks) == b"".join(buffers)


def test_a_payload_comes_back_by_name() -> None:
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((0, 4), np.int32)}
    payload = codec.Payload([codec.spec_of(n, t) for n, t in tensors.items()], limit=1000)
    for chunk in codec.chunked([codec.pack(t) for t in tensors.values()]):
        payload.feed(chunk)
    for name, array in payload.arrays().items():
        np.testing.assert_array_equal(array, tensors[name])


@pytest.mark.parametrize(
    ("shape", "sent", "limit", "words"),
    [
        ((4,), 12, 100, "expected 16 bytes as announced, got 12"),
        ((4,), 20, 100, "expected 16 bytes as announced, got at least 20"),
        ((1 << 40,), 0, 100, "expected at most 100 bytes"),
    ],
)
def test_a_payload_of_another_size_is_refused(
    shape: tuple[int, ...], sent: int, limit: int, words: str
) -> None:
    with pytest.raises(BadTensor, match=words):
        payload = codec.Payload([TensorSpec(name="x", dtype=FP32, shape=shape)], limit)
        payload.feed(bytes(sent))
        payload.buffers()


def test_a_name_may_be_announced_once_only() -> None:
    spec = TensorSpec(name="x", dtype=INT32, shape=[1])
    payload = codec.Payload([spec, spec], 100)
    payload.feed(bytes(8))
    with pytest.raises(BadTensor, match="'x' twice"):
        payload.buffers()


def test_other_numpy_dtypes_are_refused() -> None:
    with pytest.raises(BadTensor, match="got float64"):
        codec.encode(np.zeros(2))
    assert codec.natural_dtype(np.zeros(1, np.int64)) == INT64
