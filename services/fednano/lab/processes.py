"""Processes that belong together: started, watched and ended as one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

_LOG_LINES = 25
FEDNANO = (sys.executable, "-m", "fednano.cli")


class ProcessFailed(Exception):
    """A process ended that should not have; the message carries its last log lines."""

    def __init__(self, name: str, status: int, log: Path) -> None:
        lines = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        tail = "\n".join(f"  {line}" for line in lines) or "  (it logged nothing)"
        super().__init__(f"{name} ended with status {status}. Its last lines in {log}:\n{tail}")
        self.name = name
        self.status = status


class TookTooLong(Exception):
    """Something that was waited for did not come."""


@dataclass
class Process:
    name: str
    log: Path
    running: subprocess.Popen[bytes]


@dataclass
class Processes:
    """A context manager: whatever way it is left, none of its processes is."""

    directory: Path  # of the logs
    _processes: dict[str, Process] = field(default_factory=dict)

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop_all()

    def start(
        self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None
    ) -> None:
        """Starts `command`, or starts it again under the same name; output goes to `<name>.log`."""
        if name in self._processes:
            self._processes.pop(name).running.wait(timeout=30)
        log = self.directory / f"{name}.log"
        with log.open("ab") as output:
            running = subprocess.Popen(
                command,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone, and we end them in order
            )
        self._processes[name] = Process(name, log, running)

    def run(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> None:
        """Runs `command` to its end. Raises ProcessFailed unless it succeeds."""
        self.start(name, command, env)
        process = self._processes[name]
        status = process.running.wait()
        del self._processes[name]
        if status:
            raise ProcessFailed(name, status, process.log)

    def status(self, name: str) -> int | None:
        """The exit status, or None while it runs."""
        return self._processes[name].running.poll()

    def kill(self, name: str) -> None:
        """SIGKILL, waits until it is gone, and forgets it."""
        running = self._processes.pop(name).running
        running.send_signal(signal.SIGKILL)
        running.wait(timeout=30)

    def check(self, may_finish: Collection[str] = ()) -> None:
        """Raises ProcessFailed if one has ended; those that `may_finish` only for a failure."""
        for process in self._processes.values():
            status = process.running.poll()
            if status or (status is not None and process.name not in may_finish):
                raise ProcessFailed(process.name, status, process.log)

    def wait_until(self, ready: Callable[[], bool], what: str, seconds: float = 90) -> None:
        """Polls; raises ProcessFailed, or TookTooLong."""
        deadline = time.monotonic() + seconds
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise TookTooLong(f"{what} took longer than {seconds:.0f} s")
            time.sleep(0.05)

    def stop_all(self, seconds: float = 8) -> None:
        """SIGTERM, then SIGKILL to whoever is still there; the one that was started first, on which
        the others lean, goes last."""
        running = [process.running for process in self._processes.values()]
        _stop(running[1:], seconds)
        _stop(running[:1], seconds)


def _stop(running: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    for process in running:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + seconds
    for process in running:
        try:
            process.wait(timeout=max(0.05, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
