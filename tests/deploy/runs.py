"""What the tests of whole deployments ask of a federation, and how they wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

STEADY: dict[str, Any] = {
    "clients": 4,
    "min_clients": 4,
    "rounds": 10,
    "deterministic": True,
    "evaluation": {"own_data": "never", "seconds": 240},
    "data": {"limit": 150, "evaluation_limit": 32},
}
"""Equal runs of this give equal bytes, unless an update is lost, counted twice or torn."""

_STEP = 0.1


def until(found: Callable[[], Any], what: str, seconds: float, step: float = _STEP) -> Any:
    """The first true value of `found`; fails after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(step)
    raise AssertionError(f"waited {seconds:.0f} s in vain for {what}")
