"""What a site has to have: disk and memory of a client for LLaVA-1.5-7B's shape.

The client's half is made and cut by the real split, with random weights in bf16. The client is a
process of its own; the service behind it has vectors as wide, and little else.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fednano.lab.bench.checkpoints import Model
from fednano.lab.bench.client_memory_worker import TOKEN, Job
from fednano.lab.bench.rows import Reach, Row, Surroundings
from fednano.lab.bench.served import Service, serve
from fednano.lab.bench.wide import (
    BATCH,
    HIDDEN,
    RANK,
    TOKENS,
    clip_large,
    embedding_table,
    whole_llava,
    wide,
)

_MIB = 1 << 20
_WIRES = ("dense", "factored")
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def measure(around: Surroundings) -> Iterator[Row]:
    """Disk, then the peak of a client by each wire."""
    around.say("the edge half of LLaVA-1.5-7B's shape (0.7 GB of disk for a while)")
    model = wide(around.directory, "edge-7b", clip_large(), torch.bfloat16)
    shutil.rmtree(around.directory / "edge-7b-whole")
    yield _disk(model)
    with serve(around, model) as service:
        measured = Measured(around, model, service)
        for wire in _WIRES[:1] if around.quick else _WIRES:
            yield measured.row(wire)


def _disk(model: Model) -> Row:
    """Of everything in the client's directory."""
    edge, whole, table = _size(model.halves / "edge"), whole_llava(), embedding_table()
    return Row(
        "client-memory",
        "disk of a client / of the whole model",
        100 * edge / whole.bytes,
        "%",
        {"shape": "LLaVA-1.5-7B's", "dtype": "bf16", "batch": "-", "tokens": "-", "wire": "-"},
        {
            "client MiB": edge / _MIB,
            "client parameters": model.report.edge.parameters,
            "whole model MiB": whole.bytes / _MIB,
            "whole model parameters": whole.parameters,
            "with the embedding table, %": 100 * (edge + table.bytes) / whole.bytes,
        },
        Reach("at most", 5.0),
    )


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@dataclass(frozen=True)
class Measured:
    """One service, and a client process for each wire."""

    around: Surroundings
    model: Model
    service: Service

    def row(self, wire: str) -> Row:
        batch = 2 if self.around.quick else BATCH
        self.around.say(f"a client that encodes {batch} images and takes a step, {wire}")
        found = self._run(wire, batch)
        theory = _theory(self.model.report.edge.parameters, batch, wire)
        return Row(
            "client-memory",
            f"peak resident memory of a client, {wire}",
            found["peak"] / _MIB,
            "MiB",
            {
                "shape": f"LLaVA-1.5-7B's: hidden {HIDDEN}, 576 image tokens",
                "batch": batch,
                "tokens a sample": TOKENS,
                "rank": RANK,
                "dtype": "bf16 on disk, fp32 in the client's memory",
                "wire": f"{wire} bf16, loopback",
                "threads": 1,
            },
            {f"theoretical, {name}, MiB": size / _MIB for name, size in theory.items()}
            | {
                "theoretical, together, MiB": sum(theory.values()) / _MIB,
                "before anything is loaded, MiB": found["before"] / _MIB,
                "peak of loading, MiB": found["loaded"] / _MIB,
                "peak of encoding, MiB": found["encoded"] / _MIB,
                "whole model's weights in bf16, MiB": whole_llava().bytes / _MIB,
            },
        )

    def _run(self, wire: str, batch: int) -> dict[str, float]:
        folder = self.around.directory
        job_file, result = folder / f"{wire}.json", folder / f"{wire}.result"
        edge = str(self.model.halves / "edge")
        job = Job(
            edge,
            self.service.address,
            wire,
            batch,
            str(folder / "features"),
            1 + _WIRES.index(wire),
        )
        job_file.write_text(json.dumps(asdict(job)))
        worker = "fednano.lab.bench.client_memory_worker"
        command = [sys.executable, "-m", worker, str(job_file), str(result)]
        secret = {TOKEN: self.service.token(wire)}
        self.around.processes.run(f"client-{wire}", command, _ENVIRONMENT | secret)
        found: dict[str, float] = json.loads(result.read_text())
        return found


def _theory(parameters: int, batch: int, wire: str) -> dict[str, float]:
    """What a step can't do without, in bytes: the frozen half, a cache of what it made of the
    batch's images, the adapters (each with gradient and two moments), and the vectors themselves."""
    vector, tokens = 4 * HIDDEN, batch * TOKENS
    vectors = {"dense": 3, "factored": 1}[wire]  # x, e and its gradient; of x + U W only x
    return {
        "edge half in fp32": 4.0 * parameters,
        "features": 576.0 * batch * vector,
        "adapters and optimiser": 4.0 * 2 * 2 * RANK * vector,
        "a batch's vectors": float(vectors * tokens * vector),
    }
