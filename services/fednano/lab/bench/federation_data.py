"""A run's data in files, for a side that does not import this project: the very examples that its
clients train on, in their order, and the test set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fednano.client.datasets import DigitsShard, digits_test
from fednano.client.examples import Example
from fednano.wire.run_config import RunConfig


class _Written:
    """Each image once; an example is the number of its image, its question and its answer."""

    def __init__(self) -> None:
        self.images: list[Image.Image] = []
        self._numbers: dict[bytes, int] = {}

    def of(self, examples: Sequence[Example]) -> list[tuple[int, str, str]]:
        return [(self._number(e.images[0]), e.question, e.answer) for e in examples]

    def _number(self, image: Image.Image) -> int:
        number = self._numbers.setdefault(image.tobytes(), len(self.images))
        if number == len(self.images):
            self.images.append(image)
        return number


def write_examples(folder: Path, config: RunConfig) -> None:
    """images.npz, uint8 [images, side, side, 3], and asked.json: lists of (image, question, answer),
    named "round/shard/epoch", and "test"."""
    written, asked = _Written(), {}
    for shard in range(config.clients):
        dealt = DigitsShard.deal(config.data, config.seed, shard, config.clients)
        for number in range(1, config.rounds + 1):
            for epoch in range(config.training.epochs):
                # A client orders its data by its shard's name: client/worker.py.
                examples = dealt.epoch(config.seed, number, epoch, f"shard-{shard}")
                asked[f"{number}/{shard}/{epoch}"] = written.of(examples)
    asked["test"] = written.of(digits_test(config.data.evaluation_limit))
    np.savez(folder / "images.npz", images=np.stack([np.asarray(i) for i in written.images]))
    (folder / "asked.json").write_text(json.dumps(asked))
