"""What a step costs in bytes, factored against dense, in LLaVA-1.5-7B's shape; and the same gradients.

The bytes are those of the messages between a real client and a real service, heads and labels
included, as the client counts them for the ledger.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fednano.client.adapters import NanoAdapters
from fednano.client.batches import Batch
from fednano.client.edge import EdgeHalf, NanoEdge
from fednano.client.examples import Example
from fednano.client.factored import FactoredLanguageModel
from fednano.client.remote import RemoteLanguageModel
from fednano.client.trainer import Trainer
from fednano.client.wires import DenseWire, FactoredWire, Wire
from fednano.lab.bench.rows import BenchFailed, Reach, Row, Surroundings
from fednano.lab.bench.served import (
    Service,
    make_long_examples,
    new_adapters,
    serve,
    taken_bytes,
)
from fednano.lab.bench.wide import BATCH, HIDDEN, RANK, SIDE, TOKENS, clip_small, wide
from fednano.wire.run_config import TrainingConfig
from fednano.wire.tensor_pb2 import BF16, FP32

_MILLION = 1_000_000
_SCALE = 0.7
"""Of the gradients: with a power of two both ways round alike, and nothing would be compared."""


def measure(around: Surroundings) -> Iterator[Row]:
    """Bytes are counted in bf16, gradients compared in fp32."""
    around.say("a model with vectors of 4096, cut in two")
    model = wide(around.directory, "wide", clip_small(), torch.float32)
    with serve(around, model) as service, service.caller("edge") as remote:
        edge = EdgeHalf(model.halves / "edge", remote)
        examples = make_long_examples(edge, BATCH, SIDE, TOKENS)
        for example in examples:
            edge.prepare(example)  # asks for rows of the embedding table, which is no step
        yield from _bytes(around, service, edge, examples)
        yield _gradients(around, service, edge, examples[: 4 if around.quick else BATCH])


@dataclass(frozen=True)
class Traffic:
    """Bytes of one step."""

    sent: int
    received: int

    @classmethod
    def of(cls, trainer: Trainer, remote: RemoteLanguageModel, examples: list[Example]) -> Traffic:
        """Of a local epoch that is one step."""
        remote.calls.meter.take()
        settings = TrainingConfig(batch_size=len(examples))
        trainer.train(new_adapters(HIDDEN, RANK), lambda epoch: examples, settings)
        return cls(*taken_bytes(remote.calls.meter))

    @property
    def both(self) -> int:
        return self.sent + self.received


def _bytes(
    around: Surroundings, service: Service, edge: EdgeHalf, examples: list[Example]
) -> Iterator[Row]:
    """One dense step; two factored ones, of which the first uploads what doesn't change."""
    around.say(f"steps of {len(examples)} samples in bf16: one dense, two factored")
    with service.caller("bytes", BF16) as remote:
        dense = Traffic.of(Trainer(edge, remote), remote, examples)
        by_factors = Trainer(edge, remote, FactoredLanguageModel(remote))
        first = Traffic.of(by_factors, remote, examples)
        factored = Traffic.of(by_factors, remote, examples)
    yield Row(
        "wire",
        "bytes per step, factored / dense",
        factored.both / dense.both,
        "x",
        _setting(len(examples), "bf16"),
        {
            "dense, sent": dense.sent,
            "dense, received": dense.received,
            "factored, sent": factored.sent,
            "factored, received": factored.received,
            "dense / factored": dense.both / factored.both,
        },
        Reach("at most", 1 / 30),
    )
    yield _upload(dense, first, factored, len(examples))


def _upload(dense: Traffic, first: Traffic, factored: Traffic, batch: int) -> Row:
    """The first step's extra bytes: the upload, and U and W again after the service said what it
    lacked."""
    once = first.both - factored.both
    return Row(
        "wire",
        "epochs until the upload has paid",
        once / (dense.both - factored.both),
        "epochs",
        _setting(batch, "bf16"),
        {
            "uploaded once, bytes a sample": round(once / batch),
            "only what is sent counted, epochs": (first.sent - factored.sent)
            / (dense.sent - factored.sent),
        },
    )


def _gradients(
    around: Surroundings, service: Service, edge: EdgeHalf, examples: list[Example]
) -> Row:
    """Of each tensor of the adapters, relative to its norm; the largest counts."""
    around.say(f"gradients of {len(examples)} samples in fp32, factored and dense")
    batch = Batch.of([edge.prepare(example) for example in examples])
    adapters = new_adapters(HIDDEN, RANK, _SCALE)
    with service.caller("gradients", FP32) as remote:
        meter = remote.calls.meter
        wanted = _gradient(DenseWire(remote), adapters, batch)
        dense, _ = taken_bytes(meter)
        wire = FactoredWire(FactoredLanguageModel(remote))
        _gradient(wire, adapters, batch)  # uploads
        meter.take()
        found = _gradient(wire, adapters, batch)
        factored, _ = taken_bytes(meter)
    if factored > dense / 2:
        raise BenchFailed("the service kept no bases: what was compared is dense with dense")
    off = {name: float((found[name] - g).norm() / g.norm()) for name, g in wanted.items()}
    return Row(
        "wire",
        "gradients, factored - dense, relative",
        max(off.values()) * _MILLION,
        "millionths",
        _setting(len(examples), "fp32"),
        {f"{name.removeprefix('by_name.')}, millionths": v * _MILLION for name, v in off.items()},
        Reach("at most", 1e-5 * _MILLION),
    )


def _gradient(wire: Wire, adapters: NanoAdapters, batch: Batch) -> dict[str, torch.Tensor]:
    own = copy.deepcopy(adapters)
    wire.step(NanoEdge(own), batch, None).backward()
    return {name: p.grad for name, p in own.named_parameters() if p.grad is not None}


def _setting(batch: int, dtype: str) -> dict[str, str | int | float]:
    return {
        "shape": f"LLaVA-1.5-7B's: hidden {HIDDEN}, 576 image tokens; an LLM of one layer",
        "batch": batch,
        "tokens a sample": TOKENS,
        "rank": RANK,
        "dtype": f"{dtype} on the wire, fp32 in the LLM",
        "wire": "dense and factored, loopback",
    }
