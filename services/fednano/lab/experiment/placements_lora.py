"""LoRA inside the LLM, which the client has whole: what one would do today, without a split.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, by PEFT, on the query, key,
value and output projections. The engine around the LLM is the one that the split uses, so packing,
loss and generation are the same; nothing but the LoRA's weights has a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from fednano.client.adapters import NanoAdapters
from fednano.client.batches import Batch
from fednano.client.datasets import Dataset
from fednano.client.edge import EdgeHalf
from fednano.client.examples import Example
from fednano.client.methods import LocalRound
from fednano.client.trainer import EvaluationResult, Trainer, TrainResult
from fednano.client.wires import Crossed
from fednano.coordinator.records import Tensors
from fednano.lab.experiment.placements import Parameters, put, trained
from fednano.models.frozen import FrozenLLM
from fednano.models.padding import Padding
from fednano.wire.errors import InvalidRequest
from fednano.wire.low_rank import DOWN, UP
from fednano.wire.run_config import RunConfig

_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
_PARTS = {".lora_A.default.weight": DOWN, ".lora_B.default.weight": UP}
_SALT = 0x10A


@dataclass(frozen=True)
class LoraPlacement:
    """A [r, in] as `lora.<layer>.down`, B [out, r] as `lora.<layer>.up`."""

    edge: EdgeHalf
    llm: FrozenLLM
    lora: Parameters
    config: RunConfig

    @classmethod
    def load(cls, llm: Path, edge: EdgeHalf, fingerprint: str, config: RunConfig) -> LoraPlacement:
        """The LLM once more, in fp32, with a LoRA of the run's rank.

        PEFT scales by lora_alpha / r. With lora_alpha = s r that is the run's s for every rank, as it
        is for NanoAdapters. Raises InvalidRequest where the LLM has no such projections.
        """
        model = AutoModelForCausalLM.from_pretrained(
            llm, dtype=torch.float32, local_files_only=True
        )
        rank, scale = config.adapter.rank, config.adapter.scale
        alpha: Any = scale * rank  # PEFT says int and divides
        wanted = LoraConfig(r=rank, lora_alpha=alpha, target_modules=_TARGETS)
        try:
            inject_adapter_in_model(wanted, model)
        except ValueError as error:
            raise InvalidRequest.of("model", f"an LLM with {', '.join(_TARGETS)}", error) from error
        engine = FrozenLLM(model, fingerprint)  # which freezes all of it
        lora = _named(model)
        for name, parameter in lora.items():
            parameter.requires_grad_(config.strategy.name != "ffa" or name.endswith(UP))
        return cls(edge, engine, lora, config)

    def initial(self) -> Tensors:
        """A as PEFT draws it, uniform in +-1/sqrt(in), but by the run's seed; B zero."""
        rng = np.random.default_rng([self.config.seed, _SALT])
        found: Tensors = {}
        for name, parameter in self.lora.items():
            shape = tuple(parameter.shape)
            bound = shape[1] ** -0.5 if name.endswith(DOWN) else 0.0
            found[name] = rng.uniform(-bound, bound, shape).astype(np.float32)
        return found

    def train(self, local: LocalRound, data: Dataset) -> TrainResult:
        put(self.lora, local.base)
        return trained(self.lora, self.cross, local, data)

    def cross(self, examples: Sequence[Example]) -> Crossed:
        """A batch through the whole model; back into the LoRA and no further."""
        batch = Batch.of([self.edge.prepare(example) for example in examples])
        sequences = batch.sequences(batch.base)
        predictions = Padding.of(sequences.lengths, batch.base.device).predictions(batch.labels)
        logits = self.llm.activate(sequences, predictions.positions).logits
        losses = cross_entropy(logits, predictions.targets, reduction="none")
        sums, counts = predictions.sums(losses), torch.tensor(predictions.counts)
        trainable = [parameter for parameter in self.lora.values() if parameter.requires_grad]
        total = (sums / (counts * len(batch))).sum()
        return Crossed(sums.detach(), counts, lambda: total.backward(inputs=trainable))

    def evaluate(self, tensors: Tensors, examples: Sequence[Example]) -> EvaluationResult:
        put(self.lora, tensors)
        longest = self.config.evaluation.max_new_tokens
        return Trainer(self.edge, self.llm).evaluate(NanoAdapters({}), examples, longest)


def _named(model: Any) -> dict[str, torch.nn.Parameter]:
    """PEFT's parameters by the names that travel."""
    return {
        "lora." + name.removeprefix("model.").removesuffix(suffix) + part: parameter
        for name, parameter in model.named_parameters()
        for suffix, part in _PARTS.items()
        if name.endswith(suffix)
    }
