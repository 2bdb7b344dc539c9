"""What a client counts of its own doings, and what of it a report takes along."""

from __future__ import annotations

import threading
import time

from fednano.client.meter import Meter


def busy(seconds: float) -> None:
    """Keeps this thread's CPU at work for so long."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_a_report_starts_again_at_nothing() -> None:
    meter = Meter()
    meter.message("sent", "control", 100)
    meter.chunk("received", "gradients", 70_000)
    meter.add_server_seconds(0.25)
    costs = meter.take()
    assert costs.sent_bytes == {"control": 100, "framing": 14}
    assert costs.received_bytes["gradients"] == 70_000
    assert costs.server_seconds == 0.25
    again = meter.take()
    assert (again.sent_bytes, again.received_bytes, again.server_seconds) == ({}, {}, 0)


def test_a_report_has_what_carries_it_and_that_counts_once() -> None:
    meter = Meter()
    assert meter.take({"adapters": 500}).sent_bytes == {"adapters": 500}
    meter.add("sent", "adapters", 500)  # as it leaves
    assert meter.take().sent_bytes == {}
    meter.add("sent", "adapters", 500)  # and again, as the first try failed
    assert meter.take().sent_bytes == {"adapters": 500}


def test_what_was_reported_ahead_and_did_not_leave_is_made_up_for() -> None:
    """An update that is refused at its head, then another one."""
    meter = Meter()
    meter.take({"adapters": 500})
    assert meter.take({"adapters": 300}).sent_bytes == {}
    meter.add("sent", "adapters", 300)
    meter.add("sent", "adapters", 300)
    assert meter.take().sent_bytes == {"adapters": 100}  # 600 left, 500 were told


def test_what_nobody_heard_is_told_again() -> None:
    meter = Meter()
    meter.add("sent", "embeddings", 7)
    meter.add("received", "gradients", 8)
    meter.add_server_seconds(2)
    busy(0.05)
    lost = meter.take()
    meter.put_back(lost)
    again = meter.take()
    assert (again.sent_bytes, again.received_bytes) == (lost.sent_bytes, lost.received_bytes)
    assert again.server_seconds == 2
    assert again.client_seconds >= lost.client_seconds >= 0.05


def test_compute_is_that_of_all_threads_and_waiting_is_none() -> None:
    meter = Meter()
    other = threading.Thread(target=busy, args=(0.1,))
    other.start()
    busy(0.1)
    other.join()
    assert meter.take().client_seconds >= 0.2
    time.sleep(0.5)
    assert meter.take().client_seconds < 0.25
