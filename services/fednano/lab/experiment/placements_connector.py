"""Connector tuning: a client trains the checkpoint's own connector, whole, and no NanoAdapters.

It is split learning still: embeddings go to the LLM, their gradient comes back, and the client goes on
from it into its connector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from fednano.client.adapters import NanoAdapters
from fednano.client.batches import Batch
from fednano.client.cache import FeatureCache
from fednano.client.datasets import Dataset
from fednano.client.edge import EdgeHalf, NanoEdge
from fednano.client.examples import Example
from fednano.client.methods import LocalRound
from fednano.client.trainer import EvaluationResult, Trainer, TrainResult
from fednano.client.wires import Crossed, DenseWire
from fednano.coordinator.records import Tensors
from fednano.lab.experiment.placements import copied, put, trained
from fednano.models.language_model import LanguageModel, Modality
from fednano.models.llava import CONNECTOR_OUTPUT
from fednano.wire.run_config import RunConfig

_CONNECTOR = CONNECTOR_OUTPUT.partition(".")[0]
_TENSORS = "connector."


class ConnectorEdge(EdgeHalf):
    """An edge half whose connector may change: what lies before it is cached, its output is not."""

    def __init__(self, directory: Path, llm: LanguageModel) -> None:
        super().__init__(directory, llm, FeatureCache(f"{llm.fingerprint} before the connector"))
        self.connector = next(
            module for name, module in self._front.named_modules() if name.endswith(_CONNECTOR)
        )
        self.first = copied(self.parameters)

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """All of the connector's, by the names that travel."""
        return {_TENSORS + name: p for name, p in self.connector.named_parameters()}

    def features(self, image: Image.Image) -> torch.Tensor:
        """[image tokens, hidden]: what the connector, as it is now, makes of an image; while it is
        trained only their place, which `filled` fills for a whole batch at once."""
        seen = self._cache.get(image, self._seen)
        if self.connector.training:
            return seen.new_zeros(len(seen), self.record.hidden_size)
        features: torch.Tensor = self.connector(seen[None])[0]
        return features

    def filled(self, batch: Batch, examples: Sequence[Example]) -> Batch:
        """The batch of these examples with their images' tokens, and the connector's graph. There is
        at least one image, as in every question of the built-in tasks."""
        images = [image for example in examples for image in example.images]
        seen = torch.cat([self._cache.get(image, self._seen) for image in images])
        rows = batch.rows(Modality.IMAGE)
        return replace(batch, base=batch.base.index_copy(0, rows, self.connector(seen)))

    def _seen(self, image: Image.Image) -> torch.Tensor:
        """What the encoder gives to the connector [image tokens, width of the encoder]."""
        caught: list[torch.Tensor] = []
        hook = self.connector.register_forward_pre_hook(lambda _, given: caught.append(given[0]))
        try:
            self._encode(image)
        finally:
            hook.remove()
        return caught[0][0].clone()  # outside of inference mode, so that a graph may hold it


@dataclass(frozen=True)
class ConnectorPlacement:
    """Full fine-tuning of the connector: all its weights and biases."""

    edge: ConnectorEdge
    llm: LanguageModel
    config: RunConfig

    def initial(self) -> Tensors:
        return {name: tensor.copy() for name, tensor in self.edge.first.items()}

    def train(self, local: LocalRound, data: Dataset) -> TrainResult:
        put(self.edge.parameters, local.base)
        self.edge.connector.requires_grad_(True).train()
        try:
            return trained(self.edge.parameters, self.cross, local, data)
        finally:
            self.edge.connector.requires_grad_(False).eval()

    def cross(self, examples: Sequence[Example]) -> Crossed:
        """A batch to the LLM and its gradient back. None is made ahead: each needs the connector as
        the step before left it."""
        prepared = Batch.of([self.edge.prepare(example) for example in examples])
        batch = self.edge.filled(prepared, examples)
        weights = 1 / (batch.label_counts * len(batch))
        wire = DenseWire(self.llm, self.config.training.loss)
        return wire.step(NanoEdge(NanoAdapters({})), batch, weights, None)

    def evaluate(self, tensors: Tensors, examples: Sequence[Example]) -> EvaluationResult:
        put(self.edge.parameters, tensors)
        longest = self.config.evaluation.max_new_tokens
        return Trainer(self.edge, self.llm).evaluate(NanoAdapters({}), examples, longest)
