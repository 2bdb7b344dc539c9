"""What a run of benches leaves behind."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fednano.lab.bench import run
from fednano.lab.bench.rows import Bench, BenchFailed, Surroundings


@pytest.mark.parametrize(
    ("failure", "kept"), [(ZeroDivisionError("a bug"), False), (BenchFailed("too slow"), True)]
)
def test_logs_are_kept_where_somebody_is_told_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, kept: bool
) -> None:
    def measure(around: Surroundings) -> Iterator[None]:
        (around.directory / "service.log").write_text("what happened")
        raise failure
        yield

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(run, "chosen", lambda names: [Bench("broken", "", "", lambda: measure)])
    try:
        assert run.run_benches(["broken"], True, None, tmp_path) == 1
    except ZeroDivisionError:
        assert not kept
    assert bool(list(tmp_path.rglob("service.log"))) == kept
