"""How a built-in task is dealt out to clients, and what sets their data apart.

Four schemes, after Li et al., "Federated Learning on Non-IID Data Silos: An Experimental Study"
(ICDE 2022, arXiv 2102.02079): IID; label skew (`dirichlet:ALPHA`, in the form of Hsu et al.,
arXiv 1909.06335); quantity skew (`quantity:ALPHA`); and feature skew (`feature:STRENGTH`), for
which they add noise of a level of its own to each client's images, and we scan them badly.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from fednano.wire.errors import InvalidRequest
from fednano.wire.partition import SMALLEST_SHARE, Partition

Indices = NDArray[np.int64]
_SCANNER_SEED = 1909  # of the scanners and of nothing else: a client's is the same in every run


class BadPartition(InvalidRequest):
    """A partition that cannot be made; the message names the field, expected and got."""


def partition(labels: Sequence[int], clients: int, scheme: str, seed: int) -> list[Indices]:
    """Deal samples out to clients: one sorted index array each, disjoint and exhaustive.

    `iid` and `feature:STRENGTH` give equal shares of a shuffle. `dirichlet:ALPHA`: for every label,
    the clients' shares are drawn from a symmetric Dirichlet distribution. `quantity:ALPHA`: a
    shuffle is cut into shares whose sizes are drawn from one, so that labels are the same mix
    everywhere. A client that got fewer than eight samples is filled up from the largest.
    """
    if clients < 1 or len(labels) < clients * SMALLEST_SHARE:
        most = len(labels) // SMALLEST_SHARE
        raise BadPartition(
            f"clients: expected 1 to {most} for {len(labels)} samples, got {clients}"
        )
    wanted, rng = _read(scheme), np.random.default_rng(seed)
    if wanted.scheme == "dirichlet":
        shares = _by_label(np.asarray(labels), clients, wanted.amount, rng)
    elif wanted.scheme == "quantity":
        cuts = _cuts(clients, wanted.amount, len(labels), rng)
        shares = np.split(rng.permutation(len(labels)), cuts)
    else:
        shares = np.array_split(rng.permutation(len(labels)), clients)
    return [np.sort(share).astype(np.int64) for share in _filled_up(shares, rng)]


def _read(scheme: str) -> Partition:
    try:
        return Partition.read(scheme)
    except ValueError as error:
        raise BadPartition(f"scheme: {error}") from None


def _by_label(
    labels: Indices, clients: int, alpha: float, rng: np.random.Generator
) -> list[Indices]:
    shares: list[list[Indices]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        parts = np.split(members, _cuts(clients, alpha, len(members), rng))
        for share, part in zip(shares, parts, strict=True):
            share.append(part)
    return [np.concatenate(share) for share in shares]


def _cuts(clients: int, alpha: float, count: int, rng: np.random.Generator) -> Indices:
    """Where `count` samples are cut, into shares from a symmetric Dirichlet distribution."""
    cuts: Indices = (np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * count).astype(int)
    return cuts


def _filled_up(shares: list[Indices], rng: np.random.Generator) -> list[Indices]:
    """The same samples, with nobody below the smallest share."""
    shares = [rng.permutation(share) for share in shares]
    for i, share in enumerate(shares):
        for _ in range(SMALLEST_SHARE - len(share)):
            largest = max(range(len(shares)), key=lambda k: len(shares[k]))
            shares[i] = np.append(shares[i], shares[largest][-1])
            shares[largest] = shares[largest][:-1]
    return shares


@dataclass(frozen=True)
class Scanner:
    """What a client takes its images with: each has faults of its own, the same for every image.

    `strength` 0 changes nothing. At 1 the largest faults are a turn of 12 degrees, a blur of 0.6
    pixels, a contrast of 0.6, a brightness off by 0.12 of the range, a gamma of 1.6 or 1 / 1.6 and
    noise of 0.06 of the range. A client has between half and all of each.
    """

    client: int
    strength: float

    @classmethod
    def of(cls, scheme: str, client: int) -> Scanner | None:
        """That of the client with this index; None where the partition has no scanners."""
        wanted = _read(scheme)
        return cls(client, wanted.amount) if wanted.scheme == "feature" else None

    @cached_property
    def _faults(self) -> tuple[float, float, float, float, float, float]:
        rng = np.random.default_rng([_SCANNER_SEED, self.client])
        sizes = self.strength * rng.uniform(0.5, 1.0, 6)
        signs = rng.choice([-1.0, 1.0], 6)
        turn, blur, fade, light, bend, noise = sizes
        return (
            float(12 * turn * signs[0]),
            float(0.6 * blur),
            float(1 - 0.4 * fade),
            float(0.12 * light * signs[3]),
            float(1.6 ** (bend * signs[4])),
            float(0.06 * noise),
        )

    def scan(self, image: Image.Image, name: str) -> Image.Image:
        """`image` as this scanner sees it; the noise is a function of the image's name."""
        if not self.strength:
            return image
        turn, blur, contrast, brightness, gamma, noise = self._faults
        corner = image.getpixel((0, 0))
        turned = image.rotate(turn, Image.Resampling.BILINEAR, fillcolor=corner)
        values = np.asarray(turned.filter(ImageFilter.GaussianBlur(blur)), float) / 255
        values = (values**gamma - 0.5) * contrast + 0.5 + brightness
        rng = np.random.default_rng([self.client, zlib.crc32(name.encode())])
        values = np.clip(values + rng.normal(0, noise, values.shape), 0, 1)
        return Image.fromarray((values * 255).round().astype(np.uint8))
