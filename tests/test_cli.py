"""What all processes of the `fednano` command have in common."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from fednano.cli import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()

def round_of_blocks():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [np.ones(100_000, np.float32) for _ in range(8)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(sorted(round_of_blocks() for _ in range(21))[10])
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc gives blocks back at once"
)
def test_memory_that_was_freed_is_had_again_without_page_faults() -> None:
    """Eight blocks of 391 KiB are some 780 pages."""
    assert page_faults("as it is") > 500
    assert page_faults("kept") < 50


def page_faults(how: str) -> int:
    """Of the median round."""
    around = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    command = [sys.executable, "-c", FAULTS, how]
    done = subprocess.run(command, env=around, capture_output=True, text=True, check=True)
    return int(done.stdout)
