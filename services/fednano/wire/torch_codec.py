"""The torch half of the tensor codec: for the LLM service and the client only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fednano.wire import codec
from fednano.wire.errors import BadTensor
from fednano.wire.tensor_pb2 import BF16, FP16, FP32, INT8, DType, TensorSpec

_TORCH = {FP32: torch.float32, FP16: torch.float16, BF16: torch.bfloat16}
_WIRE = {dtype: number for number, dtype in _TORCH.items()}


def wire_dtype(dtype: torch.dtype) -> DType:
    """The wire's number for a torch floating dtype."""
    return _WIRE[dtype]


def to_torch(
    spec_dtype: DType, shape: Sequence[int], data: codec.Buffer, name: str = "tensor"
) -> torch.Tensor:
    """A tensor over the bytes of `data` (no copy for FP32, FP16 and BF16; INT8 gives float32)."""
    if spec_dtype not in _TORCH or not len(data):
        array = codec.unpack(spec_dtype, shape, data, name)
        return torch.from_numpy(array.copy())
    expected = codec.byte_size(spec_dtype, shape)
    if expected != len(data):
        raise BadTensor.of(
            name, f"{expected} bytes for {DType.Name(spec_dtype)} {list(shape)}", len(data)
        )
    writable = data if isinstance(data, memoryview) and not data.readonly else bytearray(data)
    return torch.frombuffer(writable, dtype=_TORCH[spec_dtype]).reshape(tuple(shape))


def pack(tensor: torch.Tensor, dtype: DType) -> codec.Buffer:
    """The wire bytes of a floating tensor as `dtype`."""
    if dtype == INT8:
        return codec.pack(tensor.detach().float().cpu().numpy(), INT8)
    if not tensor.numel():
        return b""
    plain = tensor.detach().to("cpu", _TORCH[dtype]).contiguous()
    return plain.flatten().view(torch.uint8).numpy().data


def spec_of(name: str, tensor: torch.Tensor, dtype: DType) -> TensorSpec:
    """Announces `tensor`, whose `pack`ed bytes will follow in chunks."""
    return TensorSpec(name=name, dtype=dtype, shape=tuple(tensor.shape))
