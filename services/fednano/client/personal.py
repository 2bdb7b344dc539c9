"""An adapter of the client's own beside the merged one: trained from it once the rounds are over.

`fine-tuned` answers with the own adapter. `feddpa-f` mixes both for each question: Yang et al.,
"Dual-Personalizing Adapter for Federated Foundation Models", NeurIPS 2024 (arXiv 2403.19211). There a
question's output is (1 - alpha) of the merged adapter's and alpha of the own one's, alpha = lambda
times the mean cosine similarity to a few of the client's training examples. They compare hidden states
of the LLM. A client of a split model has none, so here it is the mean of an example's vectors before
the adapters. Questions of one task are much alike in those, so alpha is not far below lambda.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from fednano.client import private_files
from fednano.client.adapters import Tensors
from fednano.client.edge import EdgeHalf
from fednano.client.examples import Example
from fednano.client.placements import Placement, unheard
from fednano.client.private_files import under
from fednano.client.trainer import EvaluationResult, Progress
from fednano.wire.errors import InvalidRequest
from fednano.wire.low_rank import DOWN, UP

LAMBDA, COMPARED = 0.5, 5
COMPARED_BY = "compared"  # what the choice of those examples hangs on, beside the run's seed
_STEPS = 20  # of alpha between 0 and 1: questions of the same are scored together
_SHARED, _OWN, _ALIKE = "shared.", "own.", "compared"


@dataclass(frozen=True)
class Mixture:
    """FedDPA-F's: the merged adapter, the own one, and what a question is compared with."""

    shared: Tensors
    own: Tensors
    compared: torch.Tensor  # [examples, hidden]: the mean vector of each before the adapters

    @classmethod
    def of(
        cls, edge: EdgeHalf, shared: Tensors, own: Tensors, examples: Sequence[Example]
    ) -> Mixture:
        """`examples` are of the client's training data; the first few are compared with."""
        vectors = [_vector(edge, example) for example in examples[:COMPARED]]
        return cls(shared, own, torch.stack(vectors))

    def tensors(self, edge: EdgeHalf, example: Example) -> Tensors:
        """The adapter that this question is answered with."""
        return mixed(self.shared, self.own, self._step(edge, example) / _STEPS)

    def by_question(
        self, edge: EdgeHalf, examples: Sequence[Example]
    ) -> list[tuple[Tensors, list[Example]]]:
        """Each adapter that there is need of, with the questions that it answers."""
        found: dict[int, list[Example]] = {}
        for example in examples:
            found.setdefault(self._step(edge, example), []).append(example)
        return [(mixed(self.shared, self.own, s / _STEPS), found[s]) for s in sorted(found)]

    def _step(self, edge: EdgeHalf, example: Example) -> int:
        alike = cosine_similarity(_vector(edge, example), self.compared, dim=-1).mean()
        return round(LAMBDA * max(0.0, float(alike)) * _STEPS)


def mixed(shared: Tensors, own: Tensors, alpha: float) -> Tensors:
    """One adapter that gives (1 - alpha) of the one's output and alpha of the other's: both, side by
    side, at the sum of their ranks."""
    found: Tensors = {}
    for name in shared:
        if name.endswith(DOWN):
            found[name] = np.concatenate([shared[name], own[name]])
        elif name.endswith(UP):
            parts = [np.float32(1 - alpha) * shared[name], np.float32(alpha) * own[name]]
            found[name] = np.concatenate(parts, axis=1)
    return found


def _vector(edge: EdgeHalf, example: Example) -> torch.Tensor:
    """[hidden]"""
    return edge.prepare(example, with_answer=False).base.mean(0)


@dataclass(frozen=True)
class Kept:
    """What a client answers with after a run: its own adapter, or that and the merged one mixed."""

    scale: float
    own: Tensors
    mixture: Mixture | None = None

    def tensors(self, edge: EdgeHalf, example: Example) -> Tensors:
        """Those that this question is answered with."""
        return self.own if self.mixture is None else self.mixture.tensors(edge, example)

    def score(
        self,
        placement: Placement,
        examples: Sequence[Example],
        longest: int,
        progress: Progress = unheard,
    ) -> EvaluationResult:
        """Accuracy and loss, as Trainer.evaluate means them, over all adapters that answer.
        `placement` is the run's, and has its scale."""
        parts = [(self.own, list(examples))]
        if self.mixture is not None:
            parts = self.mixture.by_question(placement.edge, examples)
        found: list[EvaluationResult] = []
        for tensors, chosen in parts:
            found.append(placement.evaluate(tensors, chosen, longest, progress))
        count = sum(each.samples for each in found)
        accuracy = sum(each.accuracy * each.samples for each in found) / count
        loss = sum(each.loss * each.samples for each in found) / count
        return EvaluationResult(accuracy, loss, count, {}, {})

    def save(self, path: Path) -> None:
        """Whole or not at all; only its owner can read it."""
        tensors = {_OWN + name: held for name, held in self.own.items()}
        if self.mixture is not None:
            tensors |= {_SHARED + name: held for name, held in self.mixture.shared.items()}
            tensors[_ALIKE] = self.mixture.compared.numpy()
        private_files.save(path, tensors, {"scale": repr(self.scale)})

    @classmethod
    def load(cls, path: Path) -> Kept:
        """Raises InvalidRequest where there is none."""
        found = private_files.load(path)
        if found is None:
            raise InvalidRequest.of(
                "--personal", f"what this client kept of the run, as {path}", "no such file"
            )
        tensors, about = found
        scale, own = float(about["scale"]), under(_OWN, tensors)
        if _ALIKE not in tensors:
            return cls(scale, own)
        compared = torch.tensor(tensors[_ALIKE])
        return cls(scale, own, Mixture(under(_SHARED, tensors), own, compared))


def kept_at(directory: Path, run: str, client: str) -> Path:
    return directory / f"personal.{run}.{client}.safetensors"
