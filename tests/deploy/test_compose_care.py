"""What docs/operate.md says, done: TLS, a site outside, saving and restoring, changing keys.

Needs a Docker engine: `make test-compose`. The tests are one story and run in their order.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fednano.lab.redis_server import free_port

from tests.deploy.runs import STEADY
from tests.deploy.stack import ROOT, Stack, engine_missing

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

PAIR = {**STEADY, "clients": 2, "min_clients": 2, "rounds": 4}
FEDNANO = [sys.executable, "-m", "fednano.cli"]


@pytest.fixture(scope="module")
def stack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """Over TLS, with two clients."""
    if reason := engine_missing():
        pytest.skip(f"no Docker engine: {reason}")
    folder = tmp_path_factory.mktemp("care")
    made = Stack("fednano-care", free_port(), folder, "docker-compose.tls.yml")
    made.environment |= {
        "FEDNANO_GRPC_PORT": str(free_port()),
        "FEDNANO_LLM_PORT": str(free_port()),
        "FEDNANO_RUN_FILE": str(ROOT / "tests/deploy/pair.yaml"),
    }
    made.compose("down", "--volumes", "--remove-orphans", "--timeout", "1")
    try:
        made.compose("build")
        made.compose("up", "--detach", "--wait", "--scale", "client=2")
        yield made
    finally:
        if request.session.testsfailed:
            sys.stdout.write(made.compose("logs", "--no-color", "--tail", "60"))
        made.compose("down", "--volumes", "--timeout", "10")


def digests(stack: Stack, run: str) -> list[str]:
    return [found["adapter_digest"] for found in stack.rounds(run)]


@pytest.fixture(scope="module")
def first(stack: Stack) -> list[str]:
    """The digests of the run of the run file."""
    stack.run_ends("pair", seconds=300)
    return digests(stack, "pair")


def test_nothing_is_said_in_the_clear(stack: Stack, first: list[str]) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{stack.port}/healthz", timeout=5)
    assert not stack.llm_serves()  # which asks without TLS


def test_a_site_outside_checks_before_it_joins(
    stack: Stack, first: list[str], tmp_path: Path
) -> None:
    with stack.rest() as rest:
        _, token = rest.post("/tokens", {"name": "hospital-a", "role": "site"})
    (tmp_path / "site.token").write_text(token["secret"])
    subprocess.run(
        [*FEDNANO, "split", "services/fednano/models/tiny_llava", "--out", tmp_path / "halves"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    check = [*FEDNANO, "client", "check", "--json", "--edge", tmp_path / "halves/edge",
             "--coordinator", f"localhost:{stack.environment['FEDNANO_GRPC_PORT']}",
             "--llm", f"localhost:{stack.environment['FEDNANO_LLM_PORT']}",
             "--token-file", tmp_path / "site.token", "--id", "hospital-a"]  # fmt: skip
    good = subprocess.run([*check, "--tls-ca", stack.certs / "ca.crt"], capture_output=True)
    report = json.loads(good.stdout)
    assert report["ok"], report
    bad = subprocess.run([*check, "--tls"], capture_output=True)  # the system's authorities
    assert bad.returncode == 1


def test_a_saved_state_is_restored_onto_an_empty_disk(
    stack: Stack, first: list[str], tmp_path: Path
) -> None:
    saved = str(tmp_path / "fednano.rdb")
    stack.command("sh", "docker/state.sh", "backup", saved)
    stack.compose("down", "--volumes", "--timeout", "10")
    stack.command("sh", "docker/state.sh", "restore", saved)
    stack.compose("up", "--detach", "--wait", "--scale", "client=2")
    assert stack.get("/runs/pair")["state"] == "finished"
    assert digests(stack, "pair") == first
    with stack.rest() as rest:
        adapter = rest.download("/runs/pair/rounds/4/adapter")
        assert {token["name"] for token in rest.get("/tokens")["items"]} >= {"hospital-a"}
    assert len(adapter) > 32_000
    stack.compose("restart", "redis")  # what was restored lies in the file that Redis appends to
    stack.compose("up", "--detach", "--wait", "--scale", "client=2")
    assert digests(stack, "pair") == first


def test_what_is_no_snapshot_is_not_restored(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "wrong.rdb").write_text("not Redis")
    command = ["sh", "docker/state.sh", "restore", str(tmp_path / "wrong.rdb")]
    done = subprocess.run(
        command, cwd=ROOT, env=stack.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "is no snapshot of Redis" in done.stderr
    assert stack.get("/runs/pair")["state"] == "finished"  # and nothing was stopped


def test_the_key_of_sessions_is_changed_without_losing_a_client(
    stack: Stack, first: list[str], tmp_path: Path
) -> None:
    stack.create({"name": "rotated", **PAIR, "rounds": 8})
    round_ = stack.trains("rotated", after=0)
    subprocess.run([*FEDNANO, "tokens", "keys", "--out", tmp_path], check=True, capture_output=True)
    public = stack.secrets / "session.pub"
    public.write_bytes(public.read_bytes() + (tmp_path / "session.pub").read_bytes())
    replace = ["up", "--detach", "--force-recreate", "--no-deps", "--wait"]
    stack.compose(*replace, "llm")
    round_ = stack.trains("rotated", after=round_)
    shutil.copyfile(tmp_path / "session.key", stack.secrets / "session.key")
    stack.compose(*replace, "coordinator")
    stack.run_ends("rotated", seconds=300)
    assert digests(stack, "rotated")[: len(first)] == first
    clients = stack.containers("client")
    assert [stack.inspect(name)["RestartCount"] for name in clients] == [0, 0]


def test_certificates_are_renewed_under_the_same_authority(stack: Stack) -> None:
    authority = (stack.certs / "ca.crt").read_bytes()
    old = (stack.certs / "llm.crt").read_bytes()
    (stack.certs / "llm.crt").unlink()
    made = ["make", "--no-print-directory", "certs", f"CERTS={stack.certs}"]
    stack.command(*made)
    assert (stack.certs / "ca.crt").read_bytes() == authority
    assert (stack.certs / "llm.crt").read_bytes() != old
    mode = os.stat(stack.certs / "ca.key").st_mode & 0o777
    assert mode == 0o600
    stack.compose("up", "--detach", "--force-recreate", "--no-deps", "--wait", "llm")
    stack.create({"name": "renewed", **PAIR, "rounds": 1})
    stack.run_ends("renewed", seconds=200)
