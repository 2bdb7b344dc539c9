"""Connector tuning: a client trains the checkpoint's own connector, whole, and no NanoAdapters.

It is split learning still: embeddings go to the LLM, their gradient comes back, and the client goes on
from it into its connector. What travels is by how much each weight differs from the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from fednano.client.adapters import NanoAdapters, Tensors
from fednano.client.batches import Batch
from fednano.client.cache import FeatureCache
from fednano.client.datasets import Dataset
from fednano.client.edge import EdgeHalf, NanoEdge
from fednano.client.examples import Example
from fednano.client.methods import LocalRound
from fednano.client.placements import Placement, check_fit, copied, put, trained, unheard
from fednano.client.trainer import Progress, Trainer, TrainResult
from fednano.client.wires import Crossed, DenseWire
from fednano.models.language_model import LanguageModel, Modality
from fednano.models.llava import CONNECTOR
from fednano.wire import placements


class ConnectorEdge(EdgeHalf):
    """An edge half whose connector may change: what lies before it is cached, its output is not."""

    def __init__(self, directory: Path, llm: LanguageModel, cache: FeatureCache) -> None:
        """`cache` is one of its own, of what the encoder makes of images."""
        super().__init__(directory, llm, cache)
        self.connector = next(
            module for name, module in self._front.named_modules() if name.endswith(CONNECTOR)
        )
        self._first = copied(self.parameters)

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """All of the connector's, by the names that travel."""
        return {placements.CONNECTOR + n: p for n, p in self.connector.named_parameters()}

    def change(self, tensors: Tensors) -> None:
        """The checkpoint's connector and these differences. Raises InvalidRequest where they are
        no connector's, or another one's."""
        check_fit(self.parameters, tensors)
        put(self.parameters, {name: self._first[name] + tensors[name] for name in tensors})

    def changed(self) -> Tensors:
        """By how much each weight differs from the checkpoint's."""
        return {name: held - self._first[name] for name, held in copied(self.parameters).items()}

    def features(self, image: Image.Image) -> torch.Tensor:
        """[image tokens, hidden]: what the connector, as it is now, makes of an image; while it is
        trained only their place, which `filled` fills for a whole batch at once."""
        seen = self._cache.get(image, self._seen)
        if self.connector.training:
            return seen.new_zeros(len(seen), self.record.hidden_size)
        features: torch.Tensor = self.connector(seen[None])[0]
        return features

    def filled(self, batch: Batch, examples: Sequence[Example]) -> Batch:
        """The batch of these examples with their images' tokens, and the connector's graph."""
        images = [image for example in examples for image in example.images]
        if not images:
            return batch
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
class ConnectorPlacement(Placement):
    """Full fine-tuning of the connector: all its weights and biases."""

    half: ConnectorEdge
    llm: LanguageModel
    loss: str = "server"

    @property
    def edge(self) -> ConnectorEdge:
        return self.half

    def train(self, local: LocalRound, data: Dataset, progress: Progress = unheard) -> TrainResult:
        self.half.change(local.base)
        self.half.connector.requires_grad_(True).train()
        try:
            found = trained(self.half.parameters, self.cross, local, data, progress)
        finally:
            self.half.connector.requires_grad_(False).eval()
        return replace(found, adapter=self.half.changed())

    def cross(self, examples: Sequence[Example]) -> Crossed:
        """A batch to the LLM and its gradient back. None is made ahead: each needs the connector as
        the step before left it."""
        prepared = Batch.of([self.half.prepare(example) for example in examples])
        batch = self.half.filled(prepared, examples)
        wire = DenseWire(self.llm, self.loss)
        crossed = wire.step(NanoEdge(NanoAdapters({})), batch, None)
        if not batch.base.requires_grad:  # no image among them, so nothing to go on into
            return replace(crossed, backward=lambda: None)
        return crossed

    def asked(self, tensors: Tensors) -> tuple[Trainer, NanoAdapters]:
        self.half.change(tensors)
        return Trainer(self.half, self.llm), NanoAdapters({})

    def forget(self) -> None:
        """No service keeps anything."""


def cache_of(fingerprint: str, directory: Path | None = None) -> FeatureCache:
    """Of what lies before the connector, beside other features in the same directory."""
    return FeatureCache(f"{fingerprint} before the connector", directory)
