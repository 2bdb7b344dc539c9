"""A model larger than one device: its layers on several devices, or a part of each layer on every rank.

Both are transformers' own: `device_map` (accelerate) and `DistributedConfig` (torch.distributed).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, PreTrainedModel

from fednano.wire.errors import FedNanoError, InvalidRequest

NAMED_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
HOW_TO_START = (
    "torchrun --standalone --nproc-per-node N --no-python fednano llm --tensor-parallel ..."
)
_STORES = ("cpu", "disk")


@dataclass(frozen=True)
class Spread:
    """How a model is laid out over devices; as it is made, over none but one."""

    device_map: str = ""  # one of NAMED_MAPS, or a file
    tensor_parallel: bool = False

    def check(self, device: str = "auto") -> None:
        """Raises InvalidRequest where it contradicts itself, `device` or how we were started."""
        if self.device_map and self.tensor_parallel:
            raise InvalidRequest.of(
                "device_map", "nothing beside tensor_parallel", repr(self.device_map)
            )
        if (self.device_map or self.tensor_parallel) and device != "auto":
            other = "device_map" if self.device_map else "tensor_parallel"
            raise InvalidRequest.of("device", f"auto beside {other}, which chooses devices", device)
        if self.device_map:
            read_map(self.device_map)
        if self.tensor_parallel and ranks() < 2:
            raise InvalidRequest.of(
                "tensor_parallel",
                f"two ranks or more: {HOW_TO_START}",
                os.environ.get("WORLD_SIZE", "a process that torchrun did not start"),
            )

    def options(self, directory: Path) -> dict[str, Any]:
        """What `from_pretrained` is told. Raises InvalidRequest where the model can't be divided so."""
        if self.device_map:
            return {"device_map": read_map(self.device_map)}
        if self.tensor_parallel:
            _check_divisible(directory)
            return {"distributed_config": _distributed(ranks())}
        return {}


ONE_DEVICE = Spread()


def ranks() -> int:
    """Processes that torchrun started together; 1 where it did not start us."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Ours among them, from 0."""
    return int(os.environ.get("RANK", "0"))


def read_map(given: str) -> str | dict[str, int | str]:
    """The name of an automatic map, or the content of a YAML or JSON file {module: device}."""
    if given in NAMED_MAPS:
        return given
    try:
        found = yaml.safe_load(Path(given).read_text())  # JSON is YAML
    except (OSError, yaml.YAMLError) as error:
        expected = f"{', '.join(NAMED_MAPS)} or a YAML or JSON file"
        raise InvalidRequest.of("device_map", expected, error) from None
    if not isinstance(found, dict) or not found:
        raise InvalidRequest.of("device_map", "a file {module: device}", f"{given}: {found!r}")
    for module, device in found.items():
        _check_device(str(module), device)
    return {str(module): device for module, device in found.items()}


def home(model: PreTrainedModel) -> torch.device:
    """The device that computes the embedding table's rows; what the model is fed belongs there.

    Where layers lie on several devices accelerate's hooks know it: weights may be stored elsewhere.
    """
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        device = getattr(part, "execution_device", None)
        if device is not None:
            return torch.device(device)
    whole: torch.device = model.device
    return whole


def _check_device(module: str, device: object) -> None:
    field = f"device_map.{module}" if module else "device_map"
    expected = "cpu, disk or a device of this machine, as 0 or cuda:0"
    if isinstance(device, bool) or not isinstance(device, int | str):
        raise InvalidRequest.of(field, expected, device)
    if device in _STORES:
        return
    try:
        found = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    except RuntimeError:
        raise InvalidRequest.of(field, expected, device) from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        got = f"{device}, of {torch.cuda.device_count()} GPUs"
        raise InvalidRequest.of(field, expected, got)


def _check_divisible(directory: Path) -> None:
    """Each rank computes whole attention heads."""
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True).get_text_config()
    except (OSError, ValueError) as error:
        raise InvalidRequest.of("model", "a causal language model", error) from error
    for field in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, field, None) or 0
        if heads % ranks():
            expected = f"a number of ranks that divides {field}, {heads}"
            raise InvalidRequest.of("tensor_parallel", expected, ranks())


def _distributed(size: int) -> object:
    """Ranks hold a GPU each where there are GPUs, and talk by NCCL; else CPUs, by gloo."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if torch.cuda.is_available() and local > torch.cuda.device_count():
        expected = f"at most {torch.cuda.device_count()} ranks on a machine with as many GPUs"
        raise InvalidRequest.of("tensor_parallel", expected, local)
    try:
        from transformers.distributed.configuration_utils import DistributedConfig

        return DistributedConfig(tp_size=size)
    except (ImportError, TypeError) as error:
        raise FedNanoError("tensor_parallel needs a newer release of transformers") from error
