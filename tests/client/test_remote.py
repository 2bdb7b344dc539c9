"""The LLM behind gRPC gives what the same LLM gives in this process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch
from fednano.client.adapters import NanoAdapters
from fednano.client.batches import Batch
from fednano.client.edge import EdgeHalf, NanoEdge
from fednano.client.examples import Example
from fednano.client.losses import client_side_step, predicting_positions
from fednano.client.meter import Meter
from fednano.client.remote import RemoteLanguageModel
from fednano.client.replicas import Replicas
from fednano.client.trainer import Trainer
from fednano.models.frozen import FrozenLLM
from fednano.models.language_model import Modality, Sampling
from fednano.wire.channels import ClientTls
from fednano.wire.errors import BadTensor, InvalidRequest, Unavailable
from fednano.wire.llm_pb2 import DescribeReply
from fednano.wire.llm_pb2_grpc import LanguageModelServicer, add_LanguageModelServicer_to_server
from fednano.wire.tensor_pb2 import BF16, FP16, INT8, DType

from tests.certificates import make_certificate
from tests.client.serving import Served, caller, remote, served

WEIGHTS = torch.tensor([0.5, 0.3, 0.2])


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


@pytest.fixture
def hidden(batch: Batch, adapters: NanoAdapters) -> torch.Tensor:
    return NanoEdge(adapters)(batch).detach()


@pytest.mark.parametrize("body_bytes", [1 << 20, 0])
def test_a_step_is_the_same(
    llm: RemoteLanguageModel,
    frozen: FrozenLLM,
    batch: Batch,
    hidden: torch.Tensor,
    body_bytes: int,
) -> None:
    """In one message each way, and in chunks where the service, or the step's size, wants that."""
    assert llm.card.limits.body_bytes == 1 << 20
    llm.card.limits.body_bytes = body_bytes
    arguments = batch.sequences(hidden), batch.labels, WEIGHTS
    found, wanted = llm.step(*arguments), frozen.step(*arguments)
    assert torch.equal(found.gradient, wanted.gradient)
    assert torch.equal(found.loss_sums, wanted.loss_sums)
    assert found.token_counts.tolist() == wanted.token_counts.tolist()


def test_a_score_is_the_same(
    llm: RemoteLanguageModel, frozen: FrozenLLM, batch: Batch, hidden: torch.Tensor
) -> None:
    found = llm.score(batch.sequences(hidden), batch.labels)
    wanted = frozen.score(batch.sequences(hidden), batch.labels)
    assert torch.equal(found.loss_sums, wanted.loss_sums)
    assert torch.equal(found.correct_counts, wanted.correct_counts)


def test_client_side_loss_is_the_same(
    llm: RemoteLanguageModel, frozen: FrozenLLM, batch: Batch, hidden: torch.Tensor
) -> None:
    arguments = batch.sequences(hidden), batch.labels, WEIGHTS
    found, wanted = client_side_step(llm, *arguments), frozen.step(*arguments)
    torch.testing.assert_close(found.gradient, wanted.gradient, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.loss_sums, wanted.loss_sums, rtol=1e-5, atol=1e-6)


def test_a_lost_activation_is_computed_again(
    llm: RemoteLanguageModel, frozen: FrozenLLM, batch: Batch, hidden: torch.Tensor
) -> None:
    sequences, positions = (
        batch.sequences(hidden),
        predicting_positions(batch.lengths, batch.labels),
    )
    first = llm.forward(sequences, positions)
    gradient = torch.randn(first.logits.shape)
    kept = llm.backward(first.activation, gradient, sequences, positions)
    again = llm.backward(first.activation, gradient, sequences, positions)
    gone = llm.backward("elsewhere/7", gradient, sequences, positions)
    assert torch.equal(kept, again)
    assert torch.equal(kept, gone)


def test_generation_is_the_same(
    port: int, trainer: Trainer, adapters: NanoAdapters, examples: list[Example]
) -> None:
    sampling = Sampling(max_new_tokens=12)
    with remote(port) as llm:
        found = replace(trainer, llm=llm).answers(adapters, examples, sampling)
    assert found == trainer.answers(adapters, examples, sampling)
    assert any(len(answer.split()) > 2 for answer in found)


def test_embedding_rows_are_the_same(llm: RemoteLanguageModel, frozen: FrozenLLM) -> None:
    ids = torch.tensor([5, 9, 5])
    assert torch.equal(llm.embed(ids), frozen.embed(ids))


@pytest.mark.parametrize(("dtype", "off"), [(FP16, 1e-3), (BF16, 2e-2), (INT8, 5e-2)])
def test_narrow_wires_are_close(
    port: int,
    frozen: FrozenLLM,
    batch: Batch,
    hidden: torch.Tensor,
    dtype: DType,
    off: float,
) -> None:
    wanted = frozen.step(batch.sequences(hidden), batch.labels, WEIGHTS).gradient
    with remote(port, wire_dtype=dtype) as llm:
        found = llm.step(batch.sequences(hidden), batch.labels, WEIGHTS).gradient
    assert 0 < (found - wanted).norm() / wanted.norm() < off


def test_what_is_wrong_comes_back_by_name(
    llm: RemoteLanguageModel, batch: Batch, hidden: torch.Tensor
) -> None:
    broken = hidden.clone()
    broken[3, 3] = float("nan")
    with pytest.raises(InvalidRequest, match="finite"):
        llm.step(batch.sequences(broken), batch.labels, WEIGHTS)
    with pytest.raises((BadTensor, InvalidRequest), match=r"expected .*128"):
        llm.step(batch.sequences(hidden[:, :64].contiguous()), batch.labels, WEIGHTS)


def test_bytes_are_counted_by_kind(port: int, batch: Batch, hidden: torch.Tensor) -> None:
    meter = Meter()
    with remote(port, meter=meter) as llm:
        meter.take()
        llm.step(batch.sequences(hidden), batch.labels, WEIGHTS)
    costs = meter.take()
    assert costs.sent_bytes["embeddings"] == hidden.numel() * 4
    assert costs.received_bytes["gradients"] == hidden.numel() * 4
    assert costs.sent_bytes["control"] > 0
    assert costs.server_seconds > 0


def test_the_device_s_time_is_told_of_either_half_of_a_step(
    port: int, batch: Batch, hidden: torch.Tensor
) -> None:
    meter, sequences = Meter(), batch.sequences(hidden)
    positions = torch.arange(3)
    with remote(port, meter=meter) as llm:
        meter.take()
        found = llm.forward(sequences, positions)
        assert meter.take().server_seconds > 0
        llm.backward(found.activation, torch.ones_like(found.logits), sequences, positions)
        assert meter.take().server_seconds > 0


def test_a_restarted_service_fails_no_client(
    frozen: FrozenLLM, batch: Batch, hidden: torch.Tensor
) -> None:
    service = Served(frozen)
    arguments = batch.sequences(hidden), batch.labels, WEIGHTS
    with remote(service.port) as llm:
        before = llm.step(*arguments)
        service.stop()
        again: list[Served] = []
        thread = threading.Thread(
            target=lambda: (time.sleep(1), again.append(Served(frozen, service.port)))
        )
        thread.start()
        after = llm.step(*arguments)
        thread.join()
    again[0].stop()
    assert torch.equal(before.gradient, after.gradient)


def test_an_answer_survives_the_loss_of_its_replica(
    frozen: FrozenLLM, batch: Batch, hidden: torch.Tensor
) -> None:
    sequences, sampling = batch.sequences(hidden), Sampling(200, stop_ids=(0,))
    service = Served(frozen)
    with remote(service.port) as llm:
        wanted = list(llm.generate(sequences, sampling))
        writing = llm.generate(sequences, sampling)
        found = [next(writing)]
        service.stop()
        again = Served(frozen, service.port)
        found += writing
    again.stop()
    assert len(wanted) > 20
    assert found == wanted


class Silent(LanguageModelServicer):
    """Ends every answer before it has begun, as a proxy may that lost its upstream."""

    def __init__(self, card: DescribeReply) -> None:
        self._card = card

    def Describe(self, request: object, context: object) -> DescribeReply:  # noqa: N802
        return self._card

    def Generate(self, requests: Iterator[object], context: object) -> Iterator[object]:  # noqa: N802
        for _ in requests:
            pass
        yield from ()


def test_an_answer_that_never_begins_is_a_failure_of_the_service(
    llm: RemoteLanguageModel, batch: Batch, hidden: torch.Tensor
) -> None:
    server = grpc.server(ThreadPoolExecutor(2))
    add_LanguageModelServicer_to_server(Silent(llm.card), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with (
        remote(port, retry_seconds=0.0) as silent,
        pytest.raises(Unavailable, match="Generate ended without a reply"),
    ):
        list(silent.generate(batch.sequences(hidden), Sampling(4)))
    server.stop(None).wait()


def test_patience_has_an_end(frozen: FrozenLLM, batch: Batch, hidden: torch.Tensor) -> None:
    service = Served(frozen)
    with remote(service.port, retry_seconds=0.5) as llm:
        service.stop()
        with pytest.raises(Unavailable):
            llm.step(batch.sequences(hidden), batch.labels, WEIGHTS)


def test_a_busy_service_is_asked_again(
    frozen: FrozenLLM, batch: Batch, hidden: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    service = Served(frozen, queue=1)
    arguments = batch.sequences(hidden), batch.labels, WEIGHTS
    wanted = frozen.step(*arguments).gradient

    def ask(_: int) -> bool:
        with remote(service.port) as llm:
            return all(torch.equal(llm.step(*arguments).gradient, wanted) for _ in range(3))

    with ThreadPoolExecutor(8) as people:
        assert all(people.map(ask, range(8)))
    service.stop()
    assert any("queue" in getattr(record, "reason", "") for record in caplog.records)


def two_addresses(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
    """A headless service with two replicas, as DNS would tell."""
    found = [("127.0.0.1", port), ("127.0.0.2", port)]
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in found]


def test_replicas_take_turns_and_backward_goes_home(
    halves: Path,
    frozen: FrozenLLM,
    batch: Batch,
    hidden: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = FrozenLLM.load(halves / "llm", device="cpu", dtype="fp32")
    first = Served(frozen)
    second = Served(other, first.port, host="127.0.0.2")
    monkeypatch.setattr("fednano.client.replicas.socket.getaddrinfo", two_addresses)
    sequences = batch.sequences(hidden)
    positions = predicting_positions(batch.lengths, batch.labels)
    with remote(first.port) as llm:
        replies = [llm.forward(sequences, positions) for _ in range(4)]
        kept = {"127.0.0.1": frozen.activations, "127.0.0.2": other.activations}
        assert [len(store) for store in kept.values()] == [2, 2]
        for reply in replies:
            llm.backward(reply.activation, torch.ones(reply.logits.shape), sequences, positions)
        assert [len(store) for store in kept.values()] == [0, 0]
        second.stop()
        for _ in range(3):
            llm.step(sequences, batch.labels, WEIGHTS)
    first.stop()


def test_tls_is_checked_by_the_given_ca(frozen: FrozenLLM, tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    service = Served(frozen, tls_certificate=certificate, tls_key=key)
    replicas = Replicas(f"127.0.0.1:{service.port}", ClientTls(certificate))
    assert RemoteLanguageModel(replicas, caller()).fingerprint == frozen.fingerprint
    replicas.close()
    stranger, _ = make_certificate(tmp_path / "other")
    replicas = Replicas(f"127.0.0.1:{service.port}", ClientTls(stranger))
    with pytest.raises(Unavailable):
        RemoteLanguageModel(replicas, caller(), retry_seconds=0.5)
    replicas.close()
    service.stop()


def test_the_text_adapter_has_work_to_do(adapters: NanoAdapters) -> None:
    text = adapters.of(Modality.TEXT)
    assert text is not None
    assert text.low_rank()(torch.ones(1, 128)).sub(1).abs().max() > 0.1
