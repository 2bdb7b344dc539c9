"""Merging, measured in a process of its own, so that its memory is nobody else's.

Reads a job and writes a result, both JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
import redis

from fednano.coordinator.database import Database
from fednano.coordinator.records import Tensors
from fednano.coordinator.rounds import advanced
from fednano.coordinator.store_adapters import Places, pack_tensors, unpack_tensors
from fednano.coordinator.store_ranges import RangeReader
from fednano.coordinator.store_updates import StoredUpdates, UpdateMeta, packed_update
from fednano.coordinator.strategies import BLOCK, FISHER, FedAvg, FisherMerging, State, Update
from fednano.lab.bench.peak import peak_bytes

REDIS_URL = "FEDNANO_BENCH_REDIS_URL"  # by environment, as it holds the password
NAME = "theta"


@dataclass(frozen=True)
class Job:
    """`distinct` updates are made and used over and over, as `updates` would not fit into memory."""

    kind: (
        str  # mean: from bytes in memory; store: writes the updates; fisher and memory: from Redis
    )
    folder: str
    updates: int
    distinct: int
    parameters: int
    repeats: int

    @property
    def samples(self) -> list[int]:
        return [1 + index % 7 for index in range(self.updates)]

    def theta(self, index: int) -> Tensors:
        """The same as Flower gets."""
        rng = np.random.default_rng(index)
        return {NAME: rng.normal(0, 1, self.parameters).astype(np.float32)}

    def with_fisher(self, index: int) -> Tensors:
        rng = np.random.default_rng([1, index])
        return {**self.theta(index), FISHER + NAME: rng.random(self.parameters, np.float32)}


def main(job_file: str, result_file: str) -> None:
    job = Job(**json.loads(Path(job_file).read_text()))
    kinds = {"mean": _mean, "store": _store, "fisher": _fisher, "memory": _memory}
    Path(result_file).write_text(json.dumps(kinds[job.kind](job)))


def run_job(job: Job) -> tuple[Path, Path]:
    """Writes the job; where its result will be."""
    path = Path(job.folder) / f"{job.kind}-{job.updates}.json"
    path.write_text(json.dumps(asdict(job)))
    return path, path.with_suffix(".result")


def _mean(job: Job) -> dict[str, float]:
    """From serialised bytes in memory."""
    packed = [pack_tensors(job.theta(index)) for index in range(job.distinct)]

    def merge() -> Tensors:
        updates = [
            Update(f"c{index}", samples, unpack_tensors(*packed[index % job.distinct]), {})
            for index, samples in enumerate(job.samples)
        ]
        return FedAvg().aggregate(updates)

    used = time.process_time()
    seconds, merged = _fastest(merge, job.repeats)
    busy = (time.process_time() - used) / job.repeats
    np.save(Path(job.folder) / "ours.npy", merged[NAME])
    return {"seconds": seconds, "cpu": busy}


def _store(job: Job) -> dict[str, float]:
    """Writes updates with Fisher, as a coordinator that accepted them; their metadata to a file."""
    metas = []
    with redis.Redis.from_url(os.environ[REDIS_URL]) as server:
        for index in range(job.distinct):
            known = UpdateMeta(1, auxiliary=[FISHER + NAME])
            meta, data = packed_update(job.with_fisher(index), known)
            server.set(_key(index), data)
            metas.append(asdict(meta))
    (Path(job.folder) / "metas.json").write_text(json.dumps(metas))
    return {}


def _fisher(job: Job) -> dict[str, float]:
    """Merging from Redis beside a bare GET of the same keys, and beside its own reads alone."""
    got, read, merged = [], [], []
    with redis.Redis.from_url(os.environ[REDIS_URL]) as server:
        for _ in range(job.repeats):
            got.append(_fastest(lambda: _get(job, server), 1)[0])
            merged.append(_fastest(lambda: _merge(job), 1)[0])
            read.append(_fastest(lambda: _read(job), 1)[0])
    return {"get": min(got), "ranges": min(read), "merge": min(merged)}


def _memory(job: Job) -> dict[str, float]:
    """Peak resident bytes of a process that merges once."""
    before = psutil.Process().memory_info().rss
    _merge(job)
    return {"before": before, "peak": peak_bytes()}


def _merge(job: Job) -> Tensors:
    metas = json.loads((Path(job.folder) / "metas.json").read_text())
    accepted, names = {}, {}
    for index, samples in enumerate(job.samples):
        client = f"c{index:05d}"
        accepted[client] = UpdateMeta(**{**metas[index % job.distinct], "samples": samples})
        names[client] = _key(index % job.distinct)
    database = Database(os.environ[REDIS_URL], time.time)
    updates = StoredUpdates(database, accepted, names)
    return advanced(FisherMerging(0.1, scaled=True), State({}), updates).adapter


def _get(job: Job, server: redis.Redis) -> None:
    for index in range(job.updates):
        server.get(_key(index % job.distinct))


def _read(job: Job) -> None:
    """The ranges that merging reads, one after the other, and nothing else."""
    metas = json.loads((Path(job.folder) / "metas.json").read_text())
    size = 4 * sum(int(np.prod(shape)) for shape in Places(metas[0]["layout"]).shapes.values())
    reader = RangeReader(Database(os.environ[REDIS_URL], time.time).redis)
    for start in range(0, size, 4 * BLOCK):
        for index in range(job.updates):
            reader.read(_key(index % job.distinct), [(start, min(size, start + 4 * BLOCK))])
    reader.close()


def _key(index: int) -> str:
    return f"bench:update:{index}"


def _fastest(work: Callable[[], Tensors | None], repeats: int) -> tuple[float, Tensors]:
    """The shortest of several times, and what came out."""
    seconds, result = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result or {}


if __name__ == "__main__":
    main(*sys.argv[1:])
