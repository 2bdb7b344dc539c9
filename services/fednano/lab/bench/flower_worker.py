"""Flower's two FedAvg implementations, timed in Flower's own environment: a script of its own, which
imports nothing of ours. Reads a job and writes a result, both JSON; the result says its version."""

# mypy: ignore-errors

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np


def main(job_file: str, result_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    arrays = [
        np.random.default_rng(seed).normal(0, 1, job["parameters"]).astype(np.float32)
        for seed in range(job["distinct"])
    ]
    samples = [1 + index % 7 for index in range(job["updates"])]
    found = {"version": version("flwr"), "python": sys.version.split()[0]}
    for name, prepare in (("server", _strategy), ("serverapp", _records)):
        merge = prepare(arrays, samples)
        seconds, busy = [], []
        for _ in range(job["repeats"]):
            start, used = time.perf_counter(), time.process_time()
            result = merge()
            seconds.append(time.perf_counter() - start)
            busy.append(time.process_time() - used)
        found[name], found[f"{name} cpu"] = min(seconds), min(busy)
        np.save(Path(job["folder"]) / f"flower-{name}.npy", result)
    Path(result_file).write_text(json.dumps(found))


def _strategy(arrays, samples):
    """flwr.server.strategy.FedAvg with its defaults, as ServerApp-less Flower runs it."""
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
    from flwr.server.strategy import FedAvg

    sent = [ndarrays_to_parameters([array]) for array in arrays]
    ok = Status(Code.OK, "")
    results = [(None, FitRes(ok, sent[i % len(sent)], n, {})) for i, n in enumerate(samples)]
    strategy = FedAvg()

    def merge():
        merged, _ = strategy.aggregate_fit(2, results, [])
        return parameters_to_ndarrays(merged)[0]

    return merge


def _records(arrays, samples):
    """What flwr.serverapp.strategy.FedAvg calls to merge."""
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    sent = [ArrayRecord({"theta": Array(array)}) for array in arrays]
    records = [
        RecordDict({"arrays": sent[i % len(sent)], "metrics": MetricRecord({"num-examples": n})})
        for i, n in enumerate(samples)
    ]

    def merge():
        return aggregate_arrayrecords(records, "num-examples")["theta"].numpy()

    return merge


if __name__ == "__main__":
    main(*sys.argv[1:])
