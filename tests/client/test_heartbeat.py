"""A task that nobody wants any more is given up, and the next one is not touched by that."""

from __future__ import annotations

import time

import pytest
from fednano.client.coordination import Membership
from fednano.client.heartbeat import Heartbeat, TaskGivenUp
from fednano.wire import coordinator_pb2 as pb
from fednano.wire.errors import SessionEnded, Unavailable
from fednano.wire.run_config import RunConfig

MEMBER = Membership("r", "s", RunConfig(name="r"), "token", 0, 1)


class Coordinator:
    """Answers heartbeats with what it is told to."""

    def __init__(self) -> None:
        self.stop: object = None
        self.failure: Exception | None = None
        self.heard: list[str] = []

    def heartbeat(
        self, member: Membership, task: object, progress: float, doing: str, report: bool = False
    ) -> pb.HeartbeatReply:
        self.heard.append(doing)
        if self.failure:
            raise self.failure
        stop = task is not None and task is self.stop
        return pb.HeartbeatReply(stop=stop, reason="the run was stopped" if stop else "")


def beating(coordinator: Coordinator) -> Heartbeat:
    return Heartbeat(coordinator, MEMBER, 0.01)  # type: ignore[arg-type]


def work_on(heartbeat: Heartbeat, task: object, seconds: float = 0.2) -> None:
    with heartbeat.on(task, f"task {task}"):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            heartbeat.progress(0.5)
            time.sleep(0.005)


def test_a_task_is_given_up_and_the_next_one_done() -> None:
    coordinator = Coordinator()
    coordinator.stop = "one"
    with beating(coordinator) as heartbeat:
        with pytest.raises(TaskGivenUp, match="the run was stopped"):
            work_on(heartbeat, "one", 5)
        heartbeat.check()
        work_on(heartbeat, "two")
    assert coordinator.heard[-1] == "waiting"


def test_a_coordinator_away_for_a_while_stops_nothing() -> None:
    coordinator = Coordinator()
    coordinator.failure = Unavailable("gone")
    with beating(coordinator) as heartbeat:
        work_on(heartbeat, "one")
    assert len(coordinator.heard) > 2


def test_an_ended_session_ends_the_work() -> None:
    coordinator = Coordinator()
    coordinator.failure = SessionEnded("fenced")
    with pytest.raises(SessionEnded), beating(coordinator) as heartbeat:
        work_on(heartbeat, "one", 5)
