"""The built-in task: questions about real handwriting, without a download.

The 1,797 images are the test part of the UCI "Optical Recognition of Handwritten Digits" set
(E. Alpaydin and C. Kaynak, 1998, CC BY 4.0), which scikit-learn bundles at 8 x 8 pixels in 17
grey levels. The set does not say who wrote which digit, so a writer can be in several splits.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fednano.client.examples import Example

Split = Literal["train", "validation", "test"]

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 32  # pixels; what the vision tower of the embedded model takes
_SPLIT_SEED = 1797  # of the split and of nothing else: no run's seed changes who is in the test set
_SPLITS: tuple[Split, ...] = ("test", "validation", "train", "train", "train")  # every fifth


@dataclass(frozen=True)
class DigitImage:
    """One handwritten digit: light ink on black, RGB, 32 x 32."""

    id: str
    label: int
    image: Image.Image


def load_split(name: Split) -> list[DigitImage]:
    """The digits of a split: train 1,077, validation 360, test 360, stratified by label."""
    if name not in _SPLITS:
        raise ValueError(f"split: expected train, validation or test, got {name!r}")
    pixels, labels = _digits()
    chosen = np.flatnonzero(_split_of_each() == name)
    return [DigitImage(f"digits-{i:04d}", int(labels[i]), _upscaled(pixels[i])) for i in chosen]


def questions(label: int) -> list[tuple[str, str, str]]:
    """(kind, question, answer) of every question that is asked about a digit."""
    return [
        ("name", "What digit is this?", WORDS[label]),
        ("numeral", "Write the digit as a numeral.", str(label)),
        ("parity", "Is the digit even?", "no" if label % 2 else "yes"),
    ]


def examples_of(digit: DigitImage) -> list[Example]:
    """All questions about one digit, in a fixed order; the id ends in the kind of question."""
    return [
        Example(f"{digit.id}-{kind}", (digit.image,), question, answer, kind)
        for kind, question, answer in questions(digit.label)
    ]


def _upscaled(pixels: NDArray[np.float64]) -> Image.Image:
    """[8, 8] in 0..16, ink high, to RGB: light on black, the commoner polarity of pre-training."""
    grey = Image.fromarray((pixels * 255 / 16).astype(np.uint8))
    return grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR).convert("RGB")


@cache
def _digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the built-in digits come with scikit-learn, which is not installed"
        )
    # Read beside the package: importing scikit-learn, and SciPy with it, takes seconds.
    table = np.loadtxt(Path(spec.origin).parent / "datasets/data/digits.csv.gz", delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)


@cache
def _split_of_each() -> NDArray[np.str_]:
    """The split of every image: shuffled within its label, then every fifth."""
    labels = _digits()[1]
    shuffled = np.random.default_rng(_SPLIT_SEED).permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    splits = np.empty(len(labels), dtype="<U10")
    splits[by_label] = [_SPLITS[position % 5] for position in range(len(labels))]
    return splits
