"""A real federation for a module's tests: every part a process, as the demo starts them."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.numpy
from fednano.lab.federation import Federation
from fednano.lab.processes import FEDNANO, Processes
from fednano.wire.run_config import RunConfig


def small_run(name: str, **changes: object) -> RunConfig:
    """Two clients and an evaluator that is waited for, little data, equal bytes every time."""
    body = {
        "name": name,
        "clients": 2,
        "min_clients": 2,
        "rounds": 3,
        "deterministic": True,
        "round_seconds": 120,
        "data": {"limit": 150, "evaluation_limit": 8},
        "evaluation": {"evaluators": 1},
        **changes,
    }
    return RunConfig.model_validate(body)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("federation")
    with Processes(folder) as processes:
        made = Federation(folder, processes)
        made.start_services()
        yield made


def wait_for(ready: Callable[[], bool], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"{what} took longer than {seconds} s"
        time.sleep(0.1)


def state_of(federation: Federation, run: str) -> str:
    with federation.rest() as api:
        return str(api.get(f"runs/{run}").raise_for_status().json()["state"])


def adapter_of(federation: Federation, run: str, number: int) -> dict[str, bytes]:
    """The bytes of each of a round's tensors."""
    with federation.rest() as api:
        body = api.get(f"runs/{run}/rounds/{number}/adapter").raise_for_status().content
    return {name: tensor.tobytes() for name, tensor in safetensors.numpy.load(body).items()}


def environment(federation: Federation) -> dict[str, str]:
    """For commands that a person would type."""
    return {
        **os.environ,
        "FEDNANO_URL": federation.addresses.http,
        "FEDNANO_TOKEN_FILE": str(Path(federation.directory) / "admin.token"),
        "FEDNANO_CLIENT_COORDINATOR": federation.addresses.grpc,
        "FEDNANO_CLIENT_LLM": federation.addresses.llm,
        "FEDNANO_CLIENT_TOKEN_FILE": str(Path(federation.directory) / "client-1.token"),
        "FEDNANO_CLIENT_EDGE": str(federation.halves / "edge"),
    }


def typed(federation: Federation, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A `fednano` command, as a person would type it."""
    return subprocess.run(
        [*FEDNANO, *arguments],
        env=environment(federation),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
