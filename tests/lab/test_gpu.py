"""On a GPU the split step has the whole model's gradient, by either wire, alone and in company. Other
tests hold a CPU to that; what only a GPU has is a device that is waited for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
import torch
from fednano.client.adapters import NanoAdapters, Tensors
from fednano.client.batches import Batch
from fednano.client.edge import EdgeHalf, NanoEdge
from fednano.client.factored import FactoredLanguageModel
from fednano.client.trainer import EvaluationResult, Trainer, TrainResult
from fednano.client.wires import DenseWire, FactoredWire, Wire
from fednano.lab.bench.checkpoints import Model
from fednano.lab.bench.large import make
from fednano.lab.bench.served import Place, Service, make_long_examples, new_adapters, serve, whole
from fednano.lab.processes import Processes
from fednano.models.devices import DeviceName
from fednano.models.frozen import FrozenLLM
from fednano.wire.run_config import TrainingConfig
from fednano.wire.tensor_pb2 import BF16, FP32

from tests.lab.test_bench_large import SMALL, around

DEVICE: DeviceName = "cuda"
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(300),
]
_TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}
"""Relative to the norm of a tensor's gradient on a CPU in fp32."""


@dataclass(frozen=True)
class Served:
    """A model behind a service on the GPU, and the same in this process, on a CPU in fp32."""

    dtype: str
    model: Model
    service: Service
    reference: FrozenLLM

    def batch(self, samples: int, tokens: int) -> Batch:
        edge = EdgeHalf(self.model.halves / "edge", self.reference)
        examples = make_long_examples(edge, samples, self.model.side, tokens)
        return Batch.of([edge.prepare(example) for example in examples])

    def wire(self, stack: ExitStack, form: str, client: str) -> Wire:
        dtype = FP32 if self.dtype == "fp32" else BF16
        remote = stack.enter_context(self.service.caller(client, dtype))
        return DenseWire(remote) if form == "dense" else FactoredWire(FactoredLanguageModel(remote))


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    folder = tmp_path_factory.mktemp("gpu")
    with Processes(folder) as processes:
        place = around(folder, processes)
        model = make(folder, SMALL, DEVICE)
        with serve(place, model, Place(DEVICE, request.param, 1)) as service:
            yield Served(request.param, model, service, whole(model, Place("cpu", "fp32", 1)))


def gradients(wire: Wire, batch: Batch, adapters: NanoAdapters) -> dict[str, torch.Tensor]:
    own = copy.deepcopy(adapters)
    wire.step(NanoEdge(own), batch, None).backward()
    return {name: p.grad for name, p in own.named_parameters() if p.grad is not None}


def check(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], most: float) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert float((found[name] - gradient).norm() / gradient.norm()) < most, name


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_a_split_step_has_the_whole_models_gradient(served: Served, form: str) -> None:
    batch, adapters = served.batch(8, 48), new_adapters(128, 4)
    wanted = gradients(DenseWire(served.reference), batch, adapters)
    with ExitStack() as stack:
        found = gradients(served.wire(stack, form, f"one-{form}"), batch, adapters)
    check(found, wanted, _TOLERANCE[served.dtype])


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_a_client_on_a_gpu_finds_what_one_on_a_cpu_does(served: Served, form: str) -> None:
    wanted, wanted_loss = by_client(served, form, "cpu")
    trained, loss = by_client(served, form, DEVICE)
    assert trained.loss == pytest.approx(wanted.loss, rel=_TOLERANCE[served.dtype])
    assert loss.loss == pytest.approx(wanted_loss.loss, rel=2 * _TOLERANCE[served.dtype])
    check(tensors(trained.fisher), tensors(wanted.fisher), 2 * _TOLERANCE[served.dtype])
    assert trained.adapter.keys() == wanted.adapter.keys()


def by_client(
    served: Served, form: str, device: DeviceName
) -> tuple[TrainResult, EvaluationResult]:
    """A step with the Fisher estimate, and what came of it."""
    dtype = FP32 if served.dtype == "fp32" else BF16
    with served.service.caller(f"{device}-{form}", dtype) as remote:
        edge = EdgeHalf(served.model.halves / "edge", remote, device=device)
        factored = FactoredLanguageModel(remote) if form == "factored" else None
        trainer = Trainer(edge, remote, factored)
        examples = make_long_examples(edge, 8, served.model.side, 48)
        settings, adapters = TrainingConfig(batch_size=8), new_adapters(128, 4)
        trained = trainer.train(adapters, lambda _: examples, settings, "last-epoch")
        return trained, trainer.evaluate(adapters, examples, max_new_tokens=2)


def tensors(arrays: Tensors) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def test_each_client_gets_its_own_gradient_whoever_else_is_served(served: Served) -> None:
    """Replies of one batch are made while the next one runs."""
    batches = [served.batch(samples, 40 + 8 * samples) for samples in (1, 2, 3, 4, 5, 6)]
    adapters = [new_adapters(128, 4, scale) for scale in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)]
    wanted = [
        gradients(DenseWire(served.reference), batch, own)
        for batch, own in zip(batches, adapters, strict=True)
    ]
    with ExitStack() as stack, ThreadPoolExecutor(len(batches)) as threads:
        forms = ["factored", "dense"] * 3
        wires = [served.wire(stack, form, f"c{n}") for n, form in enumerate(forms)]
        for _ in range(10):
            for found, expected in zip(
                threads.map(gradients, wires, batches, adapters), wanted, strict=True
            ):
                check(found, expected, _TOLERANCE[served.dtype])
