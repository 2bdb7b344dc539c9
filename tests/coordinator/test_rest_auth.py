"""Every route, known or not, with and without a token."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import httpx
import pytest
from fastapi import FastAPI
from fednano.coordinator.access import is_open, may
from starlette.routing import Mount, Route

from tests.coordinator import web
from tests.coordinator.web import ADMIN, Site, bearer, config

site = web.site
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
UNKNOWN = ("/nothing", "/api/v1/nothing", "/api/v2/runs", "/admin", "/docs/", "/static", "//")
VALUES = {"run": "trial", "number": "0", "command": "pause", "token_id": "x"}
SITE_READS = {
    "/api/v1/runs",
    "/api/v1/runs/trial",
    "/api/v1/runs/trial/rounds",
    "/api/v1/runs/trial/rounds/0",
    "/api/v1/runs/trial/rounds/0/adapter",
    "/api/v1/login",
}


def filled(path: str) -> str:
    """The path with a value for each parameter."""
    return re.sub(r"\{(\w+)\}", lambda match: VALUES[match[1]], path)


def walk(routes: object) -> Iterator[str]:
    """The path of every route, however deep, with its parameters filled in."""
    for route in routes:  # type: ignore[attr-defined]
        nested = getattr(route, "original_router", None)
        if nested is not None:
            prefix = getattr(getattr(route, "include_context", None), "prefix", "")
            yield from (prefix + path for path in walk(nested.routes))
        elif isinstance(route, Mount):
            yield f"{route.path}/dashboard.js"
        elif isinstance(route, Route) or hasattr(route, "path"):
            yield filled(route.path)


def paths(app: FastAPI) -> list[str]:
    return sorted({*walk(app.routes)})


async def send(site: Site, method: str, path: str, headers: dict[str, str]) -> httpx.Response:
    """Only the head of the reply: an event stream has no end."""
    request = httpx.Request(method, f"{site.url}{path}", headers=headers)  # no client's headers
    reply = await site.http.send(request, stream=True)
    await reply.aclose()
    return reply


def test_the_walk_finds_the_routes_that_openapi_tells(site: Site) -> None:
    told = {filled(path) for path in site.app.openapi()["paths"]}
    assert told <= set(paths(site.app))
    assert {"/docs", "/", "/openapi.json"} <= set(paths(site.app))


@pytest.mark.parametrize("headers", [{}, bearer("wrong"), {"Authorization": "Basic YTpi"}])
async def test_nothing_but_health_and_empty_pages_is_open(
    site: Site, headers: dict[str, str]
) -> None:
    for path in [*paths(site.app), *UNKNOWN]:
        for method in METHODS:
            reply = await send(site, method, path, headers)
            if is_open(method, path):
                assert reply.status_code in (200, 404, 405), f"{method} {path}"
            else:
                assert reply.status_code == 401, f"{method} {path}"
                assert reply.headers["www-authenticate"] == "Bearer"
                assert reply.headers["content-type"] == "application/problem+json"


def test_only_these_are_open() -> None:
    opened = [path for path in ("/", "/healthz", "/readyz", "/static/x") if is_open("GET", path)]
    closed = ("/metrics", "/docs", "/openapi.json", "/api/v1/runs", "/static", "/healthz/x", "")
    assert len(opened) == 4
    assert not any(is_open("GET", path) for path in closed)
    assert not any(is_open(method, "/") for method in ("POST", "PUT", "DELETE", "OPTIONS"))


async def test_an_unknown_path_looks_like_a_known_one_from_outside(site: Site) -> None:
    await site.http.post("/runs", json=config().model_dump(mode="json"))
    replies = [await send(site, "GET", f"/api/v1/runs/{run}", {}) for run in ("trial", "none")]
    assert replies[0].status_code == replies[1].status_code == 401
    assert replies[0].headers["content-length"] == replies[1].headers["content-length"]


@pytest.mark.parametrize("role", ["viewer", "site"])
async def test_a_role_gets_what_it_is_for_and_no_more(site: Site, role: str) -> None:
    await (await site.federation()).play(1)
    headers = bearer(await site.token(role))
    for path in paths(site.app):
        for method in METHODS:
            if is_open(method, path):
                continue
            reply = await send(site, method, path, headers)
            if may(role, method, path):
                assert reply.status_code != 403, f"{role} {method} {path}"
            else:
                assert reply.status_code == 403, f"{role} {method} {path}"
    assert (await site.http.get("/runs/trial")).json()["state"] == "running"


async def test_a_site_reads_runs_rounds_and_adapters_only(site: Site) -> None:
    await (await site.federation()).play(1)
    headers = bearer(await site.token("site"))
    readable = {
        path
        for path in paths(site.app)
        if not is_open("GET", path)
        and (await send(site, "GET", path, headers)).status_code in (200, 304)
    }
    assert readable == SITE_READS


async def test_a_viewer_reads_everything_but_tokens(site: Site) -> None:
    await (await site.federation()).play(1)
    headers = bearer(await site.token("viewer"))
    for path in paths(site.app):
        reply = await send(site, "GET", path, headers)
        refused = path.startswith("/api/v1/tokens")
        assert (reply.status_code == 403) == refused, path


async def test_an_unknown_role_may_do_nothing() -> None:
    assert not may("", "GET", "/api/v1/runs")
    assert not may("root", "GET", "/metrics")


async def test_the_cookie_is_hidden_from_scripts_and_other_sites(site: Site) -> None:
    reply = await site.http.post("/login")
    assert reply.json() == {"name": "admin", "role": "admin"}
    cookie = reply.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert "Secure" not in cookie  # a browser would drop it without TLS


async def test_under_tls_the_cookie_is_secure(site: Site) -> None:
    site.app.state.tls = True
    assert "Secure" in (await site.http.post("/login")).headers["set-cookie"]


@asynccontextmanager
async def cookie_client(site: Site, secret: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client that has signed in and keeps nothing but the cookie."""
    async with httpx.AsyncClient(base_url=f"{site.url}/api/v1", trust_env=False) as http:
        assert (await http.post("/login", headers=bearer(secret))).status_code == 200
        yield http


async def test_a_cookie_alone_reads_but_changes_nothing(site: Site) -> None:
    async with cookie_client(site, ADMIN) as http:
        assert (await http.get("/runs")).status_code == 200
        body = config().model_dump(mode="json")
        assert (await http.post("/runs", json=body)).status_code == 403
        assert (await http.post("/runs", json=body, headers={"X-FedNano": "1"})).status_code == 201


async def test_logging_out_removes_the_cookie(site: Site) -> None:
    async with cookie_client(site, ADMIN) as http:
        assert (await http.delete("/login", headers={"X-FedNano": "1"})).status_code == 204
        assert (await http.get("/runs")).status_code == 401


async def test_a_revoked_token_s_cookie_is_refused_and_removed(site: Site) -> None:
    record, secret = await site.store.create_token("eve", "viewer")
    async with cookie_client(site, secret) as http:
        await site.store.revoke_token(record.id)
        reply = await http.get("/runs")
        assert reply.status_code == 401
        assert "Max-Age=0" in reply.headers["set-cookie"]


async def test_a_cookie_can_t_be_swapped_for_another(site: Site) -> None:
    async with cookie_client(site, ADMIN) as http:
        assert (await http.post("/login", headers={"X-FedNano": "1"})).status_code == 401


async def test_no_other_origin_is_allowed_in(site: Site) -> None:
    headers = {"Origin": "https://evil.example"}
    reply = await site.http.get("/runs", headers=headers)
    assert not [name for name in reply.headers if name.startswith("access-control")]
