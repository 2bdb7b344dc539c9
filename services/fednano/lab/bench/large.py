"""A model of which only the shape is given, made without being held, and the room that it takes.

Weights are random and lie on disk as a real checkpoint's do: both sides of a measurement load them
from there.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig

from fednano.lab.bench.checkpoints import Model
from fednano.lab.bench.rows import Row, Surroundings
from fednano.lab.bench.served import Place
from fednano.lab.bench.wide import BATCH, RANK, TOKENS, clip_small, published_text, wide
from fednano.models.memory import free_memory
from fednano.models.split import SplitReport

_GIB = 1 << 30
_SHARD_BYTES = _GIB
_SERVED_TOKENS = 8192
"""Of a batch on a GPU, where the service is not told otherwise."""
_SLACK = 1.15
"""On what is counted: two CUDA contexts, and what is needed for a moment on the way back."""


@dataclass(frozen=True)
class Shape:
    """A model's, and that of the step which is measured with it."""

    name: str
    text: LlamaConfig
    vision: CLIPVisionConfig  # any that gives as many tokens: features are cached on both sides
    batch: int
    tokens: int  # of each sample
    rank: int

    @cached_property
    def tensors(self) -> dict[str, torch.Size]:
        """The LLM's parameters; nothing is allocated for them."""
        with torch.device("meta"):
            stock = AutoModelForCausalLM.from_config(self.text)
        return {name: parameter.shape for name, parameter in stock.named_parameters()}

    @property
    def parameters(self) -> int:
        return sum(size.numel() for size in self.tensors.values())

    @property
    def bytes(self) -> int:
        """In bf16."""
        return 2 * self.parameters

    def graph_bytes(self, tokens: int) -> int:
        """What a forward pass of so many tokens keeps for its way back, in bf16: of each layer two
        norms' inputs in fp32, attention's q, k, v and result, the gate before and after its activation,
        and what it is multiplied with. Nothing is kept for the frozen weights."""
        a_layer = 16 * self.text.hidden_size + 6 * self.text.intermediate_size
        return tokens * self.text.num_hidden_layers * a_layer

    @property
    def setting(self) -> dict[str, str | int | float]:
        return {
            "model": f"{self.name}, random weights, {self.parameters / 1e6:.1f} M in the LLM",
            "batch": self.batch,
            "tokens a sample": self.tokens,
            "rank": self.rank,
        }


def llava_7b() -> Shape:
    return Shape("LLaVA-1.5-7B's shape", published_text(), clip_small(), BATCH, TOKENS, RANK)


def on_gpu() -> Place:
    """Client and service may use all cores: one waits while the other computes."""
    return Place("cuda", "bf16", os.cpu_count() or 1)


@dataclass(frozen=True)
class Needed:
    """Bytes of a device's memory: with both sides on it at once, and one after the other."""

    together: int
    apart: int

    @classmethod
    def by(cls, shape: Shape) -> Needed:
        tokens = shape.batch * shape.tokens
        whole = shape.bytes + shape.graph_bytes(tokens)
        served = shape.bytes + shape.graph_bytes(min(tokens, _SERVED_TOKENS))
        return cls(int(_SLACK * (whole + served)), int(_SLACK * max(whole, served)))


def free_bytes() -> int:
    """Of the GPU, once nothing is left of an earlier bench."""
    gc.collect()
    free_memory()
    return int(torch.cuda.mem_get_info()[0])


def fits(shape: Shape) -> bool:
    """Whether the GPU has room for both sides at once."""
    return free_bytes() >= Needed.by(shape).together


def absent(around: Surroundings, shape: Shape) -> str:
    """Why `shape` can't be measured on a GPU of this machine; empty where it can."""
    needed = Needed.by(shape).apart
    if around.quick:
        return "--quick leaves it out"
    if not torch.cuda.is_available():
        return f"no GPU that torch can use; {needed / _GIB:.0f} GiB of its memory would be needed"
    on_disk = shutil.disk_usage(around.directory).free
    return lacking(free_bytes(), needed, "of the GPU's memory") or lacking(
        on_disk, int(_SLACK * shape.bytes), "of disk"
    )


class Trial(Protocol):
    """What is measured where it can be."""

    def blank(self) -> Iterable[Row]:
        """Its rows without their figures."""
        ...

    def rows(self) -> Iterable[Row]: ...


def attempted(trial: Trial, why: str) -> Iterator[Row]:
    """Its rows; or, where it can't be measured or memory does not suffice after all, why not."""
    if not why:
        try:
            yield from list(trial.rows())
            return
        except torch.OutOfMemoryError as error:
            why = f"the GPU's memory did not suffice: {str(error).partition('. ')[0]}"
    yield from (row.unmeasured(why) for row in trial.blank())


def lacking(free: int, needed: int, what: str) -> str:
    """Empty where there is enough."""
    if free >= needed:
        return ""
    return f"{free / _GIB:.1f} GiB {what} are free, {needed / _GIB:.1f} are needed"


@contextmanager
def made(directory: Path, shape: Shape, device: str) -> Iterator[Model]:
    """Gone afterwards, also where a bench fails and its directory is kept for the logs."""
    try:
        yield make(directory, shape, device)
    finally:
        for part in directory.glob("large*"):
            shutil.rmtree(part)


def make(directory: Path, shape: Shape, device: str) -> Model:
    """Both halves. The client's is cut by the real split, from a model with a smaller LLM; the LLM's
    is written shard by shard, so that one shard is all that is ever held."""
    cut = wide(directory, "large", shape.vision, torch.bfloat16, shape.text.hidden_size)
    folder = cut.halves / "llm"
    shutil.rmtree(folder)
    folder.mkdir()
    config = copy.deepcopy(shape.text)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    _write_weights(folder, shape, device)
    record = replace(
        cut.report.llm,
        vocabulary=shape.text.vocab_size,
        dtype="bfloat16",
        parameters=shape.parameters,
        bytes=sum(path.stat().st_size for path in folder.iterdir()),
    )
    record.write(folder)
    return replace(cut, name=shape.name, report=SplitReport(cut.report.edge, record))


def _write_weights(folder: Path, shape: Shape, device: str) -> None:
    shards = list(_shards(shape.tensors))
    generator = torch.Generator(device).manual_seed(0)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weights = {name: _random(size, generator) for name, size in shard.items()}
        save_file(weights, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    listed = {"metadata": {"total_size": shape.bytes}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listed))


def _shards(tensors: Mapping[str, torch.Size]) -> Iterator[dict[str, torch.Size]]:
    shard: dict[str, torch.Size] = {}
    for name, size in tensors.items():
        if shard and 2 * sum(map(math.prod, (*shard.values(), size))) > _SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = size
    yield shard


def _random(size: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """As models are initialised: norms are ones."""
    tensor = torch.empty(size, dtype=torch.bfloat16, device=generator.device)
    return (
        tensor.fill_(1) if len(size) == 1 else tensor.normal_(0, 0.02, generator=generator)
    ).cpu()
