"""Where bases lie that memory has no room for: a directory of this process, gone when it is gone."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from fednano.wire.codec import Buffer
from fednano.wire.errors import InvalidRequest

_PREFIX = "fednano-bases-"
_LOCK = ".lock"


class BaseFiles:
    """A private directory (0700) of files (0600), locked by this process while it lives."""

    def __init__(self, parent: Path, limit: int) -> None:
        """`limit` bytes may lie here. Removes what dead processes left below `parent`, and nothing
        else. Raises InvalidRequest where nothing can be written there."""
        self.limit = limit
        try:
            parent.mkdir(parents=True, exist_ok=True)
            for path in parent.glob(f"{_PREFIX}*"):
                _remove_if_left(path)
            self.directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            self._lock = os.open(self.directory / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InvalidRequest.of("base_directory", "a directory to write to", error) from error

    def write(self, name: str, data: Buffer) -> Path:
        """The file's path, which tells nothing of `name`. Raises OSError."""
        path = self.directory / hashlib.sha256(name.encode()).hexdigest()
        try:
            with open(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:
                file.write(data)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return path

    def close(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        os.close(self._lock)


def _remove_if_left(directory: Path) -> None:
    """A process that lives holds the lock; several replicas may share the parent directory."""
    with suppress(OSError):
        lock = os.open(directory / _LOCK, os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory)
        finally:
            os.close(lock)
