"""The overlay `ci` on a real cluster: a run completes; pods are deleted, scaled, rolled out, undone.

`make test-cluster`, with kubectl's context on a cluster that may be written to and that has the
images fednano/{coordinator,llm,client}:ci, :ci-next and :ci-bad. The tests are one story and run in
their order.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.deploy.cluster import NAMESPACE, Cluster
from tests.deploy.conftest import tool
from tests.deploy.manifests import copy_with_secrets
from tests.deploy.runs import STEADY, until

LONG = {**STEADY, "rounds": 60}
"""Outlasts what happens to it."""

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    kubectl = tool("kubectl")
    made = Cluster(kubectl, copy_with_secrets(tmp_path_factory.mktemp("manifests")))
    there = made.kubectl("get", "namespace", "--output", "name")
    if f"namespace/{NAMESPACE}" in there.split():
        pytest.fail(f"there is a namespace {NAMESPACE!r} already; delete it or change the context")
    try:
        made.apply()
        until(lambda: made.run("cluster"), "the run of the overlay", 300, 1.0)
        runs = json.loads(made.fednano("runs", "list", "--json"))
        if [run["name"] for run in runs] != ["cluster"]:
            pytest.fail(
                "Redis's directory on the node is not empty; see k8s/overlays/ci/volume.yaml"
            )
        yield made
    finally:
        if request.session.testsfailed:
            sys.stdout.write(made.kubectl("get", "pods,events", "--output", "wide", check=False))
            for part in ("coordinator", "llm"):
                logs = ["logs", "--selector", f"app.kubernetes.io/name={part}", "--tail", "30"]
                sys.stdout.write(made.kubectl(*logs, check=False))
        made.delete()


def digests(run: dict[str, Any]) -> list[str]:
    return [found["adapter_digest"] for found in sorted(run["rounds"], key=lambda r: r["number"])]


def test_the_run_of_the_overlay_completes(cluster: Cluster) -> None:
    for name, count in (("redis", 1), ("llm", 1), ("coordinator", 2), ("client", 5)):
        until(lambda n=name, c=count: cluster.ready(n, c), f"{count} pods {name}", 300, 1.0)  # type: ignore[misc]
    run = cluster.run_ends("cluster", seconds=900)
    assert run["members"] == [f"clients-{number}" for number in range(4)]
    rounds = sorted(run["rounds"], key=lambda found: found["number"])
    assert len(rounds) == 13
    assert rounds[-1]["metrics"]["accuracy"] > rounds[0]["metrics"]["accuracy"] + 0.05


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> list[str]:
    """The adapters' digests, round by round, of a run that nothing happens to."""
    cluster.create("undisturbed", LONG)
    return digests(cluster.run_ends("undisturbed", seconds=900))


def test_one_of_two_coordinators_leads(cluster: Cluster, undisturbed: list[str]) -> None:
    script = """
import os, urllib.request
token = open(os.environ["FEDNANO_TOKEN_FILE"]).read().strip()
headers = {"Authorization": "Bearer " + token}
request = urllib.request.Request("http://127.0.0.1:8080/metrics", headers=headers)
lines = urllib.request.urlopen(request).read().decode().splitlines()
print(*[line for line in lines if line.startswith("fednano_leader")])
"""
    leads = [
        cluster.kubectl("exec", pod["metadata"]["name"], "--", "python", "-c", script).strip()
        for pod in cluster.pods("coordinator")
    ]
    assert sorted(leads) == ["fednano_leader 0.0", "fednano_leader 1.0"]


def test_scaling_the_llm_during_a_run_spreads_the_calls(
    cluster: Cluster, undisturbed: list[str], say: Callable[[str], None]
) -> None:
    cluster.create("scaled", LONG)
    cluster.trains("scaled", after=0)
    cluster.kubectl("scale", "deployment/llm", "--replicas", "3")
    until(lambda: cluster.ready("llm", 3), "three replicas", 240, 1.0)
    ready = time.monotonic()
    until(lambda: min(cluster.llm_calls().values()) > 0, "a call to each of them", 60, 0.5)
    say(f"all three replicas are called {time.monotonic() - ready:.0f} s after they are ready")
    before = cluster.llm_calls()
    run = cluster.run_ends("scaled", seconds=900)
    served = {name: calls - before[name] for name, calls in cluster.llm_calls().items()}
    say(f"training steps of each from then on: {sorted(served.values())}")
    assert digests(run) == undisturbed
    assert len(served) == 3
    assert min(served.values()) > 0.25 * sum(served.values())


def test_deleting_pods_during_a_run_changes_no_byte(
    cluster: Cluster, undisturbed: list[str], say: Callable[[str], None]
) -> None:
    cluster.create("deleted", LONG)
    done = 0
    for part, count in (("llm", 3), ("coordinator", 2), ("redis", 1), ("client", 5)):
        done = cluster.trains("deleted", after=done)
        name = min(pod["metadata"]["name"] for pod in cluster.pods(part))
        seconds = cluster.delete_pod(name, lambda p=part, c=count: cluster.ready(p, c))  # type: ignore[misc]
        say(f"{part}: {count} ready again {seconds:.0f} s after one was deleted")
    run = cluster.run_ends("deleted", seconds=900)
    assert digests(run) == undisturbed


def test_rolling_out_new_images_during_a_run_changes_no_byte(
    cluster: Cluster, undisturbed: list[str]
) -> None:
    cluster.create("rolled", LONG)
    done = 0
    for part in ("llm", "coordinator"):
        done = cluster.trains("rolled", after=done)
        deployment = f"deployment/{part}"
        cluster.kubectl("set", "image", deployment, f"{part}=fednano/{part}:ci-next")
        cluster.kubectl("rollout", "status", deployment, "--timeout", "300s")
    run = cluster.run_ends("rolled", seconds=900)
    assert digests(run) == undisturbed


def test_a_bad_image_stops_nothing_and_is_undone(cluster: Cluster, undisturbed: list[str]) -> None:
    cluster.create("bad", LONG)
    cluster.trains("bad", after=0)
    for part in ("llm", "coordinator"):
        cluster.kubectl("set", "image", f"deployment/{part}", f"{part}=fednano/{part}:ci-bad")
    for part in ("llm", "coordinator"):
        status = ["rollout", "status", f"deployment/{part}", "--timeout", "20s"]
        assert "successfully rolled out" not in cluster.kubectl(*status, check=False)
    cluster.trains("bad", after=cluster.run("bad")["round"])  # it goes on with the old ones
    for part in ("llm", "coordinator"):
        cluster.kubectl("rollout", "undo", f"deployment/{part}")
        cluster.kubectl("rollout", "status", f"deployment/{part}", "--timeout", "300s")
        for pod in cluster.pods(part):
            assert pod["spec"]["containers"][0]["image"] == f"fednano/{part}:ci-next"
    run = cluster.run_ends("bad", seconds=900)
    assert digests(run) == undisturbed


def test_nothing_was_lost_or_failed_on_the_way(cluster: Cluster) -> None:
    for name in ("undisturbed", "scaled", "deleted", "rolled", "bad"):
        for found in cluster.run(name)["rounds"]:
            assert found["state"] == "done"
            assert found["number"] == 0 or len(found["clients"]["submitted"]) == 4
