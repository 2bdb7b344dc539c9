"""What a client sends, receives and spends, by kind: the source of the ledger."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from fednano.wire.coordinator_pb2 import Costs

Kind = Literal["embeddings", "gradients", "logits", "adapters", "bases", "control"]
Direction = Literal["sent", "received"]


@dataclass
class Meter:
    """Adds up until it is `taken`. Safe to use from several threads."""

    _bytes: Counter[tuple[Direction, Kind]] = field(default_factory=Counter)
    _server_seconds: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, direction: Direction, kind: Kind, size: int) -> None:
        with self._lock:
            self._bytes[direction, kind] += size

    def add_server_seconds(self, seconds: float) -> None:
        with self._lock:
            self._server_seconds += seconds

    def take(self, client_seconds: float = 0.0) -> Costs:
        """Everything since the last time, and starts again at nothing."""
        with self._lock:
            found, self._bytes = self._bytes, Counter()
            seconds, self._server_seconds = self._server_seconds, 0.0
        return Costs(
            sent_bytes={kind: n for (way, kind), n in found.items() if way == "sent"},
            received_bytes={kind: n for (way, kind), n in found.items() if way == "received"},
            client_seconds=client_seconds,
            server_seconds=seconds,
        )
