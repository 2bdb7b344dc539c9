"""A whole federation on this machine: Redis, LLM service, coordinator, clients and an evaluator,
each a process of its own on a free loopback port, with tokens made for it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

import fednano.models
from fednano.lab.processes import FEDNANO, Processes
from fednano.lab.redis_server import RedisServer, free_port
from fednano.wire.run_config import RunConfig
from fednano.wire.sessions import write_keys

TINY_MODEL = Path(fednano.models.__file__).parent / "tiny_llava"
_ENVIRONMENT = {
    # Several processes share the cores: one thread each is far faster than several.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Addresses:
    """Where the services of a federation listen."""

    redis_url: str
    llm: str
    grpc: str
    http: str


class Federation:
    """Starts the parts in order and holds what is needed to talk to them."""

    def __init__(self, directory: Path, processes: Processes, model: Path = TINY_MODEL) -> None:
        self.directory = directory
        self.processes = processes
        self._model = model
        self.admin_token = secrets.token_urlsafe(32)
        self.halves = directory / "model"
        self._redis = RedisServer(directory / "redis")
        self._whole: set[str] = set()  # runs whose clients need the LLM, too
        # Chosen once, so that a service which is started again is found where it was.
        self._ports = {name: free_port() for name in ("llm", "grpc", "http")}

    def start_services(self) -> None:
        """Redis, coordinator and LLM service; returns when the coordinator serves."""
        self._secret("admin.token", self.admin_token)
        write_keys(self.directory / "keys")
        self.start_redis()
        self.start_coordinator()
        self._split()
        self.start_llm()  # loads while others start; clients wait for it
        self.wait_for("coordinator")

    def start_redis(self) -> None:
        self.processes.start("redis", self._redis.command())
        self.processes.wait_until(self._redis.answers, "the start of Redis")

    def wait_for(self, name: str) -> None:
        """Until the service of that name serves, after each start of it."""
        ready = self.directory / f"{name}.ready"
        self.processes.wait_until(ready.exists, f"the start of {name}")

    def start_coordinator(self, name: str = "coordinator", **settings: str) -> None:
        """`settings` are further FEDNANO_COORDINATOR_* values."""
        env = {
            "FEDNANO_COORDINATOR_REDIS_URL_FILE": str(self._secret("redis.url", self._redis.url)),
            "FEDNANO_COORDINATOR_GRPC_PORT": str(self._ports["grpc"]),
            "FEDNANO_COORDINATOR_HTTP_PORT": str(self._ports["http"]),
            "FEDNANO_COORDINATOR_SESSION_KEY_FILE": str(self.directory / "keys/session.key"),
            "FEDNANO_COORDINATOR_READY_FILE": str(self.directory / f"{name}.ready"),
            "FEDNANO_ADMIN_TOKEN_FILE": str(self.directory / "admin.token"),
        }
        env |= {f"FEDNANO_COORDINATOR_{key.upper()}": value for key, value in settings.items()}
        self._unready(name)
        self.processes.start(name, [*FEDNANO, "coordinator"], {**_ENVIRONMENT, **env})

    def start_llm(self, **settings: str) -> None:
        """`settings` are further FEDNANO_LLM_* values."""
        env = {
            "FEDNANO_LLM_MODEL": str(self.halves / "llm"),
            "FEDNANO_LLM_PORT": str(self._ports["llm"]),
            "FEDNANO_LLM_METRICS_PORT": "0",
            "FEDNANO_LLM_DEVICE": "cpu",
            "FEDNANO_LLM_DTYPE": "fp32",
            "FEDNANO_LLM_THREADS": "1",
            "FEDNANO_LLM_SESSION_PUBLIC_KEY_FILE": str(self.directory / "keys/session.pub"),
            "FEDNANO_LLM_READY_FILE": str(self.directory / "llm.ready"),
        }
        env |= {f"FEDNANO_LLM_{key.upper()}": value for key, value in settings.items()}
        self._unready("llm")
        self.processes.start("llm", [*FEDNANO, "llm"], {**_ENVIRONMENT, **env})

    def start_client(self, name: str, run: str, role: str = "trainer", **settings: str) -> None:
        """A client process that ends with its run; `settings` are FEDNANO_CLIENT_* values. It has the
        LLM half where the run trains LoRA inside the LLM."""
        addresses = self.addresses
        token = self.directory / f"{name}.token"
        if not token.exists():
            self._secret(token.name, self.make_token("site", name))
        env = {
            "FEDNANO_CLIENT_COORDINATOR": addresses.grpc,
            "FEDNANO_CLIENT_LLM": addresses.llm,
            "FEDNANO_CLIENT_TOKEN_FILE": str(token),
            "FEDNANO_CLIENT_EDGE": str(self.halves / "edge"),
            "FEDNANO_CLIENT_ID": name,
            "FEDNANO_CLIENT_RUN": run,
            "FEDNANO_CLIENT_ROLE": role,
        }
        if run in self._whole:
            env["FEDNANO_CLIENT_LLM_HALF"] = str(self.halves / "llm")
        env |= {f"FEDNANO_CLIENT_{key.upper()}": value for key, value in settings.items()}
        self.processes.start(name, [*FEDNANO, "client", "run"], {**_ENVIRONMENT, **env})

    @property
    def addresses(self) -> Addresses:
        return Addresses(
            redis_url=self._redis.url,
            llm=f"127.0.0.1:{self._ports['llm']}",
            grpc=f"127.0.0.1:{self._ports['grpc']}",
            http=f"http://127.0.0.1:{self._ports['http']}",
        )

    def rest(self, token: str = "") -> httpx.Client:
        """REST under /api/v1, as an administrator unless another token is given."""
        return httpx.Client(
            base_url=f"{self.addresses.http}/api/v1/",
            headers={"Authorization": f"Bearer {token or self.admin_token}"},
            timeout=30,
            trust_env=False,  # no proxy gets to see a token
        )

    def make_token(self, role: str, name: str) -> str:
        """A new bearer token."""
        with self.rest() as api:
            reply = api.post("tokens", json={"role": role, "name": name}).raise_for_status()
        token: str = reply.json()["secret"]
        return token

    def create_run(self, config: RunConfig) -> None:
        body: dict[str, Any] = config.model_dump(mode="json")
        with self.rest() as api:
            api.post("runs", json=body).raise_for_status()
        if config.placement == "lora":
            self._whole.add(config.name)

    def _split(self) -> None:
        command = [*FEDNANO, "split", str(self._model), "--out", str(self.halves), "--json"]
        self.processes.run("split", command, _ENVIRONMENT)

    def _unready(self, name: str) -> None:
        (self.directory / f"{name}.ready").unlink(missing_ok=True)

    def _secret(self, name: str, value: str) -> Path:
        path = self.directory / name
        path.touch(mode=0o600)
        path.write_text(value)
        return path
