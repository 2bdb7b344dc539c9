"""Layers that lie in several places compute what they do in one.

There is no second GPU here: the places are memory and disk, which pass through the same hooks.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from fednano.models.frozen import FrozenLLM
from fednano.models.language_model import Sampling
from fednano.models.parallel import Spread, read_map
from fednano.wire.errors import InvalidRequest

from tests.models.causal import FAMILIES, build, packed, several_labels

WEIGHTS = torch.tensor([0.3, 0.1, 2.0])
WANTED = torch.tensor([4, 8, 19])
LATE = {"model.layers.1": "disk", "model.norm": "disk"}
EARLY = {"model.embed_tokens": "disk", "model.layers.0": "disk", "lm_head": "disk"}  # one table
ALL_MODULES = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm")
ALL_MODULES += ("model.rotary_emb", "lm_head")


def written(directory: Path, stored: dict[str, str]) -> Spread:
    """A map that stores some modules elsewhere."""
    file = directory / "map.yaml"
    file.write_text(yaml.safe_dump({**dict.fromkeys(ALL_MODULES, "cpu"), **stored}))
    return Spread(device_map=str(file))


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    build(request.param).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("stored", [LATE, EARLY], ids=["late", "early"])
def test_layers_on_disk_give_the_same_bytes(model, tmp_path, stored):
    whole = FrozenLLM.load(model, "cpu")
    spread = FrozenLLM.load(model, spread=written(tmp_path, stored))
    sequences, labels = packed(whole), several_labels()
    above = torch.randn(3, whole.vocabulary, generator=torch.Generator().manual_seed(1))
    both = []
    for engine in (whole, spread):
        score = engine.score(sequences, labels)  # first: what it loads must not spoil the step
        step = engine.step(sequences, labels, WEIGHTS)
        kept = engine.forward(sequences, WANTED)
        back = engine.backward(kept.activation, above)
        answers = list(engine.generate(sequences, Sampling(8)))
        both.append([score.loss_sums, step.loss_sums, step.gradient, kept.logits, back])
        both[-1].append(torch.tensor([token.id for tokens in answers for token in tokens]))
    for expected, found in zip(*both, strict=True):
        assert torch.equal(expected, found)
    assert both[0][2].any()
    assert spread.device.type == "cpu"  # that computes, though weights have no place in memory


def test_a_named_map_chooses_by_itself(tmp_path):
    build().save_pretrained(tmp_path)
    whole = FrozenLLM.load(tmp_path)
    spread = FrozenLLM.load(tmp_path, spread=Spread(device_map="auto"))
    assert (spread.device.type, spread.dtype) == (whole.device.type, whole.dtype)
    found, expected = (m.score(packed(whole), several_labels()) for m in (spread, whole))
    torch.testing.assert_close(found.loss_sums, expected.loss_sums)


def test_a_map_may_be_json(tmp_path):
    file = tmp_path / "map.json"
    file.write_text('{"model": "cpu", "lm_head": "disk"}')
    assert read_map(str(file)) == {"model": "cpu", "lm_head": "disk"}
    assert read_map("balanced") == "balanced"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[1, 2]", "device_map: expected a file {module: device}, got"),
        ("{lm_head: true}", "device_map.lm_head: expected cpu, disk or a device"),
        ("{lm_head: nowhere}", "device_map.lm_head: expected cpu, disk or a device"),
        ("{lm_head: 99}", "device_map.lm_head: .* got 99, of [0-9]+ GPUs"),
        ("{lm_head: -1}", "device_map.lm_head: expected cpu, disk or a device"),
        ("{: :", "device_map: expected auto, .* or a YAML or JSON file, got"),
    ],
)
def test_a_map_that_can_not_be_is_refused_with_its_field(tmp_path, content, problem):
    file = tmp_path / "map.yaml"
    file.write_text(content)
    with pytest.raises(InvalidRequest, match=problem):
        Spread(device_map=str(file)).check()


def test_a_map_that_leaves_modules_out_is_refused(tmp_path):
    build().save_pretrained(tmp_path / "model")
    (tmp_path / "map.yaml").write_text("{model.layers.0: cpu, lm_head: disk}")
    with pytest.raises(InvalidRequest, match=r"device_map"):
        FrozenLLM.load(tmp_path / "model", spread=Spread(device_map=str(tmp_path / "map.yaml")))


def test_a_file_that_is_not_there_is_refused_with_the_names_that_there_are():
    with pytest.raises(InvalidRequest, match=r"expected auto, balanced, .* got .*No such file"):
        Spread(device_map="automatic").check()


@pytest.mark.parametrize(
    ("spread", "device", "problem"),
    [
        (Spread("auto", tensor_parallel=True), "auto", "device_map: expected nothing beside"),
        (Spread("auto"), "cuda", "device: expected auto beside device_map, .* got cuda"),
        (Spread(tensor_parallel=True), "cpu", "device: expected auto beside tensor_parallel"),
        (Spread(tensor_parallel=True), "auto", "two ranks or more: torchrun .*--nproc-per-node"),
    ],
)
def test_what_excludes_each_other_is_refused(spread, device, problem):
    with pytest.raises(InvalidRequest, match=problem):
        spread.check(device)


@pytest.mark.parametrize("size", [3, 8])
def test_ranks_that_would_cut_heads_apart_are_refused(tmp_path, monkeypatch, size):
    build().save_pretrained(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", str(size))
    with pytest.raises(InvalidRequest, match=r"tensor_parallel: .* divides num_attention_heads, 4"):
        FrozenLLM.load(tmp_path, spread=Spread(tensor_parallel=True))
