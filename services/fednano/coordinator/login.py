"""Signing a browser in: a bearer token is swapped for a cookie that scripts can't read.

The cookie holds the token itself, so that every coordinator accepts it and revoking the token ends
it. It is HttpOnly and SameSite=Strict, and Secure under TLS; what changes something needs the
header `X-FedNano: 1` beside it, which no other site can send.
"""

from __future__ import annotations

from http.cookies import SimpleCookie
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel
from starlette.types import Scope

from fednano.wire.interceptors import read_bearer
from fednano.wire.sessions import Identity

LOGIN_PATH = "/api/v1/login"
_LIFETIME_SECONDS = 12 * 3600

router = APIRouter(tags=["login"])


def caller(request: Request) -> Identity:
    """Who sent the request; the gate has put it there."""
    identity: Identity = request.state.identity
    return identity


Caller = Annotated[Identity, Depends(caller)]


class CallerReply(BaseModel):
    """Whose token this is."""

    name: str
    role: str


def cookie_name(scope: Scope) -> str:
    """Browsers share cookies between the ports of a host, so the name tells coordinators apart."""
    _, port = scope.get("server") or ("", 0)
    return f"fednano-{port}"


def _cookie(scope: Scope, value: str, max_age: int) -> str:
    cookie: SimpleCookie = SimpleCookie({cookie_name(scope): value})
    morsel = cookie[cookie_name(scope)]
    morsel["path"], morsel["max-age"] = "/", str(max_age)
    morsel["httponly"], morsel["samesite"] = True, "Strict"
    if scope["scheme"] == "https" or scope["app"].state.tls:
        morsel["secure"] = True
    return morsel.OutputString()


def expired_cookie(scope: Scope) -> str:
    """A Set-Cookie value that removes the cookie."""
    return _cookie(scope, "", 0)


@router.post("/login", summary="Swap a bearer token for a cookie")
async def log_in(request: Request, response: Response, who: Caller) -> CallerReply:
    """Needs the token in the Authorization header; used by the dashboard."""
    secret = read_bearer(request.headers.get("authorization"))
    response.headers.append("Set-Cookie", _cookie(request.scope, secret, _LIFETIME_SECONDS))
    return CallerReply(name=who.name, role=who.role)


@router.get("/login", summary="Whose token this is")
async def who_am_i(who: Caller) -> CallerReply:
    return CallerReply(name=who.name, role=who.role)


@router.delete("/login", summary="Remove the cookie", status_code=204)
async def log_out(request: Request) -> Response:
    """The token itself stays valid; revoke it with DELETE /tokens/{id}."""
    return Response(status_code=204, headers={"Set-Cookie": expired_cookie(request.scope)})
