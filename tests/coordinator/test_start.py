"""A coordinator that can't begin yet."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE

from fednano.lab.redis_server import free_port

from tests.coordinator.conftest import ADMIN, PRIVATE_KEY


async def test_one_that_waits_for_redis_says_so_and_obeys_a_stop_at_once() -> None:
    settings = {
        "REDIS_URL": f"redis://127.0.0.1:{free_port()}/0",
        "SESSION_KEY": PRIVATE_KEY.decode(),
        "ADMIN_TOKEN": ADMIN,
        "GRPC_PORT": "0",
        "HTTP_PORT": "0",
    }
    env = os.environ | {f"FEDNANO_COORDINATOR_{name}": value for name, value in settings.items()}
    command = [sys.executable, "-m", "fednano.cli", "coordinator"]
    process = await asyncio.create_subprocess_exec(*command, env=env, stderr=PIPE)
    assert process.stderr is not None
    async with asyncio.timeout(60):
        assert b"redis can't be reached" in await process.stderr.readline()
    process.terminate()
    async with asyncio.timeout(10):
        _, errors = await process.communicate()
    assert process.returncode == 0
    assert b"coordinator stopped" in errors
