"""A client in a process of its own, so that its memory is nobody else's.

Reads a job and writes a result, both JSON.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from fednano.client.cache import FeatureCache
from fednano.client.edge import EdgeHalf
from fednano.client.factored import FactoredLanguageModel
from fednano.client.remote import Caller, RemoteLanguageModel
from fednano.client.replicas import Replicas
from fednano.client.trainer import Trainer
from fednano.lab.bench.peak import peak_bytes
from fednano.lab.bench.served import make_examples, make_long_examples, new_adapters
from fednano.lab.bench.wide import HIDDEN, RANK, SIDE, TOKENS
from fednano.models.checkpoint import read_record
from fednano.wire.headers import make_header
from fednano.wire.run_config import TrainingConfig
from fednano.wire.tensor_pb2 import BF16

TOKEN = "FEDNANO_BENCH_TOKEN"  # by environment, as it is a secret


@dataclass(frozen=True)
class Job:
    edge: str
    address: str
    wire: str
    batch: int
    features: str  # a directory, so that a second client needn't encode all again,
    own: int  # but one image, the so-many-th behind the batch's


def main(job_file: str, result_file: str) -> None:
    job = Job(**json.loads(Path(job_file).read_text()))
    found = {"before": peak_bytes()}
    token, replicas = os.environ[TOKEN], Replicas(job.address)
    try:
        caller = Caller(lambda: make_header(job.wire), lambda: token)
        _work(job, RemoteLanguageModel(replicas, caller, wire_dtype=BF16), found)
    finally:
        replicas.close()
    Path(result_file).write_text(json.dumps(found))


def _work(job: Job, remote: RemoteLanguageModel, found: dict[str, int]) -> None:
    """Loads, encodes, takes two steps: the factored wire's first one uploads."""
    directory = Path(job.edge)
    cache = FeatureCache(read_record(directory, "edge").fingerprint, Path(job.features))
    edge = EdgeHalf(directory, remote, cache)
    found["loaded"] = peak_bytes()
    edge.features(make_examples(job.batch + job.own, SIDE)[-1].images[0])
    examples = make_long_examples(edge, job.batch, SIDE, TOKENS)
    for example in examples:
        edge.prepare(example)
    found["encoded"] = peak_bytes()
    factored = FactoredLanguageModel(remote) if job.wire == "factored" else None
    settings = TrainingConfig(batch_size=job.batch, epochs=2)
    adapters = new_adapters(HIDDEN, RANK)
    Trainer(edge, remote, factored).train(adapters, lambda epoch: examples, settings)
    found["peak"] = peak_bytes()


if __name__ == "__main__":
    main(*sys.argv[1:])
