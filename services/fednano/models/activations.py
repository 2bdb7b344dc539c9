"""Forward passes kept for the Backward that follows: few, for a while, each used once."""

from __future__ import annotations

import threading
import time
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fednano.models.factored import Factored
from fednano.models.language_model import Sequences


@dataclass(frozen=True)
class Activation:
    """A forward pass with its graph."""

    values: torch.Tensor  # [tokens, hidden], the leaf
    logits: torch.Tensor  # [wanted, vocabulary] float32


@dataclass(frozen=True)
class Fed:
    """What a forward pass was fed: it can be computed again."""

    sequences: Sequences
    positions: torch.Tensor  # [wanted]

    @property
    def values(self) -> torch.Tensor:
        """[tokens, hidden]."""
        return self.sequences.values


class Kept(NamedTuple):
    """An activation, and what its values were made of where they came in factored form."""

    activation: Activation | Fed
    origin: Factored | None
    since: float


class Activations:
    """Nothing here may not be lost: whoever finds an activation gone has it computed again.

    At most `tokens` tokens are kept (the newest activation always is), none longer than `seconds`.
    Names are "<replica>/<random>", so that one client can't guess another's.
    """

    def __init__(self, replica: str, tokens: int, seconds: float) -> None:
        self._replica = replica
        self._tokens = tokens
        self._seconds = seconds
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, activation: Activation | Fed, origin: Factored | None = None) -> str:
        """Keeps `activation`, whose values were made of `origin`, and returns its name."""
        name = f"{self._replica}/{uuid.uuid4().hex}"
        with self._lock:
            self._kept[name] = Kept(activation, origin, time.monotonic())
            while len(self._kept) > 1 and self._held_tokens() > self._tokens:
                self._kept.popitem(last=False)
        return name

    def get(self, name: str) -> Kept | None:
        """None where it is gone; it stays kept."""
        self.expire()
        with self._lock:
            return self._kept.get(name)

    def drop(self, name: str) -> None:
        with self._lock:
            self._kept.pop(name, None)

    def expire(self) -> None:
        """Forgets what has been kept for too long."""
        oldest = time.monotonic() - self._seconds
        with self._lock:
            while self._kept and next(iter(self._kept.values())).since < oldest:
                self._kept.popitem(last=False)

    def _held_tokens(self) -> int:
        return sum(kept.activation.values.shape[0] for kept in self._kept.values())
