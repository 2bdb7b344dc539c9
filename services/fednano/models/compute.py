"""How the frozen LLM computes: attention's kernel, the weights' width, what is kept for the way back.

All of it is other people's: transformers chooses attention, torchao and bitsandbytes make weights
narrow, torch computes layers again.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from shutil import which
from typing import Any, cast

import torch

from fednano.models.choices import Attention, Checkpointing, Weights
from fednano.models.parallel import Spread
from fednano.wire.errors import InvalidRequest

_LIBRARIES = {"int8": "torchao", "nf4": "bitsandbytes"}


@dataclass(frozen=True)
class Compute:
    """As it is made: what the family does by itself, with the weights that the checkpoint holds."""

    attention: Attention = "auto"
    weights: Weights = "auto"
    checkpointing: Checkpointing = "auto"
    compile: bool = False

    def check(self, spread: Spread) -> None:
        """Raises InvalidRequest where it can't be had, or not beside `spread`."""
        _check_spread(self, spread)
        if self.weights != "auto":
            library = _LIBRARIES[self.weights]
            if find_spec(library) is None:
                expected = f"{library} beside {self.weights}: pip install 'fednano[quantised]'"
                raise InvalidRequest.of("weights", expected, f"no {library}")
            if self.compile:
                raise InvalidRequest.of("compile", "false beside quantised weights", "true")
        if self.attention == "flash_attention_2" and find_spec("flash_attn") is None:
            expected = "flash-attn beside flash_attention_2: pip install flash-attn"
            raise InvalidRequest.of("attention", expected, "no flash-attn")
        if self.compile and which(_compiler()) is None:
            expected = f"the C++ compiler {_compiler()}, or another's name in CXX"
            raise InvalidRequest.of("compile", expected, "none")

    def options(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """What `from_pretrained` is told. Raises InvalidRequest where `device` can't do it."""
        options: dict[str, Any] = {}
        if self.attention == "flash_attention_2" and (
            device.type != "cuda" or dtype == torch.float32
        ):
            got = f"{str(dtype).removeprefix('torch.')} on {device.type}"
            raise InvalidRequest.of("attention", "bf16 or fp16 on a GPU for flash_attention_2", got)
        if self.attention != "auto":
            options["attn_implementation"] = self.attention
        if self.weights != "auto":
            options["quantization_config"] = _quantization(self.weights, dtype)
            options["device_map"] = {"": str(device)}  # made narrow there, layer by layer
        return options

    def recomputes(self, spread: Spread) -> Checkpointing:
        """When layers are computed again on the way back: always, never, or (auto) where one
        sample's graph does not fit.

        torchao's int8 layers leave a full copy of their weights in the graph (on a 70 M model in bf16:
        101 MiB beside 86 MiB of weights), so there auto is always. One rank may run out where another
        does not, and computing again on one alone would leave them apart.
        """
        if self.checkpointing != "auto":
            return self.checkpointing
        if spread.tensor_parallel:
            return "off"
        return "on" if self.weights == "int8" else "auto"


AS_MADE = Compute()


def _compiler() -> str:
    """That torch looks for."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def _check_spread(compute: Compute, spread: Spread) -> None:
    if not (spread.device_map or spread.tensor_parallel):
        return
    beside = "device_map" if spread.device_map else "tensor_parallel"
    if compute.weights != "auto":
        expected = f"auto beside {beside}: quantised layers stay whole, on one device"
        raise InvalidRequest.of("weights", expected, compute.weights)
    if compute.compile:
        expected = f"false beside {beside}: a layer is compiled for one device, and whole"
        raise InvalidRequest.of("compile", expected, "true")
    if compute.checkpointing == "on" and spread.tensor_parallel:
        expected = "auto or off beside tensor_parallel: a layer computed again talks to all ranks"
        raise InvalidRequest.of("gradient_checkpointing", expected, "on")


def quantised(fingerprint: str, weights: Weights) -> str:
    """A quantised model is another function of its inputs: its replicas don't mix with others."""
    return fingerprint if weights == "auto" else f"{fingerprint}+{weights}"


def quantisation(fingerprint: str) -> Weights:
    """What `quantised` was told."""
    return cast(Weights, fingerprint.partition("+")[2] or "auto")


def unquantised(fingerprint: str) -> str:
    """That of the checkpoint that both halves were cut from."""
    return fingerprint.partition("+")[0]


def keep_4bit_as_stored(model: torch.nn.Module) -> None:
    """Else a processor with AVX512-BF16 lets bitsandbytes pack a layer anew, in place, the first time
    that no gradient is wanted: of a packed layer there is none, its inputs are rounded to bf16, and
    layers narrower than a block can't be packed at all.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _quantization(weights: Weights, dtype: torch.dtype) -> object:
    """Linear layers only; the embedding table and the output layer stay as they are."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if weights == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    from torchao.quantization import Int8WeightOnlyConfig

    # Else it sets the compiler's options, process-wide.
    return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
