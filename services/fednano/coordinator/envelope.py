"""What surrounds every HTTP exchange: a request id, security headers, one log line, a size limit."""

from __future__ import annotations

import logging
import re
import time
import uuid
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import clear_contextvars

from fednano import logs
from fednano.coordinator.problems import problem_response

log = logging.getLogger(__name__)

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
        "object-src 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
MAX_BODY_BYTES = 1 << 20  # the largest body is a RunConfig
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SAFE = "/:@!$&'()*+,;=~"
_LONGEST_PATH = 300
QUIET = ("/healthz", "/readyz", "/metrics", "/static/")


class Envelope:
    """The outermost middleware; what escapes everything else becomes a 500 here."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        sent = Headers(scope=scope).get("x-request-id", "")
        request_id = sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        # A new dict: the server's own is shared by all requests.
        scope["state"] = {**scope.get("state", {}), "request_id": request_id}
        clear_contextvars()  # of the request before, whose end began a pipelined one
        logs.bind(request_id=request_id)
        status = 0

        async def seal(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _seal(MutableHeaders(scope=message), request_id)
            await send(message)

        try:
            await self._app(scope, _limited(receive), seal)
        except Exception as error:
            response = problem_response(error, request_id)
            if status:  # too late for another reply: the server cuts the connection
                raise
            await response(scope, receive, seal)
        finally:
            _note(scope, status, time.monotonic() - started)


def _seal(headers: MutableHeaders, request_id: str) -> None:
    headers["X-Request-ID"] = request_id
    headers.setdefault("Cache-Control", "no-store")
    for name, value in SECURITY_HEADERS.items():
        headers[name] = value


def _limited(receive: Receive) -> Receive:
    """The same stream of messages, refused once a body is larger than any that we expect."""
    received = 0

    async def limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_BODY_BYTES:
            raise HTTPException(413, f"a body may have at most {MAX_BODY_BYTES} bytes")
        return message

    return limited


def _note(scope: Scope, status: int, seconds: float) -> None:
    state, path = scope["state"], scope["path"]
    identity = state.get("identity")
    reading = scope["method"] in ("GET", "HEAD") and status < 400
    log.log(
        logging.DEBUG if reading or status == 401 or path.startswith(QUIET) else logging.INFO,
        "http request",
        extra={
            "method": scope["method"],
            "path": quote(path, safe=_SAFE)[:_LONGEST_PATH],  # no control characters in a terminal
            "status": status,
            "ms": round(seconds * 1000, 1),
            "by": identity.name if identity else None,
        },
    )
