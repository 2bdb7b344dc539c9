"""The factored wire is exact, and nothing that the service loses is the client's problem."""

from __future__ import annotations

import copy
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fednano.client.adapters import NanoAdapters
from fednano.client.batches import Batch
from fednano.client.datasets import DigitsShard
from fednano.client.edge import EdgeHalf, NanoEdge
from fednano.client.examples import Example
from fednano.client.factored import FactoredLanguageModel, held
from fednano.client.fisher import FisherEstimate
from fednano.client.meter import Direction, Kind, Meter
from fednano.client.remote import RemoteLanguageModel
from fednano.client.trainer import Trainer
from fednano.client.wires import Crossed, DenseWire, FactoredWire, Wire
from fednano.models.activations import Activations
from fednano.models.frozen import FrozenLLM
from fednano.models.language_model import Sampling
from fednano.wire.run_config import DataConfig, TrainingConfig
from fednano.wire.tensor_pb2 import BF16, FP16, FP32, INT8, DType

from tests.client.serving import Served, caller, remote, served
from tests.tiny import large_tensors, no_adapters, picture


@pytest.fixture(scope="module")
def port(frozen: FrozenLLM) -> Iterator[int]:
    with served(frozen) as service:
        yield service.port


@pytest.fixture
def llm(port: int) -> Iterator[RemoteLanguageModel]:
    with remote(port) as model:
        yield model


@pytest.fixture
def batch(edge: EdgeHalf, examples: list[Example]) -> Batch:
    return Batch.of([edge.prepare(example) for example in examples])


@dataclass(frozen=True)
class Outcome:
    """What a step left behind."""

    crossed: Crossed
    gradients: dict[str, torch.Tensor]
    fisher: dict[str, np.ndarray]


def step(wire: Wire, adapters: NanoAdapters, batch: Batch) -> Outcome:
    """As the trainer does it, with an estimate of the Fisher."""
    own = copy.deepcopy(adapters)
    estimate = FisherEstimate(own)
    crossed = wire.step(NanoEdge(own), batch, estimate)
    crossed.backward()
    gradients = {n: p.grad for n, p in own.named_parameters() if p.grad is not None}
    return Outcome(crossed, gradients, estimate.mean())


def assert_close(found: Outcome, wanted: Outcome, off: float = 1e-5) -> None:
    """Relative to each tensor's norm."""
    torch.testing.assert_close(found.crossed.loss_sums, wanted.crossed.loss_sums, rtol=off, atol=0)
    assert found.crossed.token_counts.tolist() == wanted.crossed.token_counts.tolist()
    assert found.gradients.keys() == wanted.gradients.keys()
    for name, gradient in wanted.gradients.items():
        assert gradient.norm() > 0
        assert (found.gradients[name] - gradient).norm() <= off * gradient.norm(), name
    assert found.fisher.keys() == wanted.fisher.keys()
    for name, fisher in wanted.fisher.items():
        assert np.linalg.norm(found.fisher[name] - fisher) <= off * np.linalg.norm(fisher), name


def test_loss_gradients_and_fisher_are_those_of_the_dense_wire(
    llm: RemoteLanguageModel, adapters: NanoAdapters, batch: Batch
) -> None:
    """Several lengths, images between text, and a sample without images."""
    found = step(FactoredWire(FactoredLanguageModel(llm)), adapters, batch)
    assert_close(found, step(DenseWire(llm), adapters, batch))
    assert len(found.gradients) == 4


def test_a_loss_of_the_clients_own_gives_the_same(
    llm: RemoteLanguageModel, adapters: NanoAdapters, batch: Batch
) -> None:
    meter = llm.calls.meter
    wire = FactoredWire(FactoredLanguageModel(llm), loss="client")
    step(wire, adapters, batch)
    meter.take()
    found = step(wire, adapters, batch)
    costs = meter.take()
    assert_close(found, step(DenseWire(llm), adapters, batch))
    tokens, hidden = batch.base.shape
    assert costs.sent_bytes["embeddings"] == (tokens + 2 * hidden) * 4 * 4  # once: U and two W
    assert costs.received_bytes["gradients"] == (tokens + 4 * hidden) * 4 * 4


def test_an_activation_that_is_gone_is_computed_again_from_the_bases(
    halves: Path, adapters: NanoAdapters, batch: Batch
) -> None:
    forgetful = Activations("here", tokens=1 << 16, seconds=0)
    engine = FrozenLLM.load(halves / "llm", "cpu", "fp32", activations=forgetful)
    with served(engine) as service, remote(service.port) as llm:
        found = step(FactoredWire(FactoredLanguageModel(llm), loss="client"), adapters, batch)
        assert_close(found, step(DenseWire(llm), adapters, batch))


def test_portions_of_a_loss_of_the_clients_own_are_added_up(
    frozen: FrozenLLM, adapters: NanoAdapters, batch: Batch
) -> None:
    service = Served(frozen, samples_per_request=2)
    with remote(service.port) as llm:
        assert llm.card.limits.samples_per_request == 2 < len(batch)
        found = step(FactoredWire(FactoredLanguageModel(llm), loss="client"), adapters, batch)
        assert_close(found, step(DenseWire(llm), adapters, batch))
    service.stop()


def test_ranks_that_differ_are_filled_up(llm: RemoteLanguageModel, batch: Batch) -> None:
    tensors = large_tensors(rank=4)
    wider = large_tensors(rank=7, seed=1)
    tensors |= {name: wider[name] for name in ("image.down", "image.up")}
    adapters = NanoAdapters.from_tensors(tensors, scale=0.7)
    found = step(FactoredWire(FactoredLanguageModel(llm)), adapters, batch)
    assert_close(found, step(DenseWire(llm), adapters, batch))


def test_a_modality_without_adapter_stays_as_it_is(llm: RemoteLanguageModel, batch: Batch) -> None:
    images = {n: t for n, t in large_tensors().items() if n.startswith("image")}
    adapters = NanoAdapters.from_tensors(images, scale=0.7)
    found = step(FactoredWire(FactoredLanguageModel(llm)), adapters, batch)
    assert_close(found, step(DenseWire(llm), adapters, batch))
    assert len(found.gradients) == 2


def test_at_b_zero_only_b_has_a_gradient(llm: RemoteLanguageModel, batch: Batch) -> None:
    found = step(FactoredWire(FactoredLanguageModel(llm)), no_adapters(), batch)
    by_name = {name.removeprefix("by_name."): g for name, g in found.gradients.items()}
    assert not by_name["image.down"].any()
    assert by_name["image.up"].any()
    assert not found.fisher["fisher.text.down"].any()
    assert found.fisher["fisher.text.up"].any()


def test_a_frozen_down_gets_no_gradient(
    llm: RemoteLanguageModel, batch: Batch, adapters: NanoAdapters
) -> None:
    frozen = copy.deepcopy(adapters)
    frozen.freeze_down()
    found = step(FactoredWire(FactoredLanguageModel(llm)), frozen, batch)
    assert_close(found, step(DenseWire(llm), frozen, batch))
    assert found.gradients.keys() == {"by_name.image.up", "by_name.text.up"}


def test_scores_and_answers_are_those_of_the_dense_wire(
    llm: RemoteLanguageModel, edge: EdgeHalf, adapters: NanoAdapters, examples: list[Example]
) -> None:
    dense, factored = Trainer(edge, llm), Trainer(edge, llm, FactoredLanguageModel(llm))
    found, wanted = (t.evaluate(adapters, examples) for t in (factored, dense))
    assert found.loss == pytest.approx(wanted.loss, rel=1e-5)
    assert found.accuracy == wanted.accuracy
    sampling = Sampling(max_new_tokens=12)
    answers = dense.answers(adapters, examples, sampling)
    assert factored.answers(adapters, examples, sampling) == answers
    assert any(len(answer.split()) > 2 for answer in answers)


@pytest.mark.parametrize(("dtype", "off"), [(FP16, 1e-2), (BF16, 1e-1), (INT8, 2e-1)])
def test_narrow_wires_are_close(
    port: int, adapters: NanoAdapters, batch: Batch, dtype: DType, off: float
) -> None:
    with remote(port) as llm:
        wanted = step(DenseWire(llm), adapters, batch)
    with remote(port, wire_dtype=dtype) as llm:
        found = step(FactoredWire(FactoredLanguageModel(llm)), adapters, batch)
    for name, gradient in wanted.gradients.items():
        assert 0 < (found.gradients[name] - gradient).norm() < off * gradient.norm(), name
    for name, fisher in wanted.fisher.items():  # squares: off by twice as much
        assert 0 < np.linalg.norm(found.fisher[name] - fisher) < 2 * off * np.linalg.norm(fisher)


def test_in_company_the_service_keeps_no_graph_and_the_gradient_is_the_same(
    frozen: FrozenLLM, adapters: NanoAdapters, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss of the client's own, and another client's: forward is computed again."""
    again, original = [], FrozenLLM.backward_again

    def watched(*arguments: Any) -> torch.Tensor:
        again.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(FrozenLLM, "backward_again", watched)
    monkeypatch.setattr("fednano.llm.passes._RECENT_SECONDS", 60.0)
    service = Served(frozen, join_backward_tokens=1000)
    with remote(service.port) as llm:
        other = RemoteLanguageModel(llm.calls.replicas, caller("c2"), Meter(), FP32)
        step(FactoredWire(FactoredLanguageModel(other), loss="client"), adapters, batch)
        assert not again
        found = step(FactoredWire(FactoredLanguageModel(llm), loss="client"), adapters, batch)
        assert_close(found, step(DenseWire(llm), adapters, batch))
    service.stop()
    assert len(again) == 1


def test_bases_are_uploaded_however_few_of_them_an_error_names(
    port: int, adapters: NanoAdapters, edge: EdgeHalf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between images that are missing lie texts that are not: an answer names one image or two."""
    monkeypatch.setattr("fednano.llm.bases._MOST_NAMED", 3)
    batches = [
        Batch.of([edge.prepare(Example("", (picture(n),), "What?", "two")) for n in numbers])
        for numbers in ([0], range(1, 8))
    ]
    meter = Meter()
    with remote(port, meter=meter) as llm:
        wire = FactoredWire(FactoredLanguageModel(llm))
        wire.llm.forget()
        first = step(wire, adapters, batches[0])
        assert_close(first, step(DenseWire(llm), adapters, batches[0]))
        meter.take()
        found = step(wire, adapters, batches[1])
        images = 7 * 16 * 128 * 4
        assert meter.take().sent_bytes["bases"] == images
        assert_close(found, step(DenseWire(llm), adapters, batches[1]))


def distinct(batch: Batch) -> dict[bytes, int]:
    """Bytes of each piece of x in fp32; a text that samples share is one."""
    pieces = batch.base.split(batch.pieces)
    return {piece.numpy().tobytes(): piece.numel() * 4 for piece in pieces}


def base_bytes(batch: Batch) -> int:
    return sum(distinct(batch).values())


def test_a_base_travels_once(port: int, adapters: NanoAdapters, batch: Batch) -> None:
    meter, small = Meter(), NanoAdapters.from_tensors(large_tensors(seed=3), 0.7)
    with remote(port, meter=meter) as llm:
        wire = FactoredWire(FactoredLanguageModel(llm))
        wire.llm.forget()
        meter.take()
        step(wire, adapters, batch)
        first = meter.take()
        step(wire, small, batch)
        later = meter.take()
    tokens, hidden = batch.base.shape
    assert first.sent_bytes["bases"] == base_bytes(batch) < tokens * hidden * 4
    assert "bases" not in later.sent_bytes
    assert later.sent_bytes["embeddings"] == (tokens + 2 * hidden) * 4 * 4  # U and two W of rank 4
    assert later.received_bytes["gradients"] == (tokens + 4 * hidden) * 4 * 4  # and two Fishers


def test_an_image_that_is_asked_about_again_travels_once(
    port: int, adapters: NanoAdapters, edge: EdgeHalf
) -> None:
    """Nor does a text that was sent with another image."""
    seen, questions = (picture(0), picture(1)), ("What digit is this?", "Is this even?")
    asked = [Example("", (image,), question, "two") for image in seen for question in questions]
    first, *later = [Batch.of([edge.prepare(example)]) for example in asked]
    meter = Meter()
    with remote(port, meter=meter) as llm:
        wire = FactoredWire(FactoredLanguageModel(llm))
        wire.llm.forget()
        meter.take()
        found = [(step(wire, adapters, batch), meter.take()) for batch in (first, *later)]
        for batch, (outcome, _) in zip((first, *later), found, strict=True):
            assert_close(outcome, step(DenseWire(llm), adapters, batch))
    sent = [int(costs.sent_bytes.get("bases", 0)) for _, costs in found]
    image, width = later[1].pieces[1], first.base.shape[1] * 4
    assert sent[0] == base_bytes(first)
    assert 0 < sent[1] == later[0].pieces[2] * width  # another question and its answer
    assert sent[2] == image * width
    assert sent[3] == 0


@pytest.mark.parametrize(("dtype", "size"), [(FP32, 4), (FP16, 2), (INT8, 2)])
def test_fisher_parts_travel_in_half_of_float32_where_gradients_are_narrow(
    port: int, adapters: NanoAdapters, batch: Batch, dtype: DType, size: int
) -> None:
    meter = Meter()
    with remote(port, meter=meter, wire_dtype=dtype) as llm:
        wire, received = FactoredWire(FactoredLanguageModel(llm)), []
        for estimate in (None, None, FisherEstimate(adapters)):
            wire.step(NanoEdge(adapters), batch, estimate)
            received.append(meter.take().received_bytes["gradients"])
    assert received[2] - received[1] == 2 * 4 * batch.base.shape[1] * size  # of rank 4


@pytest.mark.parametrize("dtype", [FP32, BF16, INT8])
def test_what_is_made_ready_ahead_is_what_a_step_makes(
    port: int, adapters: NanoAdapters, edge: EdgeHalf, examples: list[Example], dtype: DType
) -> None:
    """The same bytes under the same names, so that they travel once."""
    prepared, meter = [edge.prepare(example) for example in examples], Meter()
    with remote(port, meter=meter, wire_dtype=dtype) as llm:
        wire = FactoredWire(FactoredLanguageModel(llm))
        wire.llm.forget()
        found = step(wire, adapters, wire.ready(prepared))
        assert meter.take().sent_bytes["bases"] > 0
        wanted = step(wire, adapters, Batch.of(prepared))
        assert "bases" not in meter.take().sent_bytes
    for name, gradient in wanted.gradients.items():
        assert torch.equal(found.gradients[name], gradient), name


def test_what_is_held_is_hashed_while_the_step_before_is_in_flight(
    llm: RemoteLanguageModel, edge: EdgeHalf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the thread that prepares batches; no step has to wait for it."""
    threads = []

    def watched(samples: Any, *arguments: Any) -> Any:
        threads.extend(threading.current_thread().name for _ in samples)
        return held(samples, *arguments)

    monkeypatch.setattr("fednano.client.factored.held", watched)
    shard = DigitsShard.deal(DataConfig(limit=40), seed=0, shard=0, of=4)
    Trainer(edge, llm, FactoredLanguageModel(llm)).train(
        no_adapters(), lambda epoch: shard.epoch(0, 1, epoch, "c"), TrainingConfig(epochs=1)
    )
    assert len(threads) == sum(
        len(edge.prepare(example).segments) for example in shard.epoch(0, 1, 0, "c")
    )
    assert all(name.startswith("ahead") for name in threads)


def test_a_service_that_lost_everything_gets_it_again(
    frozen: FrozenLLM, adapters: NanoAdapters, batch: Batch
) -> None:
    service = Served(frozen)
    with remote(service.port) as llm:
        wire = FactoredWire(FactoredLanguageModel(llm))
        before = step(wire, adapters, batch)
        service.stop()
        again = Served(frozen, service.port)
        after = step(wire, adapters, batch)
        again.stop()
    assert_close(after, before)


def test_every_replica_is_given_what_it_lacks(
    frozen: FrozenLLM,
    halves: Path,
    adapters: NanoAdapters,
    batch: Batch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = Served(frozen)
    second = Served(FrozenLLM.load(halves / "llm", "cpu", "fp32"), first.port, host="127.0.0.2")
    found = [("127.0.0.1", first.port), ("127.0.0.2", first.port)]
    monkeypatch.setattr(
        "fednano.client.replicas.socket.getaddrinfo",
        lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", a) for a in found],
    )
    meter = Meter()
    with remote(first.port, meter=meter) as llm:
        wire = FactoredWire(FactoredLanguageModel(llm))
        outcomes = [step(wire, adapters, batch) for _ in range(4)]
        assert meter.take().sent_bytes["bases"] == 2 * base_bytes(batch)
        for outcome in outcomes[1:]:
            assert_close(outcome, outcomes[0])
        wire.llm.forget()
        step(wire, adapters, batch)
        assert meter.take().sent_bytes["bases"] == base_bytes(batch)
    first.stop()
    second.stop()


def test_without_room_the_dense_wire_is_used(
    frozen: FrozenLLM,
    edge: EdgeHalf,
    adapters: NanoAdapters,
    examples: list[Example],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A batch whose bases alone are more than the service may hold."""
    many = [replace(e, question=f"{e.question} {'red ' * n}") for n in range(40) for e in examples]
    batch = Batch.of([edge.prepare(example) for example in many])
    assert batch.base.numel() * 4 > 1 << 20
    service, meter = Served(frozen, base_mebibytes=1), Meter()
    with remote(service.port, meter=meter) as llm:
        wire = FactoredWire(FactoredLanguageModel(llm))
        found = step(wire, adapters, batch)
        meter.take()
        assert_close(found, step(DenseWire(llm), adapters, batch))
        step(wire, adapters, batch)
        assert "bases" not in meter.take().sent_bytes
    service.stop()
    assert "the dense wire is used instead" in caplog.messages


def test_training_ends_with_the_same_adapters(
    port: int, edge: EdgeHalf, llm: RemoteLanguageModel
) -> None:
    shard = DigitsShard.deal(DataConfig(limit=40), seed=0, shard=0, of=4)

    def trained(trainer: Trainer) -> dict[str, np.ndarray]:
        result = trainer.train(
            no_adapters(),
            lambda epoch: shard.epoch(0, 1, epoch, "c"),
            TrainingConfig(epochs=2, learning_rate=1e-3),
            "last-epoch",
        )
        return {**result.adapter, **result.fisher}

    found = trained(Trainer(edge, llm, FactoredLanguageModel(llm)))
    wanted = trained(Trainer(edge, llm))
    for name, tensor in wanted.items():
        assert np.abs(found[name] - tensor).max() < 1e-3 * np.abs(tensor).max(), name


def test_another_client_uploads_its_own(
    port: int, adapters: NanoAdapters, batch: Batch, llm: RemoteLanguageModel
) -> None:
    """What one has uploaded spares another nothing, though the content is the same."""
    step(FactoredWire(FactoredLanguageModel(llm)), adapters, batch)
    meter = Meter()
    other = RemoteLanguageModel(llm.calls.replicas, caller("c2"), meter, FP32)
    step(FactoredWire(FactoredLanguageModel(other)), adapters, batch)
    assert meter.take().sent_bytes["bases"] == base_bytes(batch)


class Cutting(Meter):
    """Cuts the call off at the second base that is sent, once, when the first has arrived."""

    sent = 0

    def __init__(self, held: Callable[[], float | None]) -> None:
        super().__init__()
        self._held = held

    def add(self, direction: Direction, kind: Kind, size: int) -> None:
        if (direction, kind) == ("sent", "bases"):
            self.sent += 1
            if self.sent == 2:
                while self._held() != 1:
                    time.sleep(0.01)
                raise ConnectionError("cut")
        super().add(direction, kind, size)


def test_an_upload_that_broke_off_goes_on_where_it_did(
    frozen: FrozenLLM, adapters: NanoAdapters, batch: Batch
) -> None:
    service = Served(frozen)
    registry = service.server.metrics.registry
    meter = Cutting(lambda: registry.get_sample_value("fednano_llm_bases"))
    with remote(service.port, meter=meter) as llm:
        found = step(FactoredWire(FactoredLanguageModel(llm)), adapters, batch)
        assert_close(found, step(DenseWire(llm), adapters, batch))
    service.stop()
    assert meter.sent == len(distinct(batch)) + 1
    assert meter.take().sent_bytes["bases"] == base_bytes(batch)
