"""k8s/ as kustomize renders it, once per session."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.deploy.manifests import RENDERED, Manifests, copy_with_secrets, render


def tool(name: str) -> str:
    """The path of a program. Without it the test is skipped, or fails under `make test-k8s`."""
    path = shutil.which(name)
    if path is None and os.environ.get("FEDNANO_REQUIRE_TOOLS"):
        pytest.fail(f"{name} is not on PATH")
    if path is None:
        pytest.skip(f"{name} is not on PATH; `make test-k8s` brings it, but for kubectl")
    return path


@pytest.fixture(scope="session")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tool("openssl")
    return copy_with_secrets(tmp_path_factory.mktemp("manifests"))


@pytest.fixture(scope="session")
def rendered(copy: Path) -> dict[str, Manifests]:
    kubectl = tool("kubectl")
    return {overlay: render(kubectl, copy, overlay) for overlay in RENDERED}


@pytest.fixture(params=RENDERED)
def manifests(request: pytest.FixtureRequest, rendered: dict[str, Manifests]) -> Manifests:
    return rendered[request.param]


@pytest.fixture(scope="session")
def files(
    rendered: dict[str, Manifests], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """What was rendered, as files for the tools."""
    folder = tmp_path_factory.mktemp("rendered")
    for overlay, one in rendered.items():
        (folder / f"{overlay}.yaml").write_text(one.text)
    return {overlay: folder / f"{overlay}.yaml" for overlay in rendered}


@pytest.fixture(scope="session")
def run_tool() -> Callable[..., str]:
    def run(*command: str | Path, expected: tuple[int, ...] = (0,)) -> str:
        done = subprocess.run(
            [tool(str(command[0])), *command[1:]], capture_output=True, text=True, timeout=110
        )
        assert done.returncode in expected, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Writes what was measured to the terminal."""

    def write(text: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n  {text}")
            sys.stdout.flush()

    return write
