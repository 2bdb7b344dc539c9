"""The coordinator over HTTP: REST under /api/v1, health, metrics, documentation and the dashboard."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from fednano import __version__, logs, tracing
from fednano.coordinator import login, rest_runs
from fednano.coordinator.access import Gate
from fednano.coordinator.envelope import QUIET, Envelope
from fednano.coordinator.events import EventStreams
from fednano.coordinator.problems import MEDIA_TYPE, FieldProblem, ProblemReply, handle
from fednano.coordinator.rest_models import (
    HealthReply,
    MemoryReply,
    NewTokenReply,
    TokenList,
    TokenReply,
    TokenRequest,
)
from fednano.coordinator.rest_runs import StoreDep
from fednano.coordinator.store import Store
from fednano.settings import ListenerTls
from fednano.wire.errors import FedNanoError, Unavailable

_DASHBOARD = Path(__file__).parent / "dashboard"
_READY_SECONDS = 2.0

TokenId = Annotated[str, PathParameter(max_length=100, description="not the secret")]
service = APIRouter(tags=["service"])
operations = APIRouter(tags=["operations"])
pages = APIRouter(include_in_schema=False)


class HasRegistry(Protocol):
    """The coordinator's metrics, as far as this module needs them."""

    registry: CollectorRegistry

    async def refresh(self, store: Store) -> None: ...


class Files(StaticFiles):
    """The dashboard's files; browsers ask again each time, so that an upgrade is seen at once."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response


def make_app(
    *,
    store: Store,
    settings: ListenerTls,
    metrics: HasRegistry,
    works: Callable[[], bool] = lambda: True,
) -> FastAPI:
    """The application; `works` tells /readyz whether the rest of the process does.

    `app.state.streams.close()` must be called before its server stops.
    """
    app = FastAPI(
        title="FedNano coordinator",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry=tracing.for_fastapi(QUIET),
        middleware=[Middleware(Envelope), Middleware(Gate, store=store)],
    )
    app.state.store = store
    app.state.metrics = metrics
    app.state.works = works
    app.state.streams = EventStreams(store)
    app.state.tls = settings.server_tls() is not None
    for error in (FedNanoError, RequestValidationError, HTTPException):
        app.add_exception_handler(error, handle)
    _add_routes(app)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _add_routes(app: FastAPI) -> None:
    for router in (rest_runs.router, operations, login.router):
        app.include_router(router, prefix="/api/v1", dependencies=[Depends(name_run)])
    app.include_router(service)
    app.include_router(pages)
    app.mount("/static", Files(directory=_DASHBOARD / "static"), name="static")


async def name_run(request: Request) -> None:
    """Lines of a request about a run or a round tell which. (Not a plain function: FastAPI would run
    that in a thread, and what is bound there is lost.)"""
    run, number = (request.path_params.get(name, "") for name in ("run", "number"))
    if run:
        logs.bind(run=logs.printable(run))
    if number.isdecimal():
        logs.bind(round=int(number[:9]))


@service.get("/healthz", summary="Whether the process is alive; open to all")
async def healthz() -> HealthReply:
    return HealthReply(status="alive")


@service.get("/readyz", summary="Whether the coordinator can work; open to all")
async def readyz(request: Request, store: StoreDep) -> HealthReply:
    """503 while Redis is away, and once this process can't lead any more."""
    if not request.app.state.works():
        raise Unavailable("this coordinator has ceased to lead; it must be started again")
    try:
        await asyncio.wait_for(store.ping(), _READY_SECONDS)
    except (FedNanoError, TimeoutError):
        raise Unavailable("Redis can't be reached") from None
    return HealthReply(status="ready")


@service.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"description": "metrics", "content": {"text/plain": {}}}},
)
async def show_metrics(request: Request, store: StoreDep) -> Response:
    """While Redis is away, what it holds is reported as it last was."""
    metrics: HasRegistry = request.app.state.metrics
    with suppress(FedNanoError):
        await metrics.refresh(store)
    body = generate_latest(metrics.registry)
    return Response(body, headers={"Content-Type": CONTENT_TYPE_LATEST})


@operations.get("/memory", summary="How full Redis is")
async def show_memory(store: StoreDep) -> MemoryReply:
    return MemoryReply.of(await store.memory())


@operations.post("/tokens", summary="Make a token", status_code=201)
async def create_token(wanted: TokenRequest, store: StoreDep) -> NewTokenReply:
    """The secret is in this reply and nowhere else: only its hash is kept."""
    record, secret = await store.create_token(wanted.name, wanted.role)
    return NewTokenReply.of(record, secret)


@operations.get("/tokens", summary="List tokens, without their secrets")
async def list_tokens(store: StoreDep) -> TokenList:
    return TokenList(items=[TokenReply.model_validate(t) for t in await store.tokens()])


@operations.delete("/tokens/{token_id}", summary="Revoke a token")
async def revoke_token(token_id: TokenId, store: StoreDep) -> TokenReply:
    """It is refused from now on, and stays in the list as revoked."""
    return TokenReply.model_validate(await store.revoke_token(token_id))


@pages.get("/", summary="The dashboard")
async def dashboard() -> FileResponse:
    return FileResponse(_DASHBOARD / "index.html", headers={"Cache-Control": "no-cache"})


@pages.get("/docs", summary="This API, readable")
async def docs() -> FileResponse:
    return FileResponse(_DASHBOARD / "docs.html", headers={"Cache-Control": "no-cache"})


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The schema, with bearer tokens and problem+json as they are at this service."""
    if app.openapi_schema:
        return app.openapi_schema
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    components = schema.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    for model in (FieldProblem, ProblemReply):
        schemas[model.__name__] = model.model_json_schema(
            ref_template="#/components/schemas/{model}"
        )
        schemas[model.__name__].pop("$defs", None)
    components["securitySchemes"] = {
        "token": {"type": "http", "scheme": "bearer"},
    }
    for path, operations_of in schema["paths"].items():
        for operation in operations_of.values():
            _describe_errors(operation)
            operation["security"] = [] if path in ("/healthz", "/readyz") else [{"token": []}]
    app.openapi_schema = schema
    return schema


def _describe_errors(operation: dict[str, Any]) -> None:
    operation["responses"].pop("422", None)
    problem = {"schema": {"$ref": "#/components/schemas/ProblemReply"}}
    operation["responses"]["default"] = {
        "description": "refused or failed",
        "content": {MEDIA_TYPE: problem},
    }
