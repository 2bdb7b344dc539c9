"""REST over a real server, store and Redis."""

from __future__ import annotations

import json

import httpx
import pytest
from fednano.coordinator.store import Store
from safetensors.numpy import load

from tests.coordinator import web
from tests.coordinator.web import Site, config

site = web.site


def body(name: str = "trial", **fields: object) -> dict[str, object]:
    return config(name, **fields).model_dump(mode="json")


def assert_problem(reply: httpx.Response, status: int) -> dict[str, object]:
    """The reply is problem+json with all its members; returns them."""
    assert reply.status_code == status
    assert reply.headers["content-type"] == "application/problem+json"
    problem: dict[str, object] = reply.json()
    assert problem.keys() == {"type", "title", "status", "detail", "errors", "request_id"}
    assert problem["status"] == status
    assert problem["request_id"] == reply.headers["x-request-id"]
    return problem


async def test_a_run_is_created_once_and_found_unchanged_after(site: Site) -> None:
    first = await site.http.post("/runs", json=body())
    again = await site.http.post("/runs", json=body())
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.headers["location"] == "/api/v1/runs/trial"
    assert first.json() == again.json() == (await site.http.get("/runs/trial")).json()
    assert first.json()["created_by"] == "admin"


async def test_the_same_name_with_another_configuration_is_a_conflict(site: Site) -> None:
    await site.http.post("/runs", json=body())
    problem = assert_problem(await site.http.post("/runs", json=body(rounds=9)), 409)
    assert [error["field"] for error in problem["errors"]] == ["rounds"]  # type: ignore[attr-defined]


async def test_a_bad_configuration_names_every_field(site: Site) -> None:
    bad = {**body(), "cliens": 3, "training": {"epochs": 0}}
    problem = assert_problem(await site.http.post("/runs", json=bad), 422)
    named = {error["field"]: error for error in problem["errors"]}  # type: ignore[attr-defined]
    assert named["cliens"]["expected"] == "no such field"
    assert named["training.epochs"]["got"] == "0"


async def test_our_own_validators_name_their_field_too(site: Site) -> None:
    problem = assert_problem(
        await site.http.post("/runs", json={"name": "trial", "clients": 1, "min_clients": 2}), 422
    )
    expected = {"field": "min_clients", "expected": "at most clients (1)", "got": "2"}
    assert problem["errors"] == [expected]


@pytest.mark.parametrize("content", [b"{bad", b"[]", b"\xff\xfe", b"null", b""])
async def test_a_body_that_is_no_run_is_refused(site: Site, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    reply = await site.http.post("/runs", content=content, headers=headers)
    assert reply.status_code in (400, 422)
    assert_problem(reply, reply.status_code)


async def test_a_body_beyond_the_limit_is_refused(site: Site) -> None:
    headers = {"Content-Type": "application/json"}
    content = b'{"name": "' + b"a" * (1 << 20) + b'"}'
    assert_problem(await site.http.post("/runs", content=content, headers=headers), 413)


async def test_commands_move_a_run_and_refuse_what_its_state_forbids(site: Site) -> None:
    await site.federation()
    assert (await site.http.post("/runs/trial/pause")).json()["state"] == "paused"
    assert (await site.http.post("/runs/trial/resume")).json()["state"] == "running"
    assert (await site.http.post("/runs/trial/stop")).json()["state"] == "stopped"
    assert_problem(await site.http.post("/runs/trial/pause"), 409)
    assert_problem(await site.http.post("/runs/trial/rewind"), 422)


async def test_pages_follow_each_other_to_the_end(site: Site) -> None:
    for number in range(5):
        await site.http.post("/runs", json=body(f"run-{number}"))
    names, cursor = [], ""
    while True:
        page = (await site.http.get("/runs", params={"cursor": cursor, "limit": 2})).json()
        names += [run["name"] for run in page["items"]]
        cursor = page["next"]
        if not cursor:
            break
    assert names == [f"run-{number}" for number in (4, 3, 2, 1, 0)]


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "cursor=drop%20table"])
async def test_a_page_that_can_t_be_is_refused(site: Site, query: str) -> None:
    assert_problem(await site.http.get(f"/runs?{query}"), 422)


async def test_rounds_clients_and_ledger_show_what_happened(site: Site) -> None:
    await (await site.federation()).play(4)
    assert (await site.http.get("/runs/trial")).json()["state"] == "finished"
    rounds = (await site.http.get("/runs/trial/rounds")).json()["items"]
    assert [one["number"] for one in rounds] == [0, 1, 2, 3]
    assert rounds[2] == (await site.http.get("/runs/trial/rounds/2")).json()
    assert rounds[2]["clients"]["submitted"] == ["site-0", "site-1"]
    assert {"accuracy", "loss", "train_loss"} <= rounds[2]["metrics"].keys()
    clients = (await site.http.get("/runs/trial/clients")).json()["items"]
    assert [client["id"] for client in clients] == ["evaluator", "site-0", "site-1"]
    assert "session" not in clients[0]
    ledger = (await site.http.get("/runs/trial/ledger?limit=2")).json()
    assert len(ledger["items"]) == 2
    assert ledger["next"]
    every = (await site.http.get("/runs/trial/ledger")).json()["items"]
    for direction in ("sent", "received"):
        spent = [row[f"{direction}_bytes"].get("adapters", 0) for row in every]
        assert ledger["totals"][direction]["adapters"] == sum(spent)


async def test_an_adapter_is_served_as_safetensors(site: Site) -> None:
    await (await site.federation()).play(2)
    reply = await site.http.get("/runs/trial/rounds/1/adapter")
    digest = (await site.http.get("/runs/trial/rounds/1")).json()["adapter_digest"]
    stored = await site.store.adapter("trial", digest)
    assert reply.headers["content-type"] == "application/octet-stream"
    assert reply.headers["etag"] == f'"{digest}"'
    assert (
        reply.headers["content-disposition"] == 'attachment; filename="trial-round-1.safetensors"'
    )
    tensors = load(reply.content)
    assert {name: value.tobytes() for name, value in tensors.items()} == {
        name: value.tobytes() for name, value in stored.tensors.items()
    }
    length = int.from_bytes(reply.content[:8], "little")
    metadata = json.loads(reply.content[8 : 8 + length])["__metadata__"]
    assert metadata == {"scale": "2.0", "digest": digest, "run": "trial", "round": "1"}


async def test_an_adapter_that_the_caller_has_is_not_sent_again(site: Site) -> None:
    await (await site.federation()).play(1)
    etag = (await site.http.get("/runs/trial/rounds/0/adapter")).headers["etag"]
    path = "/runs/trial/rounds/0/adapter"
    reply = await site.http.get(path, headers={"If-None-Match": etag})
    assert (reply.status_code, reply.content) == (304, b"")


@pytest.mark.parametrize(
    "path",
    [
        "/runs/none",
        "/runs/none/rounds",
        "/runs/none/clients",
        "/runs/none/ledger",
        "/runs/none/events",
        "/runs/trial/rounds/7",
        "/runs/trial/rounds/7/adapter",
        "/nothing/here",
    ],
)
async def test_what_is_not_there_is_a_404_with_a_sentence(site: Site, path: str) -> None:
    await site.http.post("/runs", json=body())
    assert assert_problem(await site.http.get(path), 404)["detail"]


async def test_a_method_that_a_path_lacks_is_a_405(site: Site) -> None:
    reply = await site.http.patch("/runs")
    assert_problem(reply, 405)
    assert reply.headers["allow"]


async def test_the_request_id_is_the_caller_s_or_a_new_one(site: Site) -> None:
    mine = await site.http.get("/runs", headers={"X-Request-ID": "trace-17.a_b"})
    forged = await site.http.get("/runs", headers={"X-Request-ID": 'x"; drop'})
    assert mine.headers["x-request-id"] == "trace-17.a_b"
    assert len(forged.headers["x-request-id"]) == 32


async def test_tokens_are_made_listed_and_revoked(site: Site) -> None:
    made = await site.http.post("/tokens", json={"name": "ward-3", "role": "site"})
    assert made.status_code == 201
    secret = made.json()["secret"]
    listed = await site.http.get("/tokens")
    assert secret not in listed.text
    assert [token["name"] for token in listed.json()["items"]] == ["ward-3"]
    gone = await site.http.delete(f"/tokens/{made.json()['id']}")
    assert gone.json()["revoked"] is True
    reply = await site.http.get("/runs", headers={"Authorization": f"Bearer {secret}"})
    assert_problem(reply, 401)
    assert_problem(await site.http.delete("/tokens/nobody"), 404)


async def test_an_unexpected_error_leaks_nothing(site: Site) -> None:
    async def broken() -> None:
        raise RuntimeError("the password is swordfish")

    site.app.add_api_route("/api/v1/broken", broken)
    problem = assert_problem(await site.http.get("/broken"), 500)
    assert "swordfish" not in json.dumps(problem)


async def test_readiness_follows_redis(site: Site) -> None:
    assert (await site.http.get(f"{site.url}/readyz")).json() == {"status": "ready"}
    site.app.state.store = away = Store.connect("redis://127.0.0.1:1/0")
    assert_problem(await site.http.get(f"{site.url}/readyz"), 503)
    assert (await site.http.get(f"{site.url}/healthz")).status_code == 200
    await away.close()


async def test_metrics_are_prometheus_text(site: Site) -> None:
    await site.http.post("/runs", json=body())
    reply = await site.http.get(f"{site.url}/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=")
    assert 'fednano_runs{state="created"} 1.0' in reply.text


async def test_memory_is_told(site: Site) -> None:
    memory = (await site.http.get("/memory")).json()
    assert memory["used_bytes"] > 0


async def test_security_headers_are_on_every_reply(site: Site) -> None:
    for path in ("/", "/static/dashboard.js", "/healthz", "/api/v1/runs", "/nothing"):
        headers = (await site.http.get(f"{site.url}{path}")).headers
        assert headers["content-security-policy"].startswith("default-src 'self'")
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


async def test_every_route_is_described(site: Site) -> None:
    schema = (await site.http.get(f"{site.url}/openapi.json")).json()
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            assert operation.get("summary"), f"{method} {path}"
            errors = operation["responses"]["default"]["content"]
            assert list(errors) == ["application/problem+json"], f"{method} {path}"
    text = json.dumps(schema)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in schema["components"]["schemas"]


async def test_a_path_is_logged_without_control_characters(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG"):
        await site.http.get(f"{site.url}/%1b]0;owned%07/" + "x" * 1000)
    record = next(record for record in caplog.records if record.message == "http request")
    path: str = record.path  # type: ignore[attr-defined]
    assert path.startswith("/%1B%5D0;owned%07/x")
    assert len(path) <= 300


async def test_the_pages_load_nothing_from_elsewhere(site: Site) -> None:
    for path in ("/", "/docs"):
        page = (await site.http.get(f"{site.url}{path}")).text
        assert "http://" not in page
        assert "https://" not in page
