"""The built-in task: questions about real handwriting, without a download.

The 1,797 images are the test part of the UCI "Optical Recognition of Handwritten Digits" set
(E. Alpaydin and C. Kaynak, 1998, CC BY 4.0), which scikit-learn bundles at 8 x 8 pixels in 17
grey levels. The set does not say who wrote which digit, so a writer can be in several splits.
"""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fednano.client.examples import Example
from fednano.wire.errors import InvalidRequest

Split = Literal["train", "validation", "test"]
Indices = NDArray[np.int64]

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 32  # pixels; what the vision tower of the embedded model takes
SMALLEST_SHARE = 8  # samples that every client of a partition holds at least
_SPLIT_SEED = 1797  # of the split and of nothing else: no run's seed changes who is in the test set
_SPLITS: tuple[Split, ...] = ("test", "validation", "train", "train", "train")  # every fifth


class BadPartition(InvalidRequest):
    """A partition that cannot be made; the message names the field, expected and got."""


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


def one_question_each(
    digits: Sequence[DigitImage], *, seed: int, round: int, client: str, epoch: int = 0
) -> list[Example]:
    """An epoch of training: every digit once, in random order, with one random question.

    A function of its arguments alone, so that a round that is run again sees the same data.
    """
    rng = np.random.default_rng([seed, round, epoch, zlib.crc32(client.encode())])
    return [
        examples_of(digits[i])[rng.integers(len(questions(digits[i].label)))]
        for i in rng.permutation(len(digits))
    ]


def partition(labels: Sequence[int], clients: int, scheme: str, seed: int) -> list[Indices]:
    """Deal samples out to clients: one sorted index array each, disjoint and exhaustive.

    `scheme` is "iid" or "dirichlet:ALPHA": for every label, the clients' shares are drawn from a
    symmetric Dirichlet distribution (Hsu et al., arXiv 1909.06335). A client that got fewer than
    eight samples is filled up from the largest.
    """
    if clients < 1 or len(labels) < clients * SMALLEST_SHARE:
        most = len(labels) // SMALLEST_SHARE
        raise BadPartition(
            f"clients: expected 1 to {most} for {len(labels)} samples, got {clients}"
        )
    rng = np.random.default_rng(seed)
    alpha = _alpha(scheme)
    if alpha is None:
        shares = np.array_split(rng.permutation(len(labels)), clients)
    else:
        shares = _dirichlet(np.asarray(labels), clients, alpha, rng)
    return [np.sort(share).astype(np.int64) for share in _filled_up(shares, rng)]


def _alpha(scheme: str) -> float | None:
    """The Dirichlet parameter that a scheme names; None for "iid"."""
    if scheme == "iid":
        return None
    name, _, text = scheme.partition(":")
    try:
        alpha = float(text)
    except ValueError:
        alpha = 0.0
    if name != "dirichlet" or not 0.0 < alpha < float("inf"):
        raise BadPartition(
            f'scheme: expected "iid" or "dirichlet:ALPHA", ALPHA > 0, got {scheme!r}'
        )
    return alpha


def _dirichlet(
    labels: NDArray[np.int64], clients: int, alpha: float, rng: np.random.Generator
) -> list[Indices]:
    shares: list[list[Indices]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(members)
        for share, part in zip(shares, np.split(members, cuts.astype(int)), strict=True):
            share.append(part)
    return [np.concatenate(share) for share in shares]


def _filled_up(shares: list[Indices], rng: np.random.Generator) -> list[Indices]:
    """The same samples, with nobody below the smallest share."""
    shares = [rng.permutation(share) for share in shares]
    for i, share in enumerate(shares):
        for _ in range(SMALLEST_SHARE - len(share)):
            largest = max(range(len(shares)), key=lambda k: len(shares[k]))
            shares[i] = np.append(shares[i], shares[largest][-1])
            shares[largest] = shares[largest][:-1]
    return shares


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
