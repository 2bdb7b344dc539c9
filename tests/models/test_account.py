"""`fednano account` against the paper, the split, PEFT on real weights, and a real wire."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from fednano.cli import app
from fednano.client.adapters import NanoAdapters
from fednano.client.edge import EdgeHalf
from fednano.client.examples import Example
from fednano.client.factored import FactoredLanguageModel
from fednano.client.meter import Meter
from fednano.client.remote import RemoteLanguageModel
from fednano.client.replicas import Replicas
from fednano.client.trainer import FisherMode, Trainer, TrainResult
from fednano.models.account import Account, MetaModel, account
from fednano.models.account_options import Adapted, Fisher, LoraTargets, Plan, WireDType
from fednano.models.account_traffic import Traffic
from fednano.models.checkpoint import read_record
from fednano.models.frozen import FrozenLLM
from fednano.wire.coordinator_pb2 import Costs
from fednano.wire.errors import InvalidRequest
from fednano.wire.headers import make_header
from fednano.wire.run_config import TrainingConfig
from fednano.wire.tensor_pb2 import FP16
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tests.client.serving import caller, served
from tests.tiny import TINY, large_tensors, picture

PLAN = Plan(
    rank=64,
    modalities=(Adapted.IMAGE, Adapted.TEXT),
    fisher=Fisher.LAST_EPOCH,
    batch_size=16,
    prompt_tokens=100,
    image_tokens=None,
    answer_tokens=24,
    samples=1000,
    epochs=1,
    wire_dtype=WireDType.FP16,
    lora_rank=64,
    lora_targets=LoraTargets.QUERY_VALUE,
)
SMALL = replace(PLAN, rank=4, samples=20, epochs=2)


@pytest.fixture(scope="module")
def llava_7b() -> Account:
    return account(MetaModel("llava-1.5-7b"), PLAN)


@pytest.fixture(scope="module")
def tiny() -> MetaModel:
    return MetaModel("tiny-llava")


@pytest.fixture(scope="module")
def llm(frozen: FrozenLLM) -> Iterator[RemoteLanguageModel]:
    """As a member of a run sees the service."""
    member = replace(
        caller("client"),
        header=lambda: make_header(
            "client", run="run", session="0" * 32, round_number=1, attempt=1
        ),
    )
    with served(frozen) as service:
        replicas = Replicas(f"127.0.0.1:{service.port}")
        yield RemoteLanguageModel(replicas, member, Meter(), FP16)
        replicas.close()


def test_the_papers_figures_come_out(llava_7b: Account) -> None:
    """FedNano, arXiv 2506.14824: 304.55 M parameters on the client, 1.05 M uploaded."""
    paper = llava_7b.paper
    assert paper.encoder_parameters == 303_505_408
    assert paper.upload_parameters == 1_048_576
    assert paper.client_parameters == 304_553_984
    assert f"{paper.client_share:.1%} {paper.upload_share:.2%}" == "4.3% 0.01%"


def test_what_the_paper_leaves_out_comes_out_too(llava_7b: Account) -> None:
    sizes = llava_7b.sizes
    assert sizes.edge_parts["multi_modal_projector"].parameters == 20_979_712
    assert sizes.edge.parameters + sizes.llm.parameters == sizes.whole.parameters == 7_063_427_072
    assert sizes.embedding_table.parameters == 32_064 * 4096
    assert sizes.tokens_per_image == 576
    vectors = 16 * 700 * 4096 * 2
    assert llava_7b.dense.step.sent["embeddings"] == vectors
    assert llava_7b.dense.step.received["gradients"] == vectors
    assert llava_7b.lora.trained.parameters == 32 * 2 * 64 * (4096 + 4096)


def test_the_larger_llava_is_built_in() -> None:
    sizes = MetaModel("llava-1.5-13b").sizes()
    assert (
        sizes.llm.parameters
        == 2 * 32_064 * 5120 + 40 * (4 * 5120**2 + 3 * 5120 * 13_824 + 2 * 5120) + 5120
    )
    assert sizes.edge_parts["vision_tower"].parameters == 303_507_456


def test_the_halves_are_those_of_the_split(halves: Path, tiny: MetaModel) -> None:
    sizes = tiny.sizes()
    assert sizes.edge.parameters == read_record(halves / "edge", "edge").parameters
    assert sizes.llm.parameters == read_record(halves / "llm", "llm").parameters
    assert sizes == replace(MetaModel(str(TINY)).sizes(), name="tiny-llava")


@pytest.mark.parametrize("targets", LoraTargets)
def test_lora_is_what_peft_puts_on_the_loaded_llm(
    halves: Path, tiny: MetaModel, targets: LoraTargets
) -> None:
    """Twice, as the model on the meta device is to be left as it was."""
    plan = replace(PLAN, lora_rank=3, lora_targets=targets)
    found, again = account(tiny, plan), account(tiny, plan)
    layers = ["q_proj", "v_proj"] if targets is LoraTargets.QUERY_VALUE else "all-linear"
    loaded = AutoModelForCausalLM.from_pretrained(halves / "llm")
    trained, _ = get_peft_model(
        loaded, LoraConfig(r=3, target_modules=layers)
    ).get_nb_trainable_parameters()
    assert found.lora.trained.parameters == trained
    assert found.lora.traffic.sent["adapters"] == 2 * 4 * trained  # and its Fisher
    assert again == found


@dataclass(frozen=True)
class Round:
    """Two real local epochs of 20 samples that are equally long, in batches of 16."""

    result: TrainResult
    costs: Costs
    plan: Plan


def trained(trainer: Trainer, meter: Meter, fisher: FisherMode) -> Round:
    examples = [Example("", (picture(i),), "What digit is this?", "seven") for i in range(20)]
    lengths = {len(trainer.edge.prepare(example).labels) for example in examples}
    assert len(lengths) == 1
    meter.take()
    adapters = NanoAdapters.from_tensors(large_tensors(), scale=0.7)
    settings = TrainingConfig(epochs=2, batch_size=16, learning_rate=1e-4)
    result = trainer.train(adapters, lambda _: examples, settings, fisher)
    plan = replace(SMALL, fisher=Fisher(fisher), prompt_tokens=lengths.pop() - 18, answer_tokens=2)
    return Round(result, meter.take(), plan)


def messages(counted: Mapping[str, int]) -> dict[str, int]:
    """Without what HTTP/2 puts around them."""
    return {kind: size for kind, size in counted.items() if kind != "framing"}


def assert_same(costs: Costs, wanted: Traffic) -> None:
    """Payloads to the byte, all messages together within 1 %."""
    for counted, expected in (
        (costs.sent_bytes, wanted.sent),
        (costs.received_bytes, wanted.received),
    ):
        found = messages(counted)
        payload = {kind: size for kind, size in expected.items() if kind != "control" and size}
        assert {kind: size for kind, size in found.items() if kind != "control"} == payload
        assert sum(found.values()) == pytest.approx(sum(expected.values()), rel=0.01)


@pytest.mark.parametrize("fisher", ["last-epoch", "extra-pass"])
def test_a_round_on_the_dense_wire_is_as_accounted(
    edge: EdgeHalf, llm: RemoteLanguageModel, tiny: MetaModel, fisher: FisherMode
) -> None:
    done = trained(Trainer(edge, llm), llm.calls.meter, fisher)
    found = account(tiny, done.plan)
    assert_same(done.costs, found.dense.round + found.adapters.traffic * -1)
    uploaded = sum(t.nbytes for t in (*done.result.adapter.values(), *done.result.fisher.values()))
    assert found.adapters.traffic.sent["adapters"] == uploaded


@pytest.mark.parametrize("fisher", ["none", "last-epoch"])
def test_a_round_on_the_factored_wire_is_as_accounted(
    edge: EdgeHalf, llm: RemoteLanguageModel, tiny: MetaModel, fisher: FisherMode
) -> None:
    """How much of a request is under way when the service says what it lacks is a matter of luck, and
    these samples share a text, so that the first round costs at most what is accounted for it; the
    second one is exact."""
    factored = FactoredLanguageModel(llm)
    factored.forget()
    trainer = Trainer(edge, llm, factored)
    first, second = (trained(trainer, llm.calls.meter, fisher) for _ in range(2))
    found = account(tiny, second.plan).factored
    steps = found.round + account(tiny, second.plan).adapters.traffic * -1
    assert_same(second.costs, steps)
    bases, row, image = first.costs.sent_bytes["bases"], 128 * 2, 16
    texts = second.plan.prompt_tokens + 18 - image
    assert found.once.sent["bases"] == 20 * (image + texts) * row
    assert bases == (20 * image + texts) * row
    sent = sum(messages(first.costs.sent_bytes).values())
    assert steps.bytes_sent + bases < sent <= 1.01 * (steps + found.once).bytes_sent


def test_one_modality_has_half_the_adapters(tiny: MetaModel) -> None:
    both, image = (account(tiny, p) for p in (SMALL, replace(SMALL, modalities=(Adapted.IMAGE,))))
    assert 2 * image.adapters.trained.parameters == both.adapters.trained.parameters
    assert image.dense.step.total == both.dense.step.total
    right = 4 * 128 * 2
    assert both.factored.step.sent["embeddings"] - image.factored.step.sent["embeddings"] == right


def test_a_hub_id_is_read_from_the_local_cache(
    tmp_path: Path, tiny: MetaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "models--someone--tiny"
    (cached / "snapshots" / "r1").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("r1")
    (cached / "snapshots" / "r1" / "config.json").write_bytes((TINY / "config.json").read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert MetaModel("someone/tiny").sizes().whole == tiny.sizes().whole
    with pytest.raises(InvalidRequest, match=r"'someone/else' .* a built-in name \(tiny-llava, "):
        MetaModel("someone/else")


def test_a_model_of_no_known_family_is_said_so(halves: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="model_type: expected one of llava, got llama"):
        MetaModel(str(halves / "llm"))
    with pytest.raises(InvalidRequest, match="has no configuration to be read"):
        MetaModel(str(tmp_path))


def test_the_command_prints_tables_or_json() -> None:
    asked = ["account", "tiny-llava", "--fisher", "none", "--modality", "text"]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 0
    assert "edge half" in shown.stdout
    assert "721,920" in shown.stdout
    found = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert found["adapters"]["trained"]["parameters"] == 2 * 64 * 128
    assert found["plan"]["image_tokens"] == found["sizes"]["tokens_per_image"] == 16
