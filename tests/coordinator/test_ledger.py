"""What clients spent is counted once, whatever became of their work, and shown everywhere alike."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from fednano.coordinator.store_members import Spent
from fednano.coordinator.store_updates import EvaluationMeta, UpdateMeta

from tests.coordinator import web
from tests.coordinator.played import Federation
from tests.coordinator.web import Site

site = web.site
SPENT = Spent({"embeddings": 700, "framing": 30}, {"gradients": 500}, 1.5, 0.5)
Report = Callable[[Federation, str], Awaitable[bool]]
"""A client's report under a request's name; whether it was counted."""


async def refused(federation: Federation, request: str) -> bool:
    sender = replace(federation.sender("site-0", 1, 1), request=request)
    claim = await federation.store.updates.claim(sender, {}, UpdateMeta(1), SPENT, "too long")
    assert claim.result == "refused"
    return claim.counted


async def late(federation: Federation, request: str) -> bool:
    if (await federation.store.run("trial")).round == 1:
        await federation.play(1)
    sender = replace(federation.sender("site-0", 1, 1), request=request)
    answer = EvaluationMeta("trainer", {}, {})
    claim = await federation.store.updates.claim_evaluation(sender, answer, SPENT)
    assert claim.result == "late"
    return claim.counted


async def evaluation_refused(federation: Federation, request: str) -> bool:
    sender = replace(federation.sender("site-0", 1, 1), request=request)
    answer = EvaluationMeta("trainer", {}, {})
    claim = await federation.store.updates.claim_evaluation(sender, answer, SPENT, "not asked")
    assert claim.result == "refused"
    return claim.counted


async def waiting(federation: Federation, request: str) -> bool:
    member = federation.members["site-0"]
    return await federation.store.members.beat("trial", member, 1, SPENT, request)


async def rows_of(site: Site, number: int) -> dict[str, dict[str, Any]]:
    """Of one round, by client."""
    items = (await site.http.get(f"/runs/trial/ledger?round={number}")).json()["items"]
    assert {row["round"] for row in items} <= {number}
    return {row["client"]: row for row in items}


@pytest.mark.parametrize("report", [refused, late, evaluation_refused, waiting])
async def test_a_report_counts_once_however_often_it_is_repeated(
    site: Site, report: Report
) -> None:
    federation = await site.federation()
    await federation.play(1)
    assert await report(federation, "first")
    before = (await rows_of(site, 1))["site-0"]
    assert before["sent_bytes"]["embeddings"] % 1000 == 700
    assert not await report(federation, "first")
    assert (await rows_of(site, 1))["site-0"] == before
    assert await report(federation, "second")
    after = (await rows_of(site, 1))["site-0"]
    assert after["sent_bytes"]["framing"] == before["sent_bytes"].get("framing", 0) + 30
    assert after["server_seconds"] == pytest.approx(before["server_seconds"] + 0.5)


async def test_an_evaluation_of_a_round_to_come_counts_nowhere(site: Site) -> None:
    """Else anybody with a session could fill Redis with rows."""
    federation = await site.federation()
    answer = EvaluationMeta("trainer", {}, {})
    claim = await site.store.updates.claim_evaluation(
        federation.sender("site-0", 7, 1), answer, SPENT
    )
    assert (claim.result, claim.counted) == ("late", False)
    assert await rows_of(site, 7) == {}


async def test_the_totals_are_the_sum_of_the_rows(site: Site) -> None:
    await (await site.federation()).play(4)
    page = (await site.http.get("/runs/trial/ledger")).json()
    for name in ("client_seconds", "server_seconds"):
        assert page["totals"][name] == pytest.approx(sum(row[name] for row in page["items"]))
    for way in ("sent", "received"):
        rows = [sum(row[f"{way}_bytes"].values()) for row in page["items"]]
        assert sum(page["totals"][way].values()) == sum(rows)
    by_round = [row for number in range(4) for row in (await rows_of(site, number)).values()]
    assert by_round == page["items"]


async def test_a_round_s_rows_come_in_pages(site: Site) -> None:
    await (await site.federation()).play(3)
    first = (await site.http.get("/runs/trial/ledger?round=1&limit=1")).json()
    query = f"round=1&limit=1&cursor={first['next']}"
    second = (await site.http.get(f"/runs/trial/ledger?{query}")).json()
    clients = [page["items"][0]["client"] for page in (first, second)]
    assert clients == list(await rows_of(site, 1))[:2]
