"""REST about runs: create and steer them, read their rounds, clients, ledger, adapters and events."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from safetensors.numpy import save

from fednano.coordinator.events import EventStreams
from fednano.coordinator.login import Caller
from fednano.coordinator.records import StoredAdapter
from fednano.coordinator.rest_models import (
    ClientList,
    ClientReply,
    LedgerPage,
    LedgerReply,
    LedgerTotalsReply,
    RoundPage,
    RoundReply,
    RunPage,
    RunReply,
)
from fednano.coordinator.store import Store
from fednano.coordinator.store_runs import checked_event_id
from fednano.wire.run_config import RunConfig

router = APIRouter(tags=["runs"])


def _store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


def _streams(request: Request) -> EventStreams:
    streams: EventStreams = request.app.state.streams
    return streams


StoreDep = Annotated[Store, Depends(_store)]
StreamsDep = Annotated[EventStreams, Depends(_streams)]
RunName = Annotated[str, Path(max_length=63, description="the run's name")]
RoundNumber = Annotated[int, Path(ge=0, description="0 is the adapter before any training")]
Cursor = Annotated[str, Query(max_length=200, description="`next` of the page before")]
Limit = Annotated[int, Query(ge=1, le=1000, description="entries of a page")]
LedgerRound = Annotated[
    int | None, Query(alias="round", ge=0, lt=1 << 32, description="only the rows of this round")
]
EventId = Annotated[str, Query(pattern=r"^(now|\d{1,20}-\d{1,20})$")]
LastEventId = Annotated[str | None, Header(pattern=r"^\d{1,20}-\d{1,20}$")]


@router.post(
    "/runs",
    summary="Create a run, or find it unchanged",
    status_code=201,
    responses={200: {"model": RunReply, "description": "it was there already, unchanged"}},
)
async def create_run(
    config: RunConfig, store: StoreDep, who: Caller, response: Response
) -> RunReply:
    """201 when it is new, 200 when it exists with this very configuration, 409 with another one."""
    record, created = await store.create_run(config, who.name)
    response.status_code = 201 if created else 200
    response.headers["Location"] = f"/api/v1/runs/{record.name}"
    return RunReply.model_validate(record)


@router.get("/runs", summary="List runs")
async def list_runs(store: StoreDep, cursor: Cursor = "", limit: Limit = 50) -> RunPage:
    records, following = await store.runs(cursor, limit)
    return RunPage(items=[RunReply.model_validate(r) for r in records], next=following)


@router.get("/runs/{run}", summary="Show a run")
async def show_run(run: RunName, store: StoreDep) -> RunReply:
    return RunReply.model_validate(await store.run(run))


@router.post("/runs/{run}/{command}", summary="Pause, resume or stop a run")
async def command_run(
    run: RunName, command: Literal["pause", "resume", "stop"], store: StoreDep, who: Caller
) -> RunReply:
    """Repeating a command changes nothing; one that the run's state doesn't allow is a 409.

    A paused run finishes the round in progress and opens no other; a stopped one is over and keeps
    its results.
    """
    return RunReply.model_validate(await store.command(run, command, who.name))


@router.get("/runs/{run}/rounds", summary="List a run's rounds")
async def list_rounds(
    run: RunName, store: StoreDep, cursor: Cursor = "", limit: Limit = 100
) -> RoundPage:
    """In order of their number. A round that is being retried shows its latest attempt."""
    records, following = await store.rounds(run, cursor, limit)
    return RoundPage(items=[RoundReply.model_validate(r) for r in records], next=following)


@router.get("/runs/{run}/rounds/{number}", summary="Show a round")
async def show_round(run: RunName, number: RoundNumber, store: StoreDep) -> RoundReply:
    return RoundReply.model_validate(await store.round(run, number))


@router.get(
    "/runs/{run}/rounds/{number}/adapter",
    summary="Download a round's merged adapter",
    response_class=Response,
    responses={
        200: {"description": "safetensors", "content": {"application/octet-stream": {}}},
        304: {"description": "the caller has it: If-None-Match names its digest"},
    },
)
async def download_adapter(
    run: RunName,
    number: RoundNumber,
    store: StoreDep,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """Raw safetensors; its metadata carries scale, digest, run and round. The ETag is the digest."""
    known = (await store.round(run, number)).adapter_digest
    if known and if_none_match == f'"{known}"':
        return Response(status_code=304, headers=_caching(known))
    adapter = await store.adapter_of_round(run, number)
    content = await asyncio.to_thread(_safetensors, adapter, run, number)
    file = f'attachment; filename="{run}-round-{number}.safetensors"'
    headers = {**_caching(adapter.digest), "Content-Disposition": file}
    return Response(content, headers=headers, media_type="application/octet-stream")


def _caching(digest: str) -> dict[str, str]:
    return {"ETag": f'"{digest}"', "Cache-Control": "private, no-cache"}


def _safetensors(adapter: StoredAdapter, run: str, number: int) -> bytes:
    metadata = {
        "scale": repr(adapter.scale),
        "digest": adapter.digest,
        "run": run,
        "round": str(number),
    }
    return save(adapter.tensors, metadata)


@router.get("/runs/{run}/clients", summary="List a run's clients")
async def list_clients(run: RunName, store: StoreDep) -> ClientList:
    records = await store.clients(run)
    return ClientList(items=[ClientReply.model_validate(r) for r in records])


@router.get("/runs/{run}/ledger", summary="What every client spent")
async def show_ledger(
    run: RunName,
    store: StoreDep,
    number: LedgerRound = None,
    cursor: Cursor = "",
    limit: Limit = 1000,
) -> LedgerPage:
    """Rows by round and client; `totals` are over the whole run, whatever the page."""
    rows, following = await store.ledger(run, cursor, limit, number)
    totals = LedgerTotalsReply.model_validate(await store.ledger_totals(run))
    items = [LedgerReply.model_validate(row) for row in rows]
    return LedgerPage(items=items, next=following, totals=totals)


@router.get(
    "/runs/{run}/events",
    summary="Follow a run",
    response_class=StreamingResponse,
    responses={200: {"description": "events", "content": {"text/event-stream": {}}}},
)
async def follow_run(
    request: Request,
    run: RunName,
    store: StoreDep,
    streams: StreamsDep,
    after: EventId = "0-0",
    last_event_id: LastEventId = None,
) -> StreamingResponse:
    """Server-sent events from the first one, or after `Last-Event-ID`, or after `?after=ID`.

    `?after=now` skips what has happened so far. A comment every 15 seconds keeps the line open.
    """
    await store.run(run)
    streams.check_room()
    start = last_event_id or after
    if start == "now":
        start = await store.last_event_id(run)
    checked_event_id(start)  # while there still can be a 422
    recheck = partial(store.identify, request.state.secret)
    return StreamingResponse(
        streams.follow(run, start, recheck),
        media_type="text/event-stream",
        headers={"X-Accel-Buffering": "no"},
    )
