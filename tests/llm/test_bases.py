"""The store of uploaded bases: bounded, private to each owner, and on disk only while it lives."""

from __future__ import annotations

from pathlib import Path

import pytest
from fednano.llm.base_files import BaseFiles
from fednano.llm.bases import Base, BaseStore, Owner, ranges
from fednano.wire.errors import InvalidRequest, UnknownBase
from fednano.wire.tensor_pb2 import FP32

A, B = ("demo", "hospital-a"), ("demo", "hospital-b")


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def name(number: int) -> bytes:
    return bytes([number]) * 32


def fill(store: BaseStore, owner: Owner, *numbers: int, tokens: int = 1) -> None:
    """Bases of 16 bytes per token."""
    for number in numbers:
        base = Base(FP32, (tokens, 4), bytes([number]) * 16 * tokens)
        store.put(owner, name(number), base)


def held(store: BaseStore, owner: Owner, *numbers: int) -> list[int]:
    return [number for number in numbers if store.holds(owner, name(number))]


def test_what_was_put_is_found_again() -> None:
    store = BaseStore(1000, 60)
    fill(store, A, 1, 2)
    first, second = store.get(A, [name(1), name(2)])
    assert (bytes(first.data), bytes(second.data)) == (b"\1" * 16, b"\2" * 16)
    assert first.tensor().shape == (1, 4)
    assert store.memory_bytes == 32


def test_the_missing_are_named_by_their_places() -> None:
    told: list[tuple[int, int]] = []
    store = BaseStore(1000, 60, looked_up=lambda *found: told.append(found))
    fill(store, A, 1)
    with pytest.raises(UnknownBase) as caught:
        store.get(A, [name(7), name(8), name(1), name(9)])
    (problem,) = caught.value.problems
    assert (problem.field, problem.got) == ("embeddings.bases", "0-1,3")
    assert told == [(1, 3)]


def test_many_missing_ones_fit_in_the_metadata() -> None:
    text = ranges(range(0, 8192, 2))
    assert text.startswith("0,2,4")
    assert len(text) <= 1000
    assert text[-1].isdigit()


def test_another_owner_finds_nothing_and_deletes_nothing() -> None:
    store = BaseStore(1000, 60)
    fill(store, A, 1)
    for other in (B, ("other run", A[1]), ("", A[1])):
        with pytest.raises(UnknownBase):
            store.get(other, [name(1)])
        assert store.delete(other) == 0
    assert held(store, A, 1) == [1]


def test_the_longest_unused_goes_first() -> None:
    store = BaseStore(48, 60)
    fill(store, A, 1, 2, 3)
    store.get(A, [name(1)])
    fill(store, A, 4)
    assert held(store, A, 1, 2, 3, 4) == [1, 3, 4]
    assert store.memory_bytes == 48


def test_who_has_much_makes_room_for_who_has_little() -> None:
    store = BaseStore(80, 60)
    fill(store, B, 9)
    fill(store, A, 1, 2, 3, 4, 5, 6, 7)
    assert held(store, B, 9) == [9]
    assert held(store, A, 1, 2, 3, 4, 5, 6, 7) == [4, 5, 6, 7]


def test_what_is_larger_than_the_budget_is_not_kept() -> None:
    store = BaseStore(48, 60)
    fill(store, A, 1, tokens=4)
    assert len(store) == 0
    assert store.memory_bytes == 0


def test_unused_bases_end_with_their_time() -> None:
    clock = Clock()
    store = BaseStore(1000, 60, clock=clock)
    fill(store, A, 1, 2)
    clock.now += 40
    store.get(A, [name(1)])
    clock.now += 40
    with pytest.raises(UnknownBase):  # also before anybody sweeps
        store.get(A, [name(2)])
    clock.now += 40
    store.expire()
    assert len(store) == 0
    assert store.memory_bytes == 0


def test_all_or_some_of_an_owner_can_be_deleted() -> None:
    store = BaseStore(1000, 60)
    fill(store, A, 1, 2, 3)
    fill(store, B, 1)
    assert store.delete(A, [name(2), name(8)]) == 1
    assert store.delete(A) == 2
    assert held(store, B, 1) == [1]


def test_memory_goes_over_to_disk(tmp_path: Path) -> None:
    files = BaseFiles(tmp_path, limit=32)
    store = BaseStore(32, 60, files)
    fill(store, A, 1, 2, 3, 4, 5)
    assert held(store, A, 1, 2, 3, 4, 5) == [2, 3, 4, 5]
    assert [bytes(base.data) for base in store.get(A, [name(2), name(3)])] == [
        b"\2" * 16,
        b"\3" * 16,
    ]
    assert (store.memory_bytes, store.disk_bytes, len(store)) == (32, 32, 4)
    assert files.directory.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in files.directory.iterdir()} == {0o600}
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_deleting_and_expiring_remove_files(tmp_path: Path) -> None:
    clock = Clock()
    files = BaseFiles(tmp_path, limit=1000)
    store = BaseStore(0, 60, files, clock)
    fill(store, A, 1, 2)
    assert len(list(files.directory.glob("[0-9a-f]*"))) == 2
    assert store.delete(A, [name(1)]) == 1
    assert len(list(files.directory.glob("[0-9a-f]*"))) == 1
    clock.now += 61
    store.expire()
    assert list(files.directory.glob("[0-9a-f]*")) == []
    store.close()


def test_a_file_that_is_gone_is_a_base_that_is_gone(tmp_path: Path) -> None:
    files = BaseFiles(tmp_path, limit=1000)
    store = BaseStore(0, 60, files)
    fill(store, A, 1)
    for path in files.directory.glob("[0-9a-f]*"):
        path.unlink()
    with pytest.raises(UnknownBase):
        store.get(A, [name(1)])
    fill(store, A, 1)
    assert len(store.get(A, [name(1)])) == 1
    store.close()


def test_what_a_dead_process_left_is_removed_and_a_living_one_s_is_not(tmp_path: Path) -> None:
    left = tmp_path / "fednano-bases-dead"
    left.mkdir()
    (left / ".lock").touch()
    (left / ("a" * 64)).write_bytes(b"somebody's data")
    (tmp_path / "other").write_text("not ours")
    first = BaseFiles(tmp_path, limit=10)
    second = BaseFiles(tmp_path, limit=10)
    assert not left.exists()
    assert first.directory.exists()
    assert (tmp_path / "other").exists()
    first.close()
    second.close()


def test_a_directory_that_can_t_be_used_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidRequest, match="base_directory: expected a directory to write to"):
        BaseFiles(tmp_path / "file", limit=10)
