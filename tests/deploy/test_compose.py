"""`docker compose up`, for real: the run completes; then every part is killed and stopped in turn.

Needs a Docker engine: `make test-compose`. The tests are one story and run in their order.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial

import httpx
import pytest
import redis
from fednano.coordinator import keys
from fednano.lab.redis_server import free_port

from tests.deploy.runs import STEADY, until
from tests.deploy.stack import ROOT, Stack, engine_missing

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def stack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """The shipped file as it stands, up and healthy."""
    if reason := engine_missing():
        pytest.skip(f"no Docker engine: {reason}")
    made = Stack("fednano-test", free_port(), tmp_path_factory.mktemp("compose"))
    made.compose("down", "--volumes", "--remove-orphans", "--timeout", "1")
    try:
        made.compose("build")
        made.compose("up", "--detach", "--wait")
        yield made
    finally:
        if request.session.testsfailed:
            sys.stdout.write(made.compose("logs", "--no-color", "--tail", "60"))
        made.compose("down", "--volumes", "--timeout", "10")


def test_the_run_of_the_shipped_file_completes(stack: Stack) -> None:
    run = stack.run_ends("compose", seconds=600)
    assert len(run["members"]) == 4
    assert set(run["members"]) == {name[:12] for name in stack.containers("client")}
    rounds = stack.rounds("compose")
    assert [found["number"] for found in rounds] == list(range(11))
    assert all(len(found["clients"]["submitted"]) == 4 for found in rounds[1:])
    before, after = rounds[0]["metrics"]["accuracy"], rounds[-1]["metrics"]["accuracy"]
    assert before < 0.80
    assert after > 0.85


def test_its_adapters_are_in_redis(stack: Stack) -> None:
    password = (stack.secrets / "redis.password").read_text().strip()
    with redis.Redis(stack.address("redis"), password=password) as state:
        for found in stack.rounds("compose"):
            assert state.strlen(keys.adapter("compose", found["adapter_digest"])) > 32_000


def test_nothing_is_published_but_http_on_loopback(stack: Stack) -> None:
    published = {}
    for container in stack.compose("ps", "--quiet").split():
        found = stack.inspect(container)
        ports = found["NetworkSettings"]["Ports"]
        published |= {port: where for port, where in ports.items() if where}
    assert published == {"8080/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(stack.port)}]}
    bare = httpx.get(f"http://127.0.0.1:{stack.port}/api/v1/runs")
    assert bare.status_code == 401


def test_a_client_reaches_no_redis_and_writes_nowhere(stack: Stack) -> None:
    container = stack.containers("client")[0]
    script = f"""
import pathlib, socket
try:
    socket.create_connection(({stack.address("redis")!r}, 6379), timeout=3)
    print("reached redis")
except OSError:
    pass
for place in ("/", "/opt/fednano", "/var/lib/fednano"):
    try:
        (pathlib.Path(place) / "written").write_text("")
        print("wrote", place)
    except OSError:
        pass
"""
    assert stack.compose("exec", "-T", "client", "python", "-c", script) == ""
    status = stack.compose("exec", "-T", "client", "cat", "/proc/self/status")
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    assert stack.inspect(container)["HostConfig"]["ReadonlyRootfs"]


@pytest.fixture(scope="module")
def undisturbed(stack: Stack) -> list[str]:
    """The adapters' digests, round by round, of a run that nothing happens to."""
    stack.create({"name": "undisturbed", **STEADY})
    stack.run_ends("undisturbed", seconds=400)
    return [found["adapter_digest"] for found in stack.rounds("undisturbed")]


def restarted(stack: Stack, container: str) -> bool:
    state = stack.inspect(container)
    return bool(state["State"]["Running"]) and state["RestartCount"] > 0


def client_back(stack: Stack, run: str, container: str) -> bool:
    """Whether the coordinator has heard from it since its restart."""
    if not restarted(stack, container):
        return False
    started = datetime.fromisoformat(
        stack.inspect(container)["State"]["StartedAt"][:26] + "+00:00"
    ).timestamp()
    found = stack.get(f"/runs/{run}/clients") or {"items": []}
    return any(
        client["id"] == container[:12] and client["joined_at"] and client["last_seen"] > started
        for client in found["items"]
    )


def test_killing_every_part_in_turn_changes_no_byte(
    stack: Stack, undisturbed: list[str], say: Callable[[str], None]
) -> None:
    stack.create({"name": "killed", **STEADY})
    client = stack.containers("client")[0]
    back: dict[str, Callable[[], bool]] = {
        "llm": stack.llm_serves,
        "coordinator": stack.coordinator_serves,
        "redis": stack.redis_serves,
        "client": lambda: client_back(stack, "killed", client),
    }
    done = 0
    for service, serves in back.items():
        done = stack.trains("killed", after=done)
        container = stack.containers(service)[0]
        begin = stack.kill(container)
        until(partial(restarted, stack, container), f"{service}'s restart", 60)
        until(serves, f"{service} to serve again", 120)
        say(f"{service}: back {time.monotonic() - begin:.1f} s after SIGKILL")
    stack.run_ends("killed", seconds=600)
    rounds = stack.rounds("killed")
    assert [found["adapter_digest"] for found in rounds] == undisturbed
    assert all(len(found["clients"]["submitted"]) == 4 for found in rounds[1:])


def test_stopping_every_part_under_load_takes_less_than_ten_seconds_and_changes_no_byte(
    stack: Stack, undisturbed: list[str], say: Callable[[str], None]
) -> None:
    stack.create({"name": "stopped", **STEADY})
    done = 0
    for service in ("llm", "coordinator", "redis", "client"):
        done = stack.trains("stopped", after=done)
        containers = stack.containers(service)
        begin = time.monotonic()
        stack.compose("stop", "--timeout", "30", service)
        seconds = time.monotonic() - begin
        say(f"{service}: stopped in {seconds:.1f} s")
        assert seconds < 10
        assert {stack.inspect(name)["State"]["ExitCode"] for name in containers} == {0}
        stack.compose("start", service)
    stack.run_ends("stopped", seconds=600)
    assert [found["adapter_digest"] for found in stack.rounds("stopped")] == undisturbed


def test_scaled_to_eight_each_client_has_a_shard_of_its_own(stack: Stack) -> None:
    stack.compose("up", "--detach", "--wait", "--no-recreate", "--scale", "client=8")
    clients = stack.containers("client")
    until(lambda: all(map(stack.waits, clients)), "eight clients that wait for a run", 180)
    few = {"rounds": 1, "data": {"limit": 32, "evaluation_limit": 8}}
    quiet = {"clients": 64, "enrol_quiet_seconds": 15}
    stack.create({"name": "eight", **quiet, **few})
    run = stack.run_ends("eight", seconds=300)
    assert set(run["members"]) == {name[:12] for name in clients}
    members = stack.get("/runs/eight/clients")["items"]
    assert sorted(member["shard"] for member in members if member["role"] == "trainer") == [
        *range(8)
    ]
    assert len(stack.rounds("eight")[1]["clients"]["submitted"]) == 8


def test_logs_are_one_line_per_event_and_json_where_asked(stack: Stack) -> None:
    lines = stack.logs(stack.containers("coordinator")[0])
    assert any("enrolment closed" in line for line in lines)
    assert not any(line.startswith("Traceback") for line in lines)
    stack.environment["FEDNANO_LOG_JSON"] = "true"
    stack.compose("up", "--detach", "--wait", "--no-deps", "llm")
    events = [json.loads(line) for line in stack.logs(stack.containers("llm")[0])]
    assert "llm service ready" in [event["event"] for event in events]


def test_down_leaves_nothing_behind(stack: Stack) -> None:
    assert stack.left_over()
    stack.compose("down", "--volumes", "--timeout", "10")
    assert stack.left_over() == []


def test_a_missing_secret_stops_the_start_and_is_named(stack: Stack) -> None:
    (stack.secrets / "session.key").unlink()
    command = ["docker", "compose", "up", "--detach"]
    done = subprocess.run(
        command, cwd=ROOT, env=stack.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "session.key" in done.stderr
