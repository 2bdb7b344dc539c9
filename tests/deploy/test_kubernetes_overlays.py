"""What the overlays and components of k8s/ are for, and what schemas and linters say of all of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from fednano.llm.metrics import Metrics

from tests.deploy.manifests import ROOT, Manifests, differences, everything


def test_the_ci_overlay_is_base_but_for_what_is_listed(rendered: dict[str, Manifests]) -> None:
    listed = yaml.safe_load((ROOT / "k8s/overlays/ci/differences.yaml").read_text())
    assert all(group["why"] for group in listed)
    where = [path for group in listed for path in group["where"]]
    found = differences(rendered["base"], rendered["ci"])
    assert sorted(where) == sorted(found)


def test_gpus_are_asked_for_by_the_llm_alone(rendered: dict[str, Manifests]) -> None:
    for pod, container in everything(rendered["gpu"]):
        wanted = container["resources"]["limits"].get("nvidia.com/gpu")
        assert wanted == ("1" if container["name"] == "llm" else None), pod.owner
        assert ("nodeSelector" in pod.spec) is (pod.owner == "Deployment/llm")


def test_each_service_sees_its_own_half_of_the_checkpoint(rendered: dict[str, Manifests]) -> None:
    seen = {}
    for pod in rendered["gpu"].pods():
        for mount in pod.spec["containers"][0]["volumeMounts"]:
            if mount["name"] == "models":
                seen[pod.owner] = (mount["mountPath"], mount.get("subPath"), mount.get("readOnly"))
    assert seen == {
        "Deployment/llm": ("/models/llm", "halves/llm", True),
        "Deployment/evaluator": ("/models/edge", "halves/edge", True),
        "StatefulSet/clients": ("/models/edge", "halves/edge", True),
        "Job/split": ("/volume", None, None),
    }


def test_the_autoscaler_follows_a_metric_that_the_service_exports(
    rendered: dict[str, Manifests],
) -> None:
    manifests = rendered["autoscaling"]
    [scaler] = manifests.of("HorizontalPodAutoscaler").values()
    [metric] = scaler["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    values = yaml.safe_load(
        (ROOT / "k8s/components/autoscaling/prometheus-adapter.yaml").read_text()
    )
    [rule] = values["rules"]["custom"]
    assert rule["seriesQuery"].startswith(name + "{")
    exported = Metrics()
    exported.watch(lambda: 0, lambda: 0)
    assert name in [family.name for family in exported.registry.collect()]
    llm = manifests.of("Deployment")[scaler["spec"]["scaleTargetRef"]["name"]]
    assert "replicas" not in llm["spec"], "applying again must not undo what the autoscaler did"


def split(volume: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """The Job of the overlay gpu, without its container."""
    bin_first = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["sh", ROOT / "k8s/components/checkpoint/split.sh"],
        cwd=volume,
        env={**os.environ, "PATH": bin_first, **environ},
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.slow
def test_the_split_job_cuts_a_checkpoint_once_and_whole(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "services/fednano/models/tiny_llava", tmp_path / "checkpoint")
    (tmp_path / "part" / "llm").mkdir(parents=True)
    (tmp_path / "part" / "llm" / "torn").touch()  # an earlier try was cut off here
    first = split(tmp_path)
    assert first.returncode == 0, first.stderr
    records = [tmp_path / "halves" / half / "fednano.json" for half in ("llm", "edge")]
    assert [json.loads(record.read_text())["half"] for record in records] == ["llm", "edge"]
    written = [record.stat().st_mtime_ns for record in records]
    assert split(tmp_path).returncode == 0
    assert [record.stat().st_mtime_ns for record in records] == written
    assert not (tmp_path / "part").exists()


def test_a_checkpoint_that_cannot_be_fetched_fails_the_job(tmp_path: Path) -> None:
    done = split(tmp_path, MODEL="nobody/nothing", REVISION="main", HF_HUB_OFFLINE="1")
    assert done.returncode != 0
    assert not (tmp_path / "checkpoint").exists()
    assert not (tmp_path / "halves").exists()


# --- Tools


@pytest.mark.parametrize("version", ["1.32", "newest"])
def test_schemas_of_kubernetes_accept_everything(
    version: str, files: dict[str, Path], run_tool: Callable[..., str]
) -> None:
    which = () if version == "newest" else ("-k", version)
    run_tool("kubernetes-validate", "--strict", "--quiet", *which, *files.values())


def test_checkov_finds_what_we_have_reasons_for_and_nothing_else(
    files: dict[str, Path], run_tool: Callable[..., str]
) -> None:
    skipped = yaml.safe_load((ROOT / "k8s/.checkov.yaml").read_text())["skip-check"]
    folder = files["base"].parent
    arguments = ("--framework", "kubernetes", "--skip-download", "--output", "json")
    report = json.loads(run_tool("checkov", "--directory", folder, *arguments, expected=(0, 1)))
    assert report["summary"]["passed"] > 100
    assert report["summary"]["parsing_errors"] == 0
    found = {one["check_id"] for one in report["results"]["failed_checks"]}
    assert found == set(skipped)


def test_hadolint_accepts_the_dockerfile(run_tool: Callable[..., str]) -> None:
    run_tool("hadolint", ROOT / "docker/Dockerfile")
