"""The whole system under fire, and everything that a person does with it afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fednano.client.check import Check
from fednano.client.digits import DigitImage, examples_of, load_split
from fednano.client.settings import ClientSettings
from fednano.lab.experiment.cell import Bench, Solo
from fednano.lab.experiment.plan import Attack, Cell, Method
from fednano.lab.federation import TINY_MODEL, Federation
from peft import PeftModel
from pydantic import SecretStr
from transformers import AutoModelForImageTextToText

from tests.lab.conftest import adapter_of, small_run, state_of, typed, wait_for

pytestmark = pytest.mark.timeout(400)
MEMBERS = ("client-1", "client-2", "evaluator")


def start_members(federation: Federation, run: str) -> None:
    federation.start_client("evaluator", run, "evaluator", once="true")
    for name in ("client-1", "client-2"):
        federation.start_client(name, run, once="true")


def wait_for_end(federation: Federation, run: str) -> None:
    wait_for(lambda: state_of(federation, run) in ("finished", "failed"), f"run {run}", 240)
    assert state_of(federation, run) == "finished"
    wait_for(
        lambda: all(federation.processes.status(name) is not None for name in MEMBERS),
        "the end of the clients",
    )
    assert [federation.processes.status(name) for name in MEMBERS] == [0, 0, 0]


def command(federation: Federation, *arguments: str) -> str:
    """What a `fednano` command prints; it must succeed."""
    done = typed(federation, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def collecting(federation: Federation, run: str, number: int) -> bool:
    """Whether a round is in the clients' hands, or past that."""
    with federation.rest() as api:
        reply = api.get(f"runs/{run}/rounds/{number}")
    return reply.status_code == 200 and reply.json()["state"] not in ("open", "failed")


@pytest.fixture(scope="module")
def undisturbed(federation: Federation) -> dict[str, bytes]:
    """The last adapter of a run that nothing happens to."""
    federation.create_run(small_run("undisturbed"))
    start_members(federation, "undisturbed")
    wait_for_end(federation, "undisturbed")
    return adapter_of(federation, "undisturbed", 3)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "digit.png"
    load_split("test")[0].image.save(path)
    return path


def test_killing_every_service_in_turn_changes_no_byte(
    federation: Federation, undisturbed: dict[str, bytes]
) -> None:
    federation.create_run(small_run("disturbed"))
    start_members(federation, "disturbed")
    wait_for(lambda: collecting(federation, "disturbed", 1), "round 1")
    federation.processes.kill("llm")
    federation.start_llm()
    federation.wait_for("llm")
    wait_for(lambda: collecting(federation, "disturbed", 2), "round 2")
    federation.processes.kill("coordinator")
    federation.start_coordinator()
    federation.wait_for("coordinator")
    wait_for(lambda: collecting(federation, "disturbed", 3), "round 3")
    federation.processes.kill("redis")
    federation.start_redis()
    wait_for_end(federation, "disturbed")
    assert adapter_of(federation, "disturbed", 3) == undisturbed


def test_an_experiment_s_cell_ends_where_the_services_do(
    federation: Federation, undisturbed: dict[str, bytes]
) -> None:
    config = small_run("undisturbed")
    cell = Cell(Method.model_validate(config.strategy.name), Attack(), config, "test")
    figures = Solo(Bench.load(federation.halves), cell, lambda text: None).run()
    with federation.rest() as api:
        rounds = api.get("runs/undisturbed/rounds", params={"limit": 100}).json()["items"]
    rounds.sort(key=lambda each: each["number"])
    assert figures.adapter == rounds[-1]["adapter_digest"]
    assert [each.accuracy for each in figures.rounds] == [
        each["metrics"]["accuracy"] for each in rounds
    ]


def test_clients_keep_adapters_of_their_own_as_in_an_experiment(
    federation: Federation, picture: Path, tmp_path: Path
) -> None:
    config = small_run("personal", rounds=1, strategy={"name": "fedavg"}, personal="fine-tuned")
    federation.create_run(config)
    federation.start_client("evaluator", "personal", "evaluator", once="true")
    for name in ("client-1", "client-2"):
        federation.start_client(name, "personal", once="true", cache_dir=str(tmp_path / name))
    wait_for_end(federation, "personal")
    cell = Cell(Method.model_validate("fine-tuned"), Attack(), config, "test")
    figures = Solo(Bench.load(federation.halves), cell, lambda text: None).run()
    with federation.rest() as api:
        own = api.get("runs/personal/rounds/1").json()["own"]
    found = [own[name] for name in ("client-1", "client-2")]
    assert [each["accuracy"] for each in found] == figures.own_shared
    assert [each["personal.accuracy"] for each in found] == figures.own
    assert [each["personal.global_accuracy"] for each in found] == figures.test_own
    asked = ["ask", "What digit is this?", "--image", str(picture), "--run", "personal"]
    here = ["--id", "client-1", "--cache-dir", str(tmp_path / "client-1")]
    assert command(federation, *asked, "--personal", *here).strip()


def test_the_ledger_knows_every_kind(federation: Federation, undisturbed: dict[str, bytes]) -> None:
    with federation.rest() as api:
        totals = api.get("runs/undisturbed/ledger").json()["totals"]
    assert totals["sent"].keys() >= {"embeddings", "adapters", "control"}
    assert totals["received"].keys() >= {"gradients", "adapters", "control"}
    tensors = 4 * 16 * 128 * 4
    assert totals["sent"]["adapters"] == 2 * 3 * 2 * tensors  # clients, rounds, with Fisher


def test_ask_answers_as_the_exported_adapter_does(
    federation: Federation, undisturbed: dict[str, bytes], picture: Path, tmp_path: Path
) -> None:
    question = "What digit is this?"
    said = command(federation, "ask", question, "--image", str(picture), "--run", "undisturbed",
                   "--round", "3")  # fmt: skip
    out = tmp_path / "peft"
    command(federation, "export", "--run", "undisturbed", "--round", "3", "--model",
            str(TINY_MODEL), "--out", str(out))  # fmt: skip
    assert said.strip() == answer_of_stock_peft(out, question)


def answer_of_stock_peft(adapter: Path, question: str) -> str:
    import warnings

    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(TINY_MODEL)
    stock = AutoModelForImageTextToText.from_pretrained(TINY_MODEL, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*ensure_weight_tying.*")
        peft = PeftModel.from_pretrained(stock, str(adapter)).eval()
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(text=text, images=[load_split("test")[0].image], return_tensors="pt")
    ids = peft.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer: str = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.strip()


def test_ask_without_a_run_asks_the_stock_model(federation: Federation, picture: Path) -> None:
    printed = command(federation, "ask", "Is the digit even?", "--image", str(picture), "--json")
    assert json.loads(printed)["answer"] in ("yes", "no")


def test_client_check_says_what_would_leave(
    federation: Federation, undisturbed: dict[str, bytes]
) -> None:
    report = json.loads(command(federation, "client", "check", "--json"))
    assert report["ok"]
    outflow = {row["kind"]: row["bytes"] for row in report["outflow"]}
    assert outflow["images"] == 0
    assert outflow["adapters"] == 4 * 16 * 128 * 4
    assert outflow["embeddings"] > 16 * 16 * 128 * 4


def test_client_check_names_what_is_wrong(federation: Federation, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.token"
    wrong.write_text("fn_wrong")
    told = ("--token-file", str(wrong), "--data", "gone.jsonl")
    done = typed(federation, "client", "check", *told)
    assert done.returncode == 1
    assert "bad data: gone.jsonl" in done.stdout
    assert "bad coordinator, token, TLS: a valid bearer token is required" in done.stdout


def write_own_data(folder: Path, digits: list[DigitImage]) -> Path:
    """A site's JSONL file with its images beside it."""
    folder.mkdir()
    lines = []
    for digit in digits:
        digit.image.save(folder / f"{digit.id}.png")
        for example in examples_of(digit):
            answer = {"question": example.question, "answer": example.answer}
            lines.append(json.dumps({"image": f"{digit.id}.png", "kind": example.kind, **answer}))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "data.jsonl"


def test_sites_train_on_files_of_their_own(federation: Federation, tmp_path: Path) -> None:
    federation.create_run(small_run("own", rounds=1, data={"source": "own"}))
    digits = load_split("train")
    for index, name in enumerate(("client-1", "client-2", "evaluator")):
        data = write_own_data(tmp_path / name, digits[index * 12 : index * 12 + 12])
        role = "evaluator" if name == "evaluator" else "trainer"
        cache = str(tmp_path / "cache" / name)
        federation.start_client(name, "own", role, data=str(data), cache_dir=cache)
    wait_for_end(federation, "own")
    with federation.rest() as api:
        record = api.get("runs/own/rounds/1").json()
        members = api.get("runs/own/clients").json()["items"]
    assert record["clients"]["submitted"] == ["client-1", "client-2"]
    assert record["metrics"].keys() >= {"accuracy", "accuracy.name", "loss", "train_loss"}
    assert [m["samples"] for m in members if m["role"] == "trainer"] == [29, 29]
    assert len(list((tmp_path / "cache" / "client-1").glob("*.safetensors"))) == 12
    command(federation, "client", "purge", "--yes", "--cache-dir", str(tmp_path / "cache/client-1"))
    assert not (tmp_path / "cache" / "client-1").exists()


def test_captions_and_choices_are_measured_through_the_services(federation: Federation) -> None:
    data = {"source": "scenes", "partition": "feature:0.5", "limit": 20, "evaluation_limit": 4}
    federation.create_run(small_run("scenes", rounds=1, data=data))
    start_members(federation, "scenes")
    wait_for_end(federation, "scenes")
    with federation.rest() as api:
        record = api.get("runs/scenes/rounds/1").json()
    chosen = {"retrieval.recall1", "retrieval.recall5", "retrieval.rank", "accuracy.retrieval"}
    assert record["metrics"].keys() >= {"accuracy", "f1", "loss", *chosen}
    assert record["own"]["client-1"].keys() >= {"accuracy", "f1", *chosen}
    assert 1 <= record["metrics"]["retrieval.rank"] <= 10


def test_a_shadow_is_what_the_other_strategy_would_have_made(
    federation: Federation, undisturbed: dict[str, bytes]
) -> None:
    """Both runs begin alike: in round 1 the shadow of the one is what leads in the other."""
    shadows = [{"name": "fednano-ef"}]
    config = small_run("shadowed", rounds=1, strategy={"name": "fedavg"}, shadows=shadows)
    federation.create_run(config)
    start_members(federation, "shadowed")
    wait_for_end(federation, "shadowed")
    with federation.rest() as api:
        record, led = (
            api.get(f"runs/{run}/rounds/1").json() for run in ("shadowed", "undisturbed")
        )
    (shadow,) = record["shadows"]
    assert shadow["adapter_digest"] == led["adapter_digest"] != record["adapter_digest"]
    assert shadow["metrics"] == {n: v for n, v in led["metrics"].items() if n != "train_loss"}
    assert shadow["own"].keys() == {"client-1", "client-2"}
    assert record["metrics"]["train_loss"] == led["metrics"]["train_loss"]


def test_stopping_a_run_ends_its_clients_in_order(federation: Federation) -> None:
    federation.create_run(small_run("stopped", rounds=50))
    start_members(federation, "stopped")
    wait_for(lambda: collecting(federation, "stopped", 1), "round 1")
    with federation.rest() as api:
        api.post("runs/stopped/stop").raise_for_status()
    wait_for(
        lambda: all(federation.processes.status(name) is not None for name in MEMBERS),
        "the end of the clients",
    )
    assert [federation.processes.status(name) for name in MEMBERS] == [1, 1, 1]
    for name in MEMBERS:
        log = (federation.directory / f"{name}.log").read_text()
        assert "Traceback" not in log
        assert log.splitlines()[-1].count("state=stopped") == 1


def test_a_killed_client_does_not_hold_the_round(federation: Federation) -> None:
    config = small_run("lossy", deterministic=False, min_clients=1, rounds=1, round_seconds=20.0)
    federation.create_run(config)
    start_members(federation, "lossy")
    wait_for(lambda: collecting(federation, "lossy", 1), "round 1")
    federation.processes.kill("client-2")
    wait_for(lambda: state_of(federation, "lossy") in ("finished", "failed"), "the run", 90)
    with federation.rest() as api:
        record = api.get("runs/lossy/rounds/1").json()
    assert record["state"] == "done"
    assert "client-1" in record["clients"]["submitted"]


def test_client_check_knows_another_model_and_a_full_disk(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "edge"
    shutil.copytree(federation.halves / "edge", other)
    record = json.loads((other / "fednano.json").read_text())
    (other / "fednano.json").write_text(json.dumps({**record, "fingerprint": "0" * 64}))
    token = federation.directory / "client-1.token"
    addresses = federation.addresses
    settings = ClientSettings(
        coordinator=addresses.grpc,
        llm=addresses.llm,
        token=SecretStr(token.read_text()),
        edge=other,
        id="client-1",
        cache_dir=tmp_path / "cache",
    )
    nothing_free = SimpleNamespace(free=1 << 20)
    monkeypatch.setattr("fednano.client.check.shutil.disk_usage", lambda path: nothing_free)
    bad = {f.name: f.detail for f in Check(settings).run().findings if not f.ok}
    assert bad.keys() == {"disk", "LLM, fingerprint"}
    assert "expected 256 MiB free, got 1 MiB" in bad["disk"]
    assert f"expected {'0' * 64}, got {record['fingerprint']}" in bad["LLM, fingerprint"]


def test_an_asynchronous_run_learns(federation: Federation) -> None:
    buffered = {
        "clients": 3,
        "rounds": 4,
        "deterministic": False,
        "strategy": {"name": "fedavg"},
        "asynchronous": {"buffer": 2, "max_staleness": 4},
        "data": {"limit": 60, "evaluation_limit": 32},
        "evaluation": {"own_data": "never", "evaluators": 1, "every": 4},
    }
    federation.create_run(small_run("buffered", **buffered))
    federation.start_client("evaluator", "buffered", "evaluator", once="true")
    for name in ("client-1", "client-2", "client-3"):
        federation.start_client(name, "buffered", once="true")
    wait_for(lambda: state_of(federation, "buffered") in ("finished", "failed"), "the run", 240)
    assert state_of(federation, "buffered") == "finished"
    with federation.rest() as api:
        rounds = api.get("runs/buffered/rounds", params={"limit": 100}).json()["items"]
    staleness = [one["metrics"]["staleness"] for one in rounds[1:]]
    assert staleness[0] == 0
    assert max(staleness) > 0
    assert rounds[4]["metrics"]["loss"] < rounds[0]["metrics"]["loss"]
