"""The ledger's sums are what the kernel counted on the clients' sockets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fednano.lab.federation import Federation

from tests.lab.conftest import small_run, state_of, wait_for
from tests.lab.relay import Counted, Relay

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]
CLIENTS = ("client-1", "client-2")
Relays = tuple[Relay, Relay]


@pytest.fixture
def relays(federation: Federation) -> Iterator[Relays]:
    """Of coordinator and LLM service, for every connection of every client."""
    addresses = federation.addresses
    ports = (int(address.rsplit(":", 1)[1]) for address in (addresses.grpc, addresses.llm))
    coordinator, llm = (Relay(port) for port in ports)
    with coordinator, llm:
        yield coordinator, llm


def start(federation: Federation, relays: Relays, run: str, *names: str, **more: str) -> None:
    coordinator, llm = (relay.address for relay in relays)
    for name in names:
        role = "evaluator" if name == "evaluator" else "trainer"
        settings = {"once": "true", "coordinator": coordinator, "llm": llm, **more}
        federation.start_client(name, run, role, **settings)


def wait_for_end(federation: Federation, run: str, *names: str) -> None:
    """Of the run, and of the clients: the last that they report is what they spent."""
    wait_for(lambda: state_of(federation, run) in ("finished", "failed", "stopped"), run)
    wait_for(lambda: all(federation.processes.status(n) is not None for n in names), "their end")


def totals_of(federation: Federation, run: str) -> dict[str, Any]:
    with federation.rest() as api:
        found: dict[str, Any] = api.get(f"runs/{run}/ledger").raise_for_status().json()["totals"]
    return found


def assert_agree(totals: dict[str, Any], relays: Relays, within: float) -> None:
    counted = sum((relay.counted() for relay in relays), Counted())
    assert sum(totals["sent"].values()) == pytest.approx(counted.sent, rel=within)
    assert sum(totals["received"].values()) == pytest.approx(counted.received, rel=within)


@pytest.mark.parametrize("wire", ["dense", "factored"])
def test_a_run_s_bytes_are_those_of_the_sockets(
    federation: Federation, relays: Relays, wire: str
) -> None:
    run = f"counted-{wire}"
    data = {"limit": 96, "evaluation_limit": 16}
    federation.create_run(small_run(run, rounds=2, data=data, training={"wire": wire}))
    start(federation, relays, run, "evaluator", *CLIENTS)
    wait_for_end(federation, run, "evaluator", *CLIENTS)
    assert state_of(federation, run) == "finished"
    assert_agree(totals_of(federation, run), relays, within=0.02)


def test_waiting_is_counted_too(federation: Federation, relays: Relays) -> None:
    """Of a client that does nothing but ask for a task and say that it lives. Its messages are so
    small that half of it is framing, which is an estimate."""
    federation.create_run(small_run("waiting"))
    start(federation, relays, "waiting", "client-1", heartbeat_seconds="0.05")
    coordinator = relays[0]
    wait_for(lambda: coordinator.counted().sent > 40_000, "many heartbeats")
    with federation.rest() as api:
        api.post("runs/waiting/stop").raise_for_status()
    wait_for_end(federation, "waiting", "client-1")
    totals = totals_of(federation, "waiting")
    assert totals["sent"].keys() == {"control", "framing"}
    assert_agree(totals, relays, within=0.05)
