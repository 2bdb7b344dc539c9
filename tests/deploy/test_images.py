"""What is in the images, and what isn't. Needs a Docker engine: `make test-compose`."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from tests.deploy.stack import ROOT, TAG, engine_missing

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

IMAGES = ("coordinator", "llm", "client")
MOST_BEYOND_BASE = 250e6


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    if reason := engine_missing():
        pytest.skip(f"no Docker engine: {reason}")
    subprocess.run(["make", "images", f"FEDNANO_TAG={TAG}"], cwd=ROOT, check=True)


def inspect(image: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(docker("image", "inspect", image))[0]
    return found


def name(image: str) -> str:
    return f"fednano/{image}:{TAG}"


def inside(image: str, script: str) -> str:
    """What a shell in the image prints, without network, as compose starts it."""
    hardened = ["--read-only", "--cap-drop", "ALL", "--network", "none", "--rm"]
    return docker("run", *hardened, "--entrypoint", "sh", name(image), "-c", script)


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_as_nobody_special_and_says_what_it_is(image: str) -> None:
    config = inspect(name(image))["Config"]
    assert config["User"] == "10001:10001"
    labels = {key.rpartition(".")[2]: value for key, value in config["Labels"].items()}
    assert labels.keys() >= {"title", "description", "version", "licenses", "vendor"}
    assert all(labels.values())


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_holds_nothing_to_build_or_install_with(image: str) -> None:
    tools = "pip pip3 gcc cc g++ make git curl wget"
    assert inside(image, f"for tool in {tools}; do command -v $tool; done; true") == ""
    modules = ["pip", "ensurepip"]
    if image == "coordinator":
        modules.append("setuptools")  # which torch requires
    for module in modules:
        said = inside(image, f"python -c 'import {module}' 2>&1 | tail -1")
        assert said.startswith("ModuleNotFoundError"), said


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_keeps_no_secret_and_no_cache(image: str) -> None:
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", name(image)).lower()
    for word in ("secret", "password", "token=", "private key", "admin"):
        assert word not in history
    caches = "/root/.cache /tmp/pip* /var/lib/fednano/* /run/secrets /var/cache/apt/archives/*.deb"
    assert inside(image, f"ls -d {caches} 2>/dev/null; true") == ""


def test_the_coordinators_image_is_small_and_has_no_torch() -> None:
    base = inspect("python:3.11-slim")["Size"]
    assert inspect(name("coordinator"))["Size"] - base < MOST_BEYOND_BASE
    assert inside("coordinator", "python -c 'import torch' 2>&1 | tail -1").startswith("ModuleNot")


def test_client_and_llm_share_all_layers_but_their_half_of_the_model() -> None:
    client, llm = (inspect(name(image))["RootFS"]["Layers"] for image in ("client", "llm"))
    shared = [one for one, other in zip(client, llm, strict=True) if one == other]
    assert client[:-1] == shared
    assert inside("client", "ls /models") == "edge\n"
    assert inside("llm", "ls /models") == "llm\n"


@pytest.mark.parametrize(
    ("image", "weights"),
    [("coordinator", ""), ("llm", "/models/llm/"), ("client", "/models/edge/")],
)
def test_an_image_holds_its_half_of_the_model_and_no_other(image: str, weights: str) -> None:
    find = "find / -name '*.safetensors' -not -path '/proc/*' 2>/dev/null"
    found = inside(image, f"{find}; true").split()
    assert found == ([f"{weights}model.safetensors"] if weights else [])


def test_a_command_can_be_given_instead_of_the_service() -> None:
    said = docker("run", "--rm", "--network", "none", name("coordinator"), "tokens", "--help")
    assert "fednano tokens" in said
