"""What a client sends, receives and computes, by kind: the source of the ledger.

Counted exactly are the messages: tensors under the kind of what they are, everything else in a message
(heads, labels, tokens, replies) as control. Every try counts, also one that failed.

What gRPC and HTTP/2 put around them is estimated, as the kind framing: a prefix and a frame for each
message, the headers of each call with its token and of its reply, what begins a connection to either
service, and an allowance for HTTP/2's own bookkeeping (window updates, pings). The figures were read
off connections of our clients.

Left out are further connections (to more replicas, or made again), TLS's handshakes and records (22
bytes for each 16 KiB), the very last report, and what lies below TCP: IP and TCP headers,
acknowledgements, segments that were sent again.

Compute is CPU time of this process, all its threads together, so that waiting for a service is none.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from fednano.wire.coordinator_pb2 import Costs

Kind = Literal["embeddings", "gradients", "logits", "adapters", "bases", "control", "framing"]
Direction = Literal["sent", "received"]

_MESSAGE = 5 + 9  # gRPC's prefix and the header of a frame: long frames are agreed on
_CALL_SENT = 21 + 2 * 13
"""A frame of headers, of which most are known from earlier calls, and two window updates."""
_CALL_RECEIVED = 37 + 13
"""Headers and trailers, in a frame each, and a window update."""
_CONNECTION_SENT = 320
"""HTTP/2's preface and settings, and headers that later calls only refer to."""
_CONNECTION_RECEIVED = 130
_PINGS = 2 * 17  # in either direction: a ping, and the answer to the other side's
_PING_SECONDS = (0.1, 10.0)
"""Both sides measure the connection by a ping, with a call that comes so long after the last one: at
first, and in the end. What was found to be as before is looked at a tenth of a second later."""
_LITERAL = 3  # of a header that travels in full, besides its name and value


@dataclass
class Meter:
    """Adds up until it is `taken`. Safe to use from several threads."""

    _bytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    _server_seconds: float = 0.0
    _computed: float = field(default_factory=time.process_time)  # up to where it was reported
    _met: set[str] = field(default_factory=set)  # services
    _pinged_at: float = float("-inf")
    _ping_after: float = _PING_SECONDS[0]
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, direction: Direction, kind: Kind, size: int) -> None:
        with self._lock:
            self._bytes[direction, kind] += size

    def call(self, service: str, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """One try of a call with that metadata, and how it is answered."""
        literals = sum(_LITERAL + len(name) + len(value) for name, value in metadata)
        pings = self._pings()
        self.add("sent", "framing", _CALL_SENT + pings + literals)
        self.add("received", "framing", _CALL_RECEIVED + pings)
        if service not in self._met:
            self._met.add(service)
            self.add("sent", "framing", _CONNECTION_SENT)
            self.add("received", "framing", _CONNECTION_RECEIVED)

    def _pings(self) -> int:
        """Bytes in either direction that go with a call made now."""
        with self._lock:
            now = time.monotonic()
            if now - self._pinged_at < self._ping_after:
                return 0
            self._pinged_at = now
            self._ping_after = min(self._ping_after + _PING_SECONDS[0], _PING_SECONDS[1])
            return _PINGS

    def message(self, direction: Direction, kind: Kind, size: int, around: int = 0) -> None:
        """A message of a call: `size` bytes of that kind, and `around` of encoding."""
        self.add(direction, kind, size)
        self.add(direction, "framing", _MESSAGE + around)

    def within(self, direction: Direction, kind: Kind, size: int) -> None:
        """A field of bytes in a message of which the rest is counted."""
        self.add(direction, kind, size)
        self.add(direction, "framing", _field(size))

    def chunk(self, direction: Direction, kind: Kind, size: int) -> None:
        """A message that is one field of bytes; its tag and length are no part of what it carries."""
        self.message(direction, kind, size, _field(size))

    def add_server_seconds(self, seconds: float) -> None:
        with self._lock:
            self._server_seconds += seconds

    def take(self, ahead: Mapping[str, int] | None = None) -> Costs:
        """Everything since the last time, and starts again at nothing.

        `ahead` is what the message that carries these costs will send. It is among them, and taken
        off what is counted as it leaves; where less leaves, the next costs make up for it.
        """
        sending = _by_place("sent", ahead or {})
        with self._lock:
            self._bytes.update(sending)
            found, owed = +self._bytes, -self._bytes
            self._bytes = Counter({place: -size for place, size in owed.items()})
            self._bytes.subtract(sending)
            seconds, self._server_seconds = self._server_seconds, 0.0
            before, self._computed = self._computed, time.process_time()
            computed = self._computed - before
        return Costs(
            sent_bytes={kind: n for (way, kind), n in found.items() if way == "sent"},
            received_bytes={kind: n for (way, kind), n in found.items() if way == "received"},
            client_seconds=computed,
            server_seconds=seconds,
        )

    def put_back(self, costs: Costs) -> None:
        """What was taken and could not be reported."""
        with self._lock:
            self._bytes.update(_by_place("sent", costs.sent_bytes))
            self._bytes.update(_by_place("received", costs.received_bytes))
            self._server_seconds += costs.server_seconds
            self._computed -= costs.client_seconds


def _field(size: int) -> int:
    """Tag and length of a field of so many bytes."""
    return 1 + max(1, -(-size.bit_length() // 7))


def _by_place(direction: Direction, amounts: Mapping[str, int]) -> dict[tuple[str, str], int]:
    return {(direction, kind): size for kind, size in amounts.items()}
