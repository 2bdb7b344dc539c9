"""The header that travels in every request: made by callers, checked by services."""

from __future__ import annotations

import uuid

from fednano.logs import printable
from fednano.wire.errors import InvalidRequest, Problem, UnsupportedProtocol, WrongModel
from fednano.wire.tensor_pb2 import Header

PROTOCOL = 1


def make_header(
    client: str,
    *,
    run: str = "",
    session: str = "",
    round_number: int = 0,
    attempt: int = 0,
    fingerprint: str = "",
) -> Header:
    """A header with a request id of its own."""
    return Header(
        protocol=PROTOCOL,
        run=run,
        client=client,
        session=session,
        round=round_number,
        attempt=attempt,
        request=uuid.uuid4().hex,
        fingerprint=fingerprint,
    )


def check_header(header: Header, fingerprint: str | None = None) -> None:
    """Raises UnsupportedProtocol, InvalidRequest or, where `fingerprint` is given, WrongModel."""
    if header.protocol != PROTOCOL:
        problem = Problem("header.protocol", str(PROTOCOL), str(header.protocol))
        raise UnsupportedProtocol(str(problem), problem)
    for field in ("client", "request"):
        if not getattr(header, field):
            raise InvalidRequest.of(f"header.{field}", "a value", "nothing")
    if fingerprint is not None and header.fingerprint != fingerprint:
        problem = Problem("header.fingerprint", fingerprint, header.fingerprint or "nothing")
        raise WrongModel(f"another model: {problem}", problem)


def ids_of(header: Header) -> dict[str, str | int]:
    """What a header claims, for logs and traces, bounded and printable; only what is there."""
    texts = {"run": header.run, "client": header.client, "request_id": header.request}
    found: dict[str, str | int] = {name: printable(text) for name, text in texts.items() if text}
    return found | ({"round": header.round} if header.round else {})
