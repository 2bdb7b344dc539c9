"""The most memory that this process has had resident."""

from __future__ import annotations

import resource
from pathlib import Path


def peak_bytes() -> int:
    """Linux counts a parent's memory in ru_maxrss, but not in VmHWM."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10
