"""What is done beside the batch that a GPU computes: a request is brought there, and a reply back.

Whatever a GPU is given goes into a stream, and by default all threads share one: then a copy for the
next batch waits for this one to end. And memory that the system may move is copied to memory it may not
move before a GPU can read it.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

import torch

from fednano.wire import codec

log = logging.getLogger(__name__)

T = TypeVar("T")


class Beside:
    """Runs work on a device in a stream of the calling thread's own, and returns when it is done: then
    any stream may use what it made. It may use what any stream has done before."""

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
        with torch.cuda.stream(stream):
            found = work()
        stream.synchronize()
        return found


def page_locked(data: codec.Buffer) -> codec.Buffer:
    """A copy that a GPU can read by itself; where the system refuses, `data`, which it reads slower.

    Not torch's own: that takes the next power of two.
    """
    region = mmap.mmap(-1, len(data))
    region[:] = data
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    refused = int(torch.cuda.cudart().cudaHostRegister(address, len(data), 0))
    if refused:
        log.warning("memory not locked for the GPU", extra={"cuda_error": refused})
        return data
    weakref.finalize(region, torch.cuda.cudart().cudaHostUnregister, address)
    return memoryview(region)
