"""A compose federation of the test's own: another project name, port, secrets and certificates."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import grpc
import httpx
import redis
from fednano.coordinator import keys
from fednano.rest_client import RestClient, RestSettings
from fednano.wire.errors import FedNanoError
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.deploy.runs import until

ROOT = Path(__file__).resolve().parents[2]
TAG = "test"


def engine_missing() -> str:
    """Why there is no engine to test with; empty where there is one."""
    if shutil.which("docker") is None:
        return "docker is not installed"
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return f"`{' '.join(command)}` failed: {done.stderr.strip()}"
    return ""


class Stack:
    """One project of docker compose, and its coordinator's REST."""

    def __init__(self, project: str, port: int, folder: Path, *overlays: str) -> None:
        self.project, self.port = project, port
        self.secrets, self.certs = folder / "secrets", folder / "certs"
        self.tls = "docker-compose.tls.yml" in overlays
        self.environment = {
            **os.environ,
            "COMPOSE_PROJECT_NAME": project,
            "COMPOSE_FILE": ":".join(["docker-compose.yml", *overlays]),
            "FEDNANO_TAG": TAG,
            "FEDNANO_HTTP_PORT": str(port),
            "FEDNANO_SECRETS": str(self.secrets),
            "FEDNANO_CERTS": str(self.certs),
        }
        make = ["make", "--no-print-directory", "secrets", "certs"]
        self.command(*make, f"SECRETS={self.secrets}", f"CERTS={self.certs}")

    def compose(self, *arguments: str) -> str:
        """Standard output of `docker compose ARGUMENTS`; fails with what it said."""
        return self.command("docker", "compose", *arguments)

    def command(self, *command: str) -> str:
        """Standard output of a command that compose's user might type; fails with what it said."""
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    # --- containers

    def containers(self, service: str) -> list[str]:
        """Ids, stopped ones too, in the order of their numbers."""
        return self.compose("ps", "--all", "--quiet", service).split()

    def inspect(self, container: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.command("docker", "inspect", container))[0]
        return found

    def address(self, service: str) -> str:
        """Of its first container, on the one network or the federation's."""
        networks = self.inspect(self.containers(service)[0])["NetworkSettings"]["Networks"]
        name = f"{self.project}_federation"
        found: str = networks.get(name, next(iter(networks.values())))["IPAddress"]
        return found

    def logs(self, container: str) -> list[str]:
        """Its lines, without whatever compose puts around them."""
        done = subprocess.run(
            ["docker", "logs", container],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
        return done.stdout.splitlines()

    def waits(self, client: str) -> bool:
        """Whether it has started and told the coordinator that it would take part in a run."""
        return any("waiting for a run" in line for line in self.logs(client))

    def kill(self, container: str) -> float:
        """SIGKILL from the host to the container's main process: its restart policy must revive it.

        Returns when that was (monotonic).
        """
        os.kill(self.inspect(container)["State"]["Pid"], signal.SIGKILL)
        return time.monotonic()

    def left_over(self) -> list[str]:
        """Containers, volumes and networks that bear the project's name."""
        mine = f"label=com.docker.compose.project={self.project}"
        found = []
        for kind in (["ps", "--all"], ["volume", "ls"], ["network", "ls"]):
            found += self.command("docker", *kind, "--quiet", "--filter", mine).split()
        return found

    # --- services

    def llm_serves(self) -> bool:
        """Whether gRPC's health service says so, in the clear."""
        with grpc.insecure_channel(f"{self.address('llm')}:50051") as channel:
            try:
                request = health_pb2.HealthCheckRequest()
                reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=2)
            except grpc.RpcError:
                return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def coordinator_serves(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/readyz", timeout=2).is_success
        except httpx.TransportError:
            return False

    def redis_serves(self) -> bool:
        """Whether it answers with data; while it loads its file it refuses."""
        password = (self.secrets / "redis.password").read_text().strip()
        with redis.Redis(self.address("redis"), password=password, socket_timeout=2) as client:
            try:
                return bool(client.get(keys.SCHEMA))
            except redis.RedisError:
                return False

    def rest(self) -> RestClient:
        scheme = "https" if self.tls else "http"
        flags = {
            "url": f"{scheme}://127.0.0.1:{self.port}",
            "token": (self.secrets / "admin.token").read_text().strip(),
            "ca": self.certs / "ca.crt" if self.tls else None,
        }
        return RestClient(RestSettings.load(flags))

    def get(self, path: str) -> Any:
        """A reply of REST, or None while the coordinator is away or knows nothing of it."""
        try:
            with self.rest() as rest:
                return rest.get(path)
        except FedNanoError:
            return None

    def create(self, config: dict[str, Any]) -> None:
        with self.rest() as rest:
            rest.post("/runs", config)

    def run_ends(self, name: str, seconds: float) -> dict[str, Any]:
        """The run, finished; fails where it isn't in time."""

        def ended() -> dict[str, Any] | None:
            run: dict[str, Any] | None = self.get(f"/runs/{name}")
            return run if run and run["state"] in ("finished", "failed", "stopped") else None

        run: dict[str, Any] = until(ended, f"the end of run {name}", seconds)
        assert run["state"] == "finished", run["failure"]
        return run

    def rounds(self, run: str) -> list[dict[str, Any]]:
        with self.rest() as rest:
            return sorted(rest.items(f"/runs/{run}/rounds"), key=lambda found: found["number"])

    def trains(self, run: str, after: int) -> int:
        """The number of a round beyond `after`, once its updates are being waited for."""

        def collecting() -> int:
            number = (self.get(f"/runs/{run}") or {"round": 0})["round"]
            found = self.get(f"/runs/{run}/rounds/{number}") if number > after else None
            return number if found and found["state"] == "collecting" else 0

        number: int = until(collecting, f"a round of {run} after {after}", 200)
        return number
