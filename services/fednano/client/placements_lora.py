"""LoRA inside the LLM, which the client has whole: what one would do today, without a split.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, by PEFT, on the query, key,
value and output projections. The engine around the LLM is the one that the split uses, so packing,
loss and generation are the same; nothing but the LoRA's weights has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from fednano.client.adapters import NanoAdapters, Tensors
from fednano.client.batches import Batch
from fednano.client.datasets import Dataset
from fednano.client.edge import EdgeHalf
from fednano.client.examples import Example
from fednano.client.methods import LocalRound
from fednano.client.placements import Parameters, Placement, put, trained, unheard
from fednano.client.trainer import Progress, Trainer, TrainResult
from fednano.client.weights import PROJECTIONS
from fednano.client.wires import Crossed
from fednano.models.checkpoint import read_record
from fednano.models.frozen import FrozenLLM
from fednano.models.padding import Padding
from fednano.models.peft_files import quiet_peft
from fednano.wire.errors import InvalidRequest
from fednano.wire.low_rank import DOWN, UP
from fednano.wire.placements import LORA

_PARTS = {".lora_A.default.weight": DOWN, ".lora_B.default.weight": UP}


@dataclass(frozen=True)
class LoraPlacement(Placement):
    """A [r, in] as `lora.<layer>.down`, B [out, r] as `lora.<layer>.up`."""

    half: EdgeHalf
    llm: FrozenLLM
    lora: Parameters

    @property
    def edge(self) -> EdgeHalf:
        return self.half

    @classmethod
    def load(
        cls,
        llm: Path,
        rank: int,
        scale: float,
        edge_of: Callable[[FrozenLLM], EdgeHalf],
        frozen_down: bool = False,
    ) -> LoraPlacement:
        """The LLM half in fp32, with a LoRA; `frozen_down` trains B alone, as `ffa` does.

        Raises InvalidRequest where the LLM has no such projections, or `edge_of` finds that it is
        another model's.
        """
        model = AutoModelForCausalLM.from_pretrained(
            llm, dtype=torch.float32, local_files_only=True
        )
        _inject(model, rank, scale)
        engine = FrozenLLM(model, read_record(llm, "llm").fingerprint)  # which freezes all of it
        lora = _named(model)
        for name, parameter in lora.items():
            parameter.requires_grad_(not frozen_down or name.endswith(UP))
        return cls(edge_of(engine), engine, lora)

    def train(self, local: LocalRound, data: Dataset, progress: Progress = unheard) -> TrainResult:
        put(self.lora, local.base)
        return trained(self.lora, self.cross, local, data, progress)

    def cross(self, examples: Sequence[Example]) -> Crossed:
        """A batch through the whole model; back into the LoRA and no further."""
        batch = Batch.of([self.half.prepare(example) for example in examples])
        sequences = batch.sequences(batch.base)
        predictions = Padding.of(sequences.lengths, batch.base.device).predictions(batch.labels)
        logits = self.llm.activate(sequences, predictions.positions).logits
        losses = cross_entropy(logits, predictions.targets, reduction="none")
        sums, counts = predictions.sums(losses), torch.tensor(predictions.counts)
        trainable = [parameter for parameter in self.lora.values() if parameter.requires_grad]
        total = (sums / (counts * len(batch))).sum()
        return Crossed(sums.detach(), counts, lambda: total.backward(inputs=trainable))

    def asked(self, tensors: Tensors) -> tuple[Trainer, NanoAdapters]:
        put(self.lora, tensors)
        return Trainer(self.half, self.llm), NanoAdapters({})

    def forget(self) -> None:
        """No service was asked."""


def _inject(model: Any, rank: int, scale: float) -> None:
    """PEFT scales by lora_alpha / r. With lora_alpha = s r that is s for every rank, as it is for
    NanoAdapters. PEFT takes seconds to import, and few clients need it."""
    quiet_peft()
    from peft import LoraConfig, inject_adapter_in_model

    alpha: Any = scale * rank  # PEFT says int and divides
    wanted = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(PROJECTIONS))
    try:
        inject_adapter_in_model(wanted, model)
    except ValueError as error:
        expected = f"an LLM with {', '.join(PROJECTIONS)}"
        raise InvalidRequest.of("--llm-half", expected, error) from error


def _named(model: Any) -> dict[str, torch.nn.Parameter]:
    """PEFT's parameters by the names that travel."""
    return {
        LORA + name.removeprefix("model.").removesuffix(suffix) + part: parameter
        for name, parameter in model.named_parameters()
        for suffix, part in _PARTS.items()
        if name.endswith(suffix)
    }
