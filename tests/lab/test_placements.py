"""Connector tuning and LoRA inside the LLM compute what the stock whole model computes, and every way
of an experiment takes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fednano.client.datasets import Shard
from fednano.client.examples import Example
from fednano.client.methods import LocalRound
from fednano.client.placements import copied, put
from fednano.client.placements_connector import ConnectorPlacement
from fednano.client.placements_lora import LoraPlacement
from fednano.coordinator.records import Tensors
from fednano.lab.experiment.cell import Bench, Solo
from fednano.lab.experiment.plan import Cell, Plan
from fednano.lab.experiment.results import Figures
from fednano.lab.federation import TINY_MODEL
from fednano.models.checkpoint import Origin
from fednano.models.export_weights import export_connector, export_lora
from fednano.models.split import split
from fednano.wire.errors import InvalidRequest
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from tests.client.test_parity import stock_losses
from tests.tiny import picture

SHORT = {"max_new_tokens": 1}
SMALL = {"rounds": 2, "data": {"limit": 24, "evaluation_limit": 1}, "evaluation": SHORT}
TINIEST = {"rounds": 1, "data": {"limit": 5, "evaluation_limit": 1}, "evaluation": SHORT}
ORIGIN = Origin("test", 3, "f" * 64)
PROJECTIONS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)"


def cell_of(method: Any, **changes: Any) -> Cell:
    body = {"name": "small", "seeds": [0], "clients": [2], "run": SMALL, **changes}
    (cell,) = Plan.model_validate({**body, "methods": [method]}).cells()
    return cell


def at(placement: str, name: str = "fedavg") -> dict[str, str]:
    return {"name": name, "placement": placement}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    halves = tmp_path_factory.mktemp("halves") / "tiny"
    split(TINY_MODEL, halves)
    return Bench.load(halves)


@pytest.fixture
def stock() -> LlavaForConditionalGeneration:
    model = AutoModelForImageTextToText.from_pretrained(TINY_MODEL, dtype=torch.float32)
    return model.eval().requires_grad_(False)


@pytest.fixture
def examples() -> list[Example]:
    """One image, several, none; answers of unlike length."""
    return [
        Example("one", (picture(0),), "What digit is this?", "seven"),
        Example("two", (picture(1), picture(2)), "Describe the picture.", "a red circle"),
        Example("none", (), "Is the digit even?", "yes"),
    ]


def figures_of(bench: Bench, cell: Cell) -> Figures:
    return Solo(bench, cell, lambda text: None).run()


def moved(tensors: Tensors, seed: int = 0) -> Tensors:
    """Away from where nothing has been trained, so that no gradient is 0 by construction."""
    rng = np.random.default_rng(seed)
    return {
        name: tensor + rng.normal(0, 0.05, tensor.shape).astype(np.float32)
        for name, tensor in tensors.items()
    }


def check_gradients(
    found: Mapping[str, torch.nn.Parameter], wanted: Mapping[str, torch.nn.Parameter]
) -> None:
    assert found.keys() == wanted.keys() != set()
    for name, parameter in found.items():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-5, name
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-3, atol=1e-5)


def test_the_connectors_gradient_is_that_of_the_stock_model(
    bench: Bench, stock: LlavaForConditionalGeneration, examples: list[Example]
) -> None:
    config = cell_of(at("connector")).config
    placement = bench.placed(config)
    assert isinstance(placement, ConnectorPlacement)
    projector = stock.model.multi_modal_projector.requires_grad_(True)
    whole = {f"connector.{name}": p for name, p in projector.named_parameters()}
    change = moved(bench.first(config))
    put(whole, {name: copied(whole)[name] + held for name, held in change.items()})
    placement.edge.change(change)
    placement.edge.connector.requires_grad_(True).train()
    crossed = placement.cross(examples)
    crossed.backward()
    placement.edge.connector.requires_grad_(False).eval()

    sums = stock_losses(stock, bench.trainer.edge, examples)
    (sums / crossed.token_counts).mean().backward()
    torch.testing.assert_close(crossed.loss_sums, sums.detach(), rtol=1e-4, atol=1e-5)
    check_gradients(placement.edge.parameters, whole)


def test_the_loras_gradient_is_that_of_peft_on_the_stock_model(
    bench: Bench, stock: LlavaForConditionalGeneration, examples: list[Example]
) -> None:
    config = cell_of(at("lora")).config
    placement = bench.placed(config)
    assert isinstance(placement, LoraPlacement)
    inject_adapter_in_model(LoraConfig(r=16, lora_alpha=32, target_modules=PROJECTIONS), stock)
    whole = {
        name.replace("model.language_model.", "lora.")
        .replace(".lora_A.default.weight", ".down")
        .replace(".lora_B.default.weight", ".up"): parameter
        for name, parameter in stock.named_parameters()
        if ".lora_" in name
    }
    tensors = moved(bench.first(config))
    put(whole, tensors)
    put(placement.lora, tensors)
    crossed = placement.cross(examples)
    crossed.backward()

    sums = stock_losses(stock, bench.trainer.edge, examples)
    (sums / crossed.token_counts).mean().backward()
    torch.testing.assert_close(crossed.loss_sums, sums.detach(), rtol=1e-4, atol=1e-5)
    check_gradients(placement.lora, whole)


@pytest.mark.parametrize("where", ["connector", "lora"])
def test_exported_it_is_the_same_in_the_stock_model(
    bench: Bench,
    stock: LlavaForConditionalGeneration,
    examples: list[Example],
    where: str,
    tmp_path: Path,
) -> None:
    config = cell_of(at(where)).config
    placement, tensors = bench.placed(config), moved(bench.first(config))
    found = placement.evaluate(tensors, examples, 1).loss
    named = {name: torch.tensor(tensor) for name, tensor in tensors.items()}
    if where == "lora":
        export_lora(TINY_MODEL, named, config.adapter.scale, tmp_path, ORIGIN)
    else:
        export_connector(TINY_MODEL, named, tmp_path, ORIGIN)
    loaded = PeftModel.from_pretrained(stock, str(tmp_path)).eval()
    with torch.no_grad():
        sums = stock_losses(loaded, bench.trainer.edge, examples)
    counts = torch.tensor([bench.trainer.edge.prepare(e).labels.ne(-100).sum() for e in examples])
    assert found == pytest.approx(float((sums / counts).mean()), rel=1e-4)
    assert f"round {ORIGIN.round}" in (tmp_path / "README.md").read_text()


def test_a_connector_that_is_no_chain_of_linear_layers_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidRequest, match=r"adapter connector.norm.weight: expected weights and"
    ):
        export_connector(TINY_MODEL, {"connector.norm.weight": torch.ones(8)}, tmp_path, ORIGIN)


def test_a_batch_without_images_leaves_the_connector_as_it_is(
    bench: Bench, examples: list[Example]
) -> None:
    placement = bench.placed(cell_of(at("connector")).config)
    assert isinstance(placement, ConnectorPlacement)
    placement.edge.connector.zero_grad()
    placement.edge.connector.requires_grad_(True).train()
    placement.cross(examples[2:]).backward()
    placement.edge.connector.requires_grad_(False).eval()
    assert all(parameter.grad is None for parameter in placement.edge.parameters.values())


def test_tensors_of_something_else_are_refused(bench: Bench) -> None:
    first = {p: bench.first(cell_of(at(p)).config) for p in ("connector", "lora")}
    for placement, other in (("connector", "lora"), ("lora", "connector")):
        placed = bench.placed(cell_of(at(placement)).config)
        with pytest.raises(InvalidRequest, match=r"adapter connector.linear_1.bias: expected"):
            placed.evaluate(first[other], [], 1)


def test_other_placements_need_no_layers_for_lora(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fednano.client.weights.PROJECTIONS", ("none_of_these",))
    for placement in ("nano-adapters", "connector"):
        assert bench.first(cell_of(at(placement)).config)
    with pytest.raises(InvalidRequest, match="--llm-half: expected an LLM with none_of_these"):
        bench.first(cell_of(at("lora")).config)


@pytest.mark.parametrize("placement", ["connector", "lora"])
def test_before_any_training_the_model_is_the_checkpoint(bench: Bench, placement: str) -> None:
    run = {"data": {"limit": 24}}
    usual, other = (cell_of(at(p), run=run).config for p in ("nano-adapters", placement))
    exam = Shard.deal(usual.data, 0, 0, 2).held_back()
    found, wanted = (
        bench.placed(config).evaluate(bench.first(config), exam, 8) for config in (other, usual)
    )
    assert 0 < found.accuracy == wanted.accuracy < 1
    assert found.loss == pytest.approx(wanted.loss, rel=1e-5)


@pytest.mark.parametrize("placement", ["connector", "lora"])
def test_a_federation_learns_and_gives_the_same_every_time(bench: Bench, placement: str) -> None:
    first, second = (figures_of(bench, cell_of(at(placement))) for _ in range(2))
    assert first.adapter == second.adapter != ""
    assert [r.loss for r in first.rounds] == [r.loss for r in second.rounds]
    before, after = (r.train_loss for r in first.rounds[1:])
    assert before is not None
    assert after is not None
    assert after < 0.8 * before
    assert len(first.own) == 2


def test_what_a_client_sends_and_computes_is_counted(bench: Bench) -> None:
    split_, whole = (
        figures_of(bench, cell_of(at(p), run=TINIEST)).rounds[1].spent
        for p in ("connector", "lora")
    )
    assert whole.sent == whole.received == 4 * 4 * 2 * 16 * 128 * 4  # layers, projections, A and B
    assert whole.llm_seconds == 0 < whole.client_seconds
    connector = 2 * (128 * 128 + 128) * 4
    assert split_.sent == split_.received > connector
    assert (split_.sent - connector) % (128 * 4) == 0
    assert split_.llm_seconds > 0


def test_members_by_themselves_and_all_as_one_take_placements_too(bench: Bench) -> None:
    for placement in ("connector", "lora"):
        local, pooled, tuned = (
            figures_of(bench, cell_of(at(placement, name), run=TINIEST))
            for name in ("local", "centralised", "fine-tuned")
        )
        assert local.adapter == pooled.adapter == ""
        assert local.rounds[0].loss == pooled.rounds[0].loss != pooled.rounds[1].loss
        assert len(local.test_own) == len(tuned.own_shared) == 2


@pytest.mark.parametrize("placement", ["connector", "lora"])
def test_what_merges_by_element_merges_these_weights_too(bench: Bench, placement: str) -> None:
    names = ("fedavg", "fedprox", "fedadam", "median", "multi-krum")
    run = {**TINIEST, "training": {"batch_size": 2}}  # fedprox pulls from the second step on
    methods: list[dict[str, Any]] = [at(placement, name) for name in names]
    methods[1]["mu"] = 1.0
    found = [figures_of(bench, cell_of(method, run=run, clients=[5])) for method in methods]
    assert len({figures.adapter for figures in found}) == len(names)
    assert len({figures.rounds[0].loss for figures in found}) == 1


def test_with_ffa_only_b_of_the_lora_is_trained(bench: Bench) -> None:
    cell = cell_of(at("lora", "ffa"), run=TINIEST)
    config = cell.config
    placement, base = bench.placed(config), moved(bench.first(config))
    local = LocalRound(config, 1, "shard-0", 16, base, config.training)
    found = placement.train(local, Shard.deal(config.data, 0, 0, 2)).adapter
    same = {name for name in base if np.array_equal(base[name], found[name])}
    assert same == {name for name in base if name.endswith(".down")}


def test_where_the_weights_lie_is_part_of_the_key_and_of_the_label() -> None:
    plain, usual = cell_of("fedavg"), cell_of(at("nano-adapters"))
    connector, lora = cell_of(at("connector")), cell_of(at("lora"))
    assert plain.key == usual.key
    assert len({plain.key, connector.key, lora.key}) == 3
    assert [c.method.label for c in (usual, connector, lora)] == [
        "fedavg",
        "fedavg, connector",
        "fedavg, lora",
    ]
    named = replace(lora, method=lora.method.model_copy(update={"label": "whole"}))
    assert named.key == lora.key


@pytest.mark.parametrize(
    ("method", "told"),
    [
        (at("encoder"), "expected 'nano-adapters', 'connector' or 'lora'"),
        (
            at("connector", "fednano-ef"),
            "run.strategy.name: expected another strategy, such as fed",
        ),
        (at("lora", "fednano"), "gradients of single samples"),
        ({**at("lora"), "shadows": ["fednano-ef"]}, "got fednano-ef"),
        (at("connector", "scaffold"), "controls are kept for NanoAdapters"),
        (at("connector", "ffa"), "are no product B A"),
        (at("lora", "product"), "square"),
        (at("lora", "flora"), "stack"),
        (at("connector", "feddpa-f"), "run.personal: expected none or fine-tuned beside placement"),
        (
            {**at("connector"), "training": {"wire": "factored"}},
            "run.training.wire: expected dense",
        ),
    ],
)
def test_what_does_not_go_with_a_placement_is_refused_with_the_reason(
    method: dict[str, Any], told: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps({"name": "bad", "methods": [method], "clients": [5]}))
    with pytest.raises(InvalidRequest) as refused:
        Plan.read(path)
    assert told in str(refused.value)
