"""How a built-in task may be dealt out: as it is written, and how many clients it is enough for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast

Scheme = Literal["iid", "dirichlet", "quantity", "feature"]

SMALLEST_SHARE = 8
"""Images that every client of a partition holds at least."""
TRAINING_IMAGES = {"digits": 1077, "scenes": 1000}
"""Of the built-in tasks."""
_WRITTEN = re.compile(r"(iid)|(dirichlet|quantity|feature):([0-9]*\.?[0-9]+)")
_MOST_ALPHA = 1_000_000
_SHOWN = 40  # characters of a bad value
_WANTED = (
    f"iid, dirichlet:ALPHA or quantity:ALPHA with ALPHA above 0, at most {_MOST_ALPHA},"
    " or feature:STRENGTH with STRENGTH from 0 to 1"
)


@dataclass(frozen=True)
class Partition:
    """A scheme and its parameter: ALPHA, STRENGTH, or 0 for iid."""

    scheme: Scheme
    amount: float = 0.0

    @classmethod
    def read(cls, text: str) -> Partition:
        """From "iid", "dirichlet:0.5", "quantity:0.5", "feature:1". Raises ValueError."""
        found = _WRITTEN.fullmatch(text)
        if found is None:
            raise ValueError(f"expected {_WANTED}, got {text[:_SHOWN]!r}")
        if found[1]:
            return cls("iid")
        scheme, amount = cast(Scheme, found[2]), float(found[3])
        if not (0 <= amount <= 1 if scheme == "feature" else 0 < amount <= _MOST_ALPHA):
            raise ValueError(f"expected {_WANTED}, got {text[:_SHOWN]!r}")
        return cls(scheme, amount)


def most_clients(source: str) -> int:
    """Clients that a built-in task has images for."""
    return TRAINING_IMAGES[source] // SMALLEST_SHARE
