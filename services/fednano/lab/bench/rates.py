"""Samples a second of callers that have one step in flight each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

Step = Callable[[], object]


def rate(steps: Sequence[Step], samples: int, seconds: float) -> float:
    """Of all together, one thread each; a step is of `samples`. The first of each only warms up."""
    with ThreadPoolExecutor(len(steps)) as threads:
        for step in steps:
            step()
        start = time.perf_counter()
        done = sum(threads.map(lambda step: _until(step, start + seconds), steps))
        return done * samples / (time.perf_counter() - start)


def _until(step: Step, deadline: float) -> int:
    done = 0
    while time.perf_counter() < deadline:
        step()
        done += 1
    return done
