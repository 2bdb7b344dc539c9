"""What is done beside the batch that a GPU computes: a request is brought there, and a reply back.

Whatever a GPU is given goes into a stream, and by default all threads share one: then a copy for the
next batch waits for this one to end. And memory that the system may move is copied to memory it may not
move before a GPU can read it.
"""

from __future__ import annotations

import logging
import mmap
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import numpy as np
import torch

from fednano.wire import codec

log = logging.getLogger(__name__)

T = TypeVar("T")
_WORTH_LOCKING = 1 << 18
"""Bytes. A process may have some 65,000 regions of memory, and a small copy is short."""


class Beside:
    """Runs work on a device in a stream of the calling thread's own, and returns when it is done: then
    any stream may use what it made. It may use what the device's thread has waited for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own = threading.local()

    @property
    def apart(self) -> bool:
        """Whether there is something to run beside: a GPU."""
        return self._device.type == "cuda"

    def __call__(self, work: Callable[[], T]) -> T:
        if not self.apart:
            return work()
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self._device)
        stream: torch.cuda.Stream = self._own.stream
        try:
            with torch.cuda.stream(stream):
                return work()
        finally:  # a failure's copies, too, may still read memory that is about to go
            stream.synchronize()

    def wait(self) -> None:
        """Until the device has done what the calling thread gave it outside of this."""
        if self.apart:
            torch.cuda.current_stream(self._device).synchronize()


def page_locked(data: codec.Buffer) -> codec.Buffer:
    """A copy that a GPU can read by itself; where the system refuses, `data`, which it reads slower.

    Not torch's own: that takes the next power of two.
    """
    if len(data) < _WORTH_LOCKING:
        return data
    try:
        region = mmap.mmap(-1, len(data), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        log.warning("memory not locked for the GPU", extra={"reason": str(error)})
        return data
    region[:] = data
    runtime, held = torch.cuda.cudart(), np.frombuffer(region, np.uint8)
    refused = int(runtime.cudaHostRegister(held.ctypes.data, len(data), 0))
    if refused:
        with suppress(RuntimeError):  # CUDA remembers the error, and the next to look would get it
            torch.zeros(1, device="cuda")
        log.warning("memory not locked for the GPU", extra={"cuda_error": refused})
        return data
    # Before `region` is unmapped: that is after what looks into it is gone.
    weakref.finalize(held, runtime.cudaHostUnregister, held.ctypes.data).atexit = False
    return held.data
