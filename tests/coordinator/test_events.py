"""The event stream over real HTTP."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator

import httpx
import pytest
from fednano.coordinator.events import EventStreams, frame
from fednano.coordinator.records import Event
from fednano.rest_client import read_events

from tests.coordinator import web
from tests.coordinator.conftest import ADMIN, Running
from tests.coordinator.web import Site, bearer, config

site = web.site
PATH = "/runs/trial/events"


async def lines(reply: httpx.Response, seconds: float = 10) -> AsyncIterator[str]:
    """Lines of the stream; fails where none comes in time."""
    source = reply.aiter_lines()
    while True:
        try:
            yield await asyncio.wait_for(anext(source), seconds)
        except StopAsyncIteration:
            return


async def read(site: Site, count: int, path: str = PATH, last: str = "") -> list[tuple[str, str]]:
    """The id and kind of the next `count` events."""
    headers = {"Last-Event-ID": last} if last else {}
    found: list[str] = []
    async with site.http.stream("GET", path, headers=headers) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        async for line in lines(reply):
            found.append(line)
            if sum(one.startswith("data:") for one in found) == count:
                found.append("")
                break
    return [(event.id, event.kind) for event in read_events(found) if event]


async def test_a_reader_hears_everything_from_the_start(site: Site) -> None:
    await (await site.federation()).play(2)
    stored = await site.store.events("trial")
    assert await read(site, len(stored)) == [(event.id, event.kind) for event in stored]
    assert {"run", "client", "round", "update", "evaluation"} == {event.kind for event in stored}


async def test_a_reader_resumes_after_the_last_event_it_has(site: Site) -> None:
    await (await site.federation()).play(2)
    first = await read(site, 5)
    rest = await read(site, 3, last=first[-1][0])
    assert [*first, *rest] == await read(site, 8)


async def test_the_header_wins_over_the_address(site: Site) -> None:
    """A browser reconnects to the same address with the header."""
    await (await site.federation()).play(1)
    every = await read(site, 4)
    again = await read(site, 2, f"{PATH}?after=now", last=every[1][0])
    assert again == every[2:]
    assert await read(site, 2, f"{PATH}?after={every[1][0]}") == every[2:]


async def test_from_now_on_tells_only_what_is_new(site: Site) -> None:
    await site.http.post("/runs", json=config().model_dump(mode="json"))
    async with site.http.stream("GET", f"{PATH}?after=now") as reply:
        source = lines(reply)
        while await anext(source) != ": open":
            pass
        started = time.monotonic()
        await site.http.post("/runs/trial/stop")
        text = ""
        while not text.startswith("data:"):
            text = await anext(source)
        assert time.monotonic() - started < 2
        assert json.loads(text.removeprefix("data:"))["state"] == "stopped"


@pytest.mark.parametrize(
    "after",
    ["x", "1", "1-", "-1-1", "1-1;", f"{2**64}-0", f"1-{2**64}", f"{2**64 - 1}-{2**64 - 1}"],
)
async def test_an_id_that_can_t_be_is_refused(site: Site, after: str) -> None:
    await site.http.post("/runs", json=config().model_dump(mode="json"))
    assert (await site.http.get(PATH, params={"after": after})).status_code == 422
    assert (await site.http.get(PATH, headers={"Last-Event-ID": after})).status_code == 422


async def test_a_quiet_stream_is_kept_open_by_comments(site: Site) -> None:
    await site.http.post("/runs", json=config().model_dump(mode="json"))
    site.app.state.streams = EventStreams(site.store, heartbeat_seconds=0.1)
    async with site.http.stream("GET", f"{PATH}?after=now") as reply:
        async for line in lines(reply):
            if line == ": heartbeat":
                return
    pytest.fail("the stream ended")


async def test_a_revoked_reader_is_cut_off(site: Site) -> None:
    await site.http.post("/runs", json=config().model_dump(mode="json"))
    site.app.state.streams = EventStreams(site.store, heartbeat_seconds=0.1)
    record, secret = await site.store.create_token("eve", "viewer")
    async with site.http.stream("GET", PATH, headers=bearer(secret)) as reply:
        await site.store.revoke_token(record.id)
        async for _ in lines(reply):
            pass


async def test_a_reader_that_leaves_is_forgotten(site: Site) -> None:
    await site.http.post("/runs", json=config().model_dump(mode="json"))
    await read(site, 1)
    for _ in range(40):
        if site.app.state.streams.open == 0:
            return
        await asyncio.sleep(0.05)
    pytest.fail("the stream is still open")


async def test_too_many_readers_are_asked_to_come_back(site: Site) -> None:
    await site.http.post("/runs", json=config().model_dump(mode="json"))
    site.app.state.streams = EventStreams(site.store, limit=0)
    assert (await site.http.get(PATH)).status_code == 503


async def test_a_coordinator_stops_although_readers_stay(coordinator: Running) -> None:
    url = f"http://127.0.0.1:{coordinator.http_port}/api/v1"
    async with httpx.AsyncClient(base_url=url, headers=bearer(ADMIN), trust_env=False) as http:
        await http.post("/runs", json=config().model_dump(mode="json"))
        async with http.stream("GET", PATH) as reply:
            source = lines(reply)
            await anext(source)
            started = time.monotonic()
            stopping = asyncio.create_task(coordinator.server.stop())
            async for _ in source:
                pass
            await stopping
            assert time.monotonic() - started < 3


def test_a_frame_is_one_line_of_data_whatever_it_holds() -> None:
    text = frame(Event("1-1", "run", {"failure": "one\ntwo\r\n\u2028"}))
    assert len(text.splitlines()) == 4
    assert text.endswith("\n\n")
