"""The overlay `ci` on the cluster that kubectl speaks to, and its coordinator's command line."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.deploy.runs import until

NAMESPACE = "fednano"
IMAGES = ("coordinator", "llm", "client")
_CALLS = re.compile(r'fednano_llm_requests_total\{rpc="ForwardBackward",status="OK"\} (\S+)')


class Cluster:
    """The federation in its namespace."""

    def __init__(self, kubectl: str, manifests: Path) -> None:
        """`manifests` is a copy of k8s/ with secrets in it."""
        self._kubectl_path = kubectl
        self._manifests = manifests

    def kubectl(self, *arguments: str, given: str | None = None, check: bool = True) -> str:
        done = subprocess.run(
            [self._kubectl_path, "--namespace", NAMESPACE, *arguments],
            input=given,
            capture_output=True,
            text=True,
            check=False,
        )
        if check:
            assert done.returncode == 0, f"kubectl {' '.join(arguments)}\n{done.stderr}"
        return done.stdout

    def get(self, *what: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.kubectl("get", *what, "--output", "json"))
        return found

    def apply(self) -> None:
        text = self.kubectl("kustomize", str(self._manifests / "overlays" / "ci"))
        if "policy/v1" not in self.kubectl("api-versions").split():  # before Kubernetes 1.21
            text = text.replace("policy/v1\n", "policy/v1beta1\n")
        self.kubectl("apply", "--filename", "-", given=text)

    def delete(self) -> None:
        """The volume's directory on the node is left, and empty."""
        empty = 'REDISCLI_AUTH="$(cat /run/secrets/redis/redis.password)" redis-cli flushall'
        self.kubectl("exec", "redis-0", "--", "sh", "-c", empty, check=False)
        wait = ["--ignore-not-found", "--timeout", "180s"]
        self.kubectl("delete", "namespace", NAMESPACE, *wait)
        self.kubectl("delete", "persistentvolume", "fednano-ci-redis", *wait)

    # --- pods

    def pods(self, name: str) -> list[dict[str, Any]]:
        """Those that are not being deleted."""
        found = self.get("pods", "--selector", f"app.kubernetes.io/name={name}")["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def ready(self, name: str, count: int) -> bool:
        """Whether so many pods are, and no others."""
        pods = self.pods(name)
        states = [
            any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"]["conditions"])
            for pod in pods
            if "conditions" in pod["status"]
        ]
        return states == [True] * count and len(pods) == count

    def delete_pod(self, name: str, then: Callable[[], bool]) -> float:
        """As an eviction would, with its grace; the seconds until `then`."""
        begin = time.monotonic()
        self.kubectl("delete", "pod", name, "--wait=false")
        until(lambda: not self._there(name), f"the end of {name}", 120, 0.5)
        until(then, f"what follows {name}", 180, 0.5)
        return time.monotonic() - begin

    def _there(self, name: str) -> bool:
        """Whether the pod, and not its successor of the same name, still is."""
        found = self.kubectl("get", "pod", name, "--output", "json", check=False)
        return bool(found) and "deletionTimestamp" in json.loads(found)["metadata"]

    def llm_calls(self) -> dict[str, float]:
        """Training steps that each ready LLM pod has served."""
        served = {}
        for pod in self.pods("llm"):
            name = pod["metadata"]["name"]
            path = f"/api/v1/namespaces/{NAMESPACE}/pods/{name}:9101/proxy/metrics"
            found = _CALLS.search(self.kubectl("get", "--raw", path, check=False))
            served[name] = float(found[1]) if found else 0.0
        return served

    # --- runs, by the command line in a coordinator's pod

    def fednano(self, *arguments: str, check: bool = True) -> str:
        exec_ = ["exec", "deployment/coordinator", "--container", "coordinator", "--"]
        return self.kubectl(*exec_, "fednano", *arguments, check=check)

    def create(self, name: str, config: dict[str, Any]) -> None:
        sets = [f"--set={key}={json.dumps(value)}" for key, value in config.items()]
        self.fednano("runs", "create", name, *sets)

    def run(self, name: str) -> dict[str, Any]:
        """With its rounds and clients; empty while no coordinator answers."""
        found = self.fednano("runs", "show", name, "--json", check=False)
        shown: dict[str, Any] = json.loads(found) if found.startswith("{") else {}
        return shown

    def trains(self, name: str, after: int) -> int:
        """The number of a round beyond `after`, once it is worked on."""

        def working() -> int:
            number: int = self.run(name).get("round", 0)
            return number if number > after else 0

        number: int = until(working, f"a round of {name} after {after}", 300, 0.5)
        return number

    def run_ends(self, name: str, seconds: float) -> dict[str, Any]:
        """The run, finished; fails where it isn't in time."""
        ended = ("finished", "failed", "stopped")
        until(lambda: self.run(name).get("state") in ended, f"the end of run {name}", seconds, 1.0)
        run = self.run(name)
        assert run["state"] == "finished", run["failure"]
        return run
