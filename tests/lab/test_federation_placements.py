"""Connector tuning and LoRA inside the LLM through the real services, and what a person does with
them afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
from fednano.client.digits import load_split
from fednano.lab.experiment.cell import Bench, Solo
from fednano.lab.experiment.plan import Attack, Cell, Method
from fednano.lab.experiment.results import Figures
from fednano.lab.federation import TINY_MODEL, Federation
from fednano.wire.run_config import RunConfig

from tests.lab.conftest import small_run, state_of, typed, wait_for

pytestmark = pytest.mark.timeout(400)
PLACEMENTS = ("connector", "lora")
CLIENTS = ("client-1", "client-2")


def config_of(placement: str) -> RunConfig:
    return small_run(
        placement,
        placement=placement,
        rounds=2,
        strategy={"name": "fedavg"},
        personal="fine-tuned",
        data={"limit": 60, "evaluation_limit": 8},
    )


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where clients keep what is their own."""
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module", params=PLACEMENTS)
def run(request: pytest.FixtureRequest, federation: Federation, caches: Path) -> str:
    """A finished run, by its placement."""
    name: str = request.param
    federation.create_run(config_of(name))
    federation.start_client("evaluator", name, "evaluator", once="true")
    for client in CLIENTS:
        federation.start_client(client, name, once="true", cache_dir=str(caches / client))
    wait_for(lambda: state_of(federation, name) in ("finished", "failed"), f"run {name}", 240)
    assert state_of(federation, name) == "finished"
    return name


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "digit.png"
    load_split("test")[0].image.save(path)
    return path


def experiment(federation: Federation, placement: str, name: str) -> Figures:
    """What the same run comes to in one process."""
    method = Method.model_validate({"name": name, "placement": placement})
    cell = Cell(method, Attack(), config_of(placement), "test")
    return Solo(Bench.load(federation.halves), cell, lambda text: None).run()


def test_the_services_end_where_an_experiment_does(federation: Federation, run: str) -> None:
    figures = experiment(federation, run, "fine-tuned")
    with federation.rest() as api:
        rounds = api.get(f"runs/{run}/rounds", params={"limit": 100}).json()["items"]
    rounds.sort(key=lambda each: each["number"])
    assert figures.adapter == rounds[-1]["adapter_digest"]
    assert [each.loss for each in figures.rounds] == [each["metrics"]["loss"] for each in rounds]
    own = [rounds[-1]["own"][client] for client in CLIENTS]
    assert [each["accuracy"] for each in own] == figures.own_shared
    assert [each["personal.accuracy"] for each in own] == figures.own
    assert [each["personal.global_accuracy"] for each in own] == figures.test_own


def test_the_ledger_has_vectors_only_where_some_crossed(federation: Federation, run: str) -> None:
    with federation.rest() as api:
        totals = api.get(f"runs/{run}/ledger").json()["totals"]
    crossed = [totals["sent"].get("embeddings", 0), totals["received"].get("gradients", 0)]
    assert all(crossed) if run == "connector" else crossed == [0, 0]
    assert (totals["server_seconds"] == 0) is (run == "lora")
    assert totals["sent"]["adapters"] > 0


def test_a_question_is_answered_with_what_was_tuned(
    federation: Federation, run: str, picture: Path, caches: Path
) -> None:
    asked = ["ask", "What digit is this?", "--image", str(picture), "--run", run]
    kept = ["--personal", "--id", "client-1", "--cache-dir", str(caches / "client-1")]
    whole = ["--llm-half", str(federation.halves / "llm")] if run == "lora" else []
    for which in (["--round", "2"], kept):
        done = typed(federation, *asked, *which, *whole)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        assert "bitsandbytes" not in done.stderr
        assert "gemm_4bit" not in done.stderr


@pytest.mark.parametrize("run", ["lora"], indirect=True)
def test_a_question_to_lora_needs_the_llm(federation: Federation, run: str, picture: Path) -> None:
    done = typed(federation, "ask", "What digit is this?", "--image", str(picture), "--run", run)
    assert done.returncode != 0
    assert "--llm-half: expected the LLM half, as the run trained LoRA" in done.stderr


def test_a_client_without_the_llm_is_told_what_lora_takes(federation: Federation) -> None:
    config = small_run("unfit", placement="lora", strategy={"name": "fedavg"})
    with federation.rest() as api:
        api.post("runs", json=config.model_dump(mode="json")).raise_for_status()
        federation.start_client("client-3", "unfit", once="true")
        log = federation.directory / "client-3.log"
        wait_for(lambda: "--llm-half DIR" in log.read_text(), "the reason", 60)
        assert api.get("runs/unfit").json()["members"] == []


def test_what_was_tuned_is_exported(federation: Federation, run: str, tmp_path: Path) -> None:
    where = ["--model", str(TINY_MODEL), "--out", str(tmp_path)]
    done = typed(federation, "export", "--run", run, "--round", "2", *where)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapter_model.safetensors").is_file()
