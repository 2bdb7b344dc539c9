"""The bench `federation`: what its two sides are given, and how what they took is added up. Flower's
side itself is run where its environment has been made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fednano.client.datasets import DigitsShard, digits_test
from fednano.lab.bench import federation
from fednano.lab.bench.federation import Compared, Job, lora_reached
from fednano.lab.bench.federation_data import write_examples
from fednano.lab.bench.federation_ours import Reached, Wire, first_reaching, peak_bytes
from fednano.lab.bench.rows import BenchFailed
from fednano.lab.cli import FLOWER_VENV
from fednano.wire.run_config import RunConfig

FLOWER = FLOWER_VENV.expanduser() / "bin/python"
LORA = Path(federation.__file__).with_name("flower_lora.py")


def small() -> RunConfig:
    data = {"limit": 10, "evaluation_limit": 4}
    return RunConfig(name="small", clients=2, rounds=2, data=data)  # type: ignore[arg-type]


def test_the_other_side_gets_the_very_examples_in_the_order_of_a_client(tmp_path: Path) -> None:
    config = small()
    write_examples(tmp_path, config)
    images = np.load(tmp_path / "images.npz")["images"]
    asked = json.loads((tmp_path / "asked.json").read_text())
    dealt = DigitsShard.deal(config.data, config.seed, 1, 2)
    for name, wanted in (
        ("2/1/0", dealt.epoch(config.seed, 2, 0, "shard-1")),
        ("test", digits_test(4)),
    ):
        assert [(q, a) for _, q, a in asked[name]] == [(e.question, e.answer) for e in wanted]
        for (number, _, _), example in zip(asked[name], wanted, strict=True):
            np.testing.assert_array_equal(images[number], np.asarray(example.images[0]))
    assert len({image.tobytes() for image in images}) == len(images)


def test_what_was_spent_after_the_target_was_reached_is_not_counted() -> None:
    def note(number: int, client: int, size: int) -> dict[str, int]:
        return {
            "round": number,
            "client": client,
            "received": size,
            "sent": 2 * size,
            "seconds": number,
            "before": 7,
            "peak": 100 * number + client,
        }

    found = {
        "accuracy": [0.9, 0.5, 0.8, 0.9],  # before training nobody has reached anything
        "start-up": 3.0,
        "seconds": [1.0, 2.0, 4.0],
        "notes": [note(n, c, 10 + c) for n in (1, 2, 3) for c in (0, 1)],
    }
    reached = lora_reached(found, 0.8)
    assert (reached.round, reached.seconds, reached.busiest) == (2, 3.0, 3)
    assert (reached.received, reached.sent, reached.peak) == (21, 42, 201)


def test_a_target_that_nobody_reached_is_told_with_the_best_round() -> None:
    assert first_reaching(0.5, [0.9, 0.4, 0.5, 0.6], "ours") == 2
    with pytest.raises(BenchFailed, match=r"ours: 0.95 was not reached, the best round had 0.600"):
        first_reaching(0.95, [0.99, 0.4, 0.6], "ours")


def test_rows_compare_bytes_with_and_without_the_download() -> None:
    job = Job.of(small(), 0.5, Path("nowhere"))
    ours = Reached(2, [0.1, 0.2, 0.6], 1.0, 6.0, 2.0, sent=300.0, received=100.0, peak=50)
    lora = Reached(1, [0.1, 0.5], 1.0, 3.0, 2.0, sent=100.0, received=100.0, peak=100)
    sparing = Wire("factored", "int8")
    rows = list(Compared(job, small(), sparing, ours, lora, {}, edge=1000).rows())
    whole = sum(
        path.stat().st_size
        for path in Path(job.model).iterdir()
        if path.name not in ("README.md", "figures.json")
    )
    assert whole > 3_000_000
    assert [row.figure for row in rows] == [1400 / (whole + 200), 2.0, 0.5, 2.0]
    assert [row.met for row in rows] == [True, None, True, None]
    dense = Compared(job, small(), Wire("dense", "fp32"), ours, lora, {}, edge=1000).rows()
    assert all(row.reach is None for row in dense)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
def test_the_peak_memory_is_that_of_the_process_itself() -> None:
    held = np.ones(4 << 20)  # 32 MiB in this process, which the one that is asked about starts from
    waiting = [sys.executable, "-S", "-c", "print(flush=True); input()"]
    with subprocess.Popen(waiting, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert 1 << 20 < peak_bytes(process.pid) < held.nbytes < peak_bytes(os.getpid())
        process.communicate(b"\n")
    with pytest.raises(BenchFailed, match="Linux"):
        peak_bytes(process.pid)


TRAINED = """
import json, sys
sys.path.insert(0, sys.argv[1])
from flower_lora import Examples, WholeModel
job = json.loads(open(sys.argv[2]).read())
examples = Examples(job["folder"])
whole = WholeModel(job["model"], job["rank"], job["alpha"], 0)
before = whole.accuracy(examples["test"], 8)
losses = [whole.train([examples["1/0/0"]], 5e-3, 4, 1.0) for _ in range(4)]
print(json.dumps({"before": before, "losses": losses, "names": list(whole.lora)}))
"""


def flower_has_peft() -> bool:
    return FLOWER.exists() and any(FLOWER.parent.parent.glob("lib/*/site-packages/peft"))


@pytest.mark.slow
@pytest.mark.skipif(not flower_has_peft(), reason="made by `fednano bench federation`")
def test_lora_learns_on_the_attention_of_the_llm_alone(tmp_path: Path) -> None:
    write_examples(tmp_path, small())
    job = tmp_path / "job.json"
    job.write_text(json.dumps(asdict(Job.of(small(), 0.5, tmp_path))))
    command = [str(FLOWER), "-c", TRAINED, str(LORA.parent), str(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["losses"][-1] < found["losses"][0] / 2
    assert len(found["names"]) == 4 * 4 * 2  # layers, projections, A and B
    assert not [name for name in found["names"] if "vision" in name or "mlp" in name]
    assert (
        found["before"] >= 0.25
    )  # the model knows some handwriting untuned; garbled prompts don't


def test_flowers_scripts_run_where_fednano_is_not_installed() -> None:
    for path in (LORA, LORA.with_name("flower_federation.py")):
        assert "fednano" not in path.read_text()
