"""What needs no GPU of what is done beside one."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from fednano.llm import beside
from fednano.llm.beside import Beside, page_locked


class Runtime:
    """CUDA's, as far as it is asked; `refuses` like one that has no more to lock."""

    def __init__(self, refuses: bool = False) -> None:
        self.refuses = refuses
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        if self.refuses:
            return 2
        self.locked[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        assert address in maps(), "still mapped"
        del self.locked[address]
        return 0


def maps() -> range:
    """Of addresses, those of the mapping that holds the locked one."""
    with open("/proc/self/maps") as file:
        spans = [line.split()[0].split("-") for line in file]
    return next(
        range(int(a, 16), int(b, 16)) for a, b in spans if int(a, 16) <= ADDRESS[0] < int(b, 16)
    )


ADDRESS = [0]
DATA = np.random.default_rng(0).bytes(beside._WORTH_LOCKING)


def runtime(monkeypatch: pytest.MonkeyPatch, **how: Any) -> Runtime:
    made = Runtime(**how)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    return made


def test_locked_memory_is_given_back_while_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = runtime(monkeypatch)
    copy = page_locked(DATA)
    ADDRESS[0] = next(iter(cuda.locked))
    assert bytes(copy) == DATA
    part = copy[3:7]
    del copy
    gc.collect()
    assert cuda.locked == {ADDRESS[0]: len(DATA)}
    assert bytes(part) == DATA[3:7]
    del part
    gc.collect()
    assert not cuda.locked


def test_what_is_refused_or_small_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime(monkeypatch, refuses=True)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    assert page_locked(DATA) is DATA
    assert page_locked(b"few") == b"few"


def test_without_a_gpu_work_is_just_done() -> None:
    here = Beside(torch.device("cpu"))
    assert not here.apart
    assert here(lambda: 7) == 7
    here.wait()
