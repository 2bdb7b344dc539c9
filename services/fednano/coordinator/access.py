"""Who may do what over HTTP: one gate in front of every route, known or not.

Everything but health and the dashboard's own files, which hold no data, needs a token. The gate
stands before routing, so that an unknown path is refused exactly like a known one.
"""

from __future__ import annotations

import re
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from fednano.coordinator.login import LOGIN_PATH, cookie_name, expired_cookie
from fednano.coordinator.problems import problem_response
from fednano.coordinator.store import Store
from fednano.wire.errors import FedNanoError, PermissionDenied, Unauthenticated
from fednano.wire.interceptors import read_bearer
from fednano.wire.sessions import Identity

_OPEN_PATHS = ("/", "/healthz", "/readyz")
_READING = ("GET", "HEAD")
_SITE_PATHS = re.compile(r"/api/v1/runs(/[^/]+(/rounds(/[^/]+(/adapter)?)?)?)?")


def is_open(method: str, path: str) -> bool:
    """True for what is served without a token: health, and the dashboard's files without data."""
    return method in _READING and (path in _OPEN_PATHS or path.startswith("/static/"))


def may(role: str, method: str, path: str) -> bool:
    """Whether a token of this role may send such a request.

    An admin may do everything, a viewer read everything but tokens, a site read runs, rounds and
    adapters. Everybody may log in and out.
    """
    if role == "admin" or path == LOGIN_PATH:
        return True
    if method not in _READING or path.startswith("/api/v1/tokens"):
        return False
    return role == "viewer" or (role == "site" and _SITE_PATHS.fullmatch(path) is not None)


class Gate:
    """ASGI middleware that identifies the caller and refuses what the role doesn't allow."""

    def __init__(self, app: ASGIApp, store: Store) -> None:
        self._app = app
        self._store = store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http" or is_open(scope["method"], scope["path"]):
            await self._app(scope, receive, send)
            return
        try:
            scope["state"]["identity"] = await self._admit(scope)
        except FedNanoError as error:
            response = problem_response(error, scope["state"]["request_id"])
            if isinstance(error, Unauthenticated) and _cookie(scope):
                response.headers.append("Set-Cookie", expired_cookie(scope))
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _admit(self, scope: Scope) -> Identity:
        """Who is calling; raises Unauthenticated or PermissionDenied."""
        headers, method, path = Headers(scope=scope), scope["method"], scope["path"]
        sent = headers.get("authorization")
        secret = read_bearer(sent) if sent is not None else _cookie(scope)
        if not secret:
            raise Unauthenticated
        identity = await self._store.identify(secret)
        scope["state"]["secret"] = secret
        if not may(identity.role, method, path):
            raise PermissionDenied
        if sent is None and method not in _READING and headers.get("x-fednano") != "1":
            raise PermissionDenied("a cookie alone changes nothing: send the header X-FedNano: 1")
        return identity


def _cookie(scope: Scope) -> str:
    """The token in the dashboard's cookie; empty where there is none."""
    try:
        cookies = SimpleCookie(Headers(scope=scope).get("cookie", ""))
    except CookieError:
        return ""
    found = cookies.get(cookie_name(scope))
    return found.value if found else ""
