"""`fednano bench`, as a person starts it: small sizes, real services. Figures are not asserted on, but
that they are there, that they belong together, and that the exit status follows from them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import psutil
import pytest
from fednano.lab.bench import flower_worker, slow_link
from fednano.lab.bench.cable import BURST
from fednano.lab.bench.merge_worker import Job, main, run_job
from fednano.lab.bench.registry import BENCHES, chosen
from fednano.lab.bench.rows import Reach, Row, Surroundings
from fednano.lab.bench.run import run_benches
from fednano.lab.bench.served import Service
from fednano.lab.bench.wide import whole_llava
from fednano.lab.processes import FEDNANO, Processes
from fednano.wire.errors import InvalidRequest

pytestmark = pytest.mark.timeout(400)


def bench(*arguments: str, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*FEDNANO, "bench", *arguments],
        env={**os.environ, "COLUMNS": "200", **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def figures(name: str, tmp_path: Path) -> tuple[list[dict[str, Any]], str]:
    """The rows of one bench at its quick size, and what it told on the way."""
    found = tmp_path / "figures.json"
    running = bench(name, "--quick", "--json", str(found), TMPDIR=str(tmp_path))
    printed, told = running.communicate(timeout=380)
    assert found.exists(), told
    result = json.loads(found.read_text())
    assert result["machine"]["cores"] >= 1
    assert result["machine"]["cpu"] in " ".join(printed.split())
    missed = [row for row in result["rows"] if row["met"] is False]
    assert running.returncode == (1 if missed else 0)
    assert ("missed" in printed) == bool(missed)
    assert not list(tmp_path.glob("fednano-bench-*"))  # it held keys and tokens
    assert all(row["bench"] == name and row["setting"] for row in result["rows"])
    return result["rows"], told


@pytest.mark.slow
def test_the_split_step_is_measured_beside_the_whole_one(tmp_path: Path) -> None:
    (row, *large), told = figures("step", tmp_path)
    assert row["reach"] == "at most 1.15"
    assert [each["met"] for each in large] == [None] * 3  # a GPU's, which --quick leaves out
    assert {each["parts"]["would be measured by"] for each in large} == {"fednano bench step"}
    parts = row["parts"]
    assert row["figure"] == pytest.approx(parts["split ms a step"] / parts["whole ms a step"])
    assert row["setting"] | {"batch": 16, "dtype": "fp32", "rank": 16} == row["setting"]
    assert "turns of" in told


@pytest.mark.slow
def test_clients_are_measured_against_one_alone_and_one_large_batch(tmp_path: Path) -> None:
    found, _ = figures("clients", tmp_path)
    rows, large = found[:3], found[3:]
    assert [row["setting"]["clients"] for row in rows] == [1, 2, 4]
    assert [row["setting"]["clients"] for row in large] == [1, 2, 4, 8, 16]
    assert not any("samples/s" in row["parts"] for row in large)  # a GPU's, left out by --quick
    assert [row["met"] is None for row in rows] == [True, False, False]
    single = rows[0]["parts"]["samples/s"]
    for row in rows:
        assert row["figure"] == pytest.approx(row["parts"]["samples/s"] / single)


@pytest.mark.slow
def test_simulated_clients_lose_no_update(tmp_path: Path) -> None:
    rows, _ = figures("coordinator", tmp_path)
    latency, _, lost = rows
    assert latency["unit"] == "ms"
    assert latency["parts"]["calls held to the end"] > 0
    assert lost["met"]
    parts = lost["parts"]
    assert parts["acknowledged"] == parts["in rounds"] == parts["in ledger"] == 300


@pytest.mark.slow
def test_the_factored_wire_is_measured_in_the_shape_of_a_large_model(tmp_path: Path) -> None:
    traffic, upload, gradients = figures("wire", tmp_path)[0]
    sizes = traffic["parts"]
    assert sizes["dense, sent"] > 16 * 700 * 4096 * 2 > sizes["factored, sent"] * 30
    both = {w: sizes[f"{w}, sent"] + sizes[f"{w}, received"] for w in ("dense", "factored")}
    assert traffic["figure"] == pytest.approx(both["factored"] / both["dense"])
    assert traffic["met"]
    assert upload["parts"]["uploaded once, bytes a sample"] > 700 * 4096 * 2
    assert 0 < gradients["figure"] <= 10  # 0 would be something compared with itself
    assert len(gradients["parts"]) == 4


@pytest.mark.parametrize("laid", [True, False])
def test_a_slow_link_carries_every_byte_and_is_never_faster_than_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, laid: bool
) -> None:
    """No load makes it faster, so a lower bound holds on a busy machine too."""
    if not laid:
        monkeypatch.setattr("os.geteuid", lambda: 1000)
    sent = np.random.default_rng(0).bytes(100_000)
    with Processes(tmp_path) as processes, echo() as port:
        around = Surroundings(tmp_path, processes, True, tmp_path, print)
        with slow_link.link(around, Service(f"127.0.0.1:{port}", b""), rate=20) as far:
            if laid and far.made_by == "a TCP relay":
                pytest.skip("no network namespaces here, or no tc")
            host, _, there = far.service.address.rpartition(":")
            start = time.monotonic()
            with socket.create_connection((host, int(there)), timeout=60) as connection:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                came = b"".join(iter(lambda: connection.recv(1 << 16), b""))
            took = time.monotonic() - start
    assert came == sent
    assert took >= (len(sent) - BURST) * 8 / 20e6 + 0.040
    if laid:
        names = subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
        assert f"fednano-{os.getpid()}-" not in names


@contextmanager
def echo() -> Iterator[int]:
    """Sends back what one connection brings, until that ends."""

    def answer() -> None:
        connection, _ = listening.accept()
        with connection:
            for piece in iter(lambda: connection.recv(1 << 16), b""):
                connection.sendall(piece)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = Thread(target=answer, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        thread.join(60)


def test_the_large_model_that_is_compared_with_has_its_published_size() -> None:
    assert whole_llava().parameters == 7_063_427_072
    assert whole_llava().bytes == 2 * 7_063_427_072


def test_the_list_names_every_bench() -> None:
    printed, _ = bench("--list").communicate(timeout=60)
    assert all(each.name in printed and each.reach.split()[0] in printed for each in BENCHES)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sprint"], "NAME: expected one of step, step-cached, wire"),
        ([], "NAME: expected one or more of step"),
        (["step", "--json", "/no/such/folder/f.json"], "--json: expected a file in a directory"),
    ],
)
def test_bad_usage_is_named(arguments: list[str], words: str) -> None:
    running = bench(*arguments)
    _, told = running.communicate(timeout=60)
    assert running.returncode == 2
    assert words in " ".join(told.split())


def test_a_bench_asked_for_twice_runs_once() -> None:
    assert [each.name for each in chosen(["step", "aggregate", "step"])] == ["step", "aggregate"]
    with pytest.raises(InvalidRequest):
        chosen(["stp"])


def test_a_reach_is_held_or_missed() -> None:
    assert Reach("at most", 1.15).holds(1.15)
    assert not Reach("at most", 1.15).holds(1.16)
    assert Reach("at least", 0.8).holds(0.8)
    assert not Reach("at least", 0.8).holds(0.79)
    assert Row("step", "for information", 3.0, "x", {}).met is None


def test_flower_that_cannot_be_installed_is_told_in_a_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # its logs stay
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # nothing can be found
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert run_benches(["aggregate"], True, None, tmp_path / "flower") == 1
    assert "Flower could not be installed into" in " ".join(capfd.readouterr().err.split())


def test_ctrl_c_ends_every_process(tmp_path: Path) -> None:
    running = bench("coordinator", TMPDIR=str(tmp_path))
    deadline = time.monotonic() + 120
    while not (started := descendants(running.pid)) or len(started) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "every process was ended" in told
    assert not [process for process in started if process.is_running()]
    assert not list(tmp_path.glob("fednano-bench-*"))


def descendants(pid: int) -> list[psutil.Process]:
    """Redis and the coordinator."""
    return psutil.Process(pid).children(recursive=True)


def test_the_worker_merges_what_flower_is_given(tmp_path: Path) -> None:
    job = Job("mean", str(tmp_path), updates=5, distinct=2, parameters=1000, repeats=1)
    path, result = run_job(job)
    main(str(path), str(result))
    assert json.loads(result.read_text())["seconds"] > 0
    thetas = [job.theta(index % 2)["theta"].astype(np.float64) for index in range(5)]
    expected = np.average(thetas, axis=0, weights=[1, 2, 3, 4, 5])
    np.testing.assert_allclose(np.load(tmp_path / "ours.npy"), expected, rtol=1e-6, atol=1e-7)


def test_flowers_worker_runs_where_fednano_is_not_installed() -> None:
    assert "fednano" not in Path(flower_worker.__file__).read_text()
