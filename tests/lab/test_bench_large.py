"""What `fednano bench` measures on a GPU, by the same code on a CPU: a small shape, in bf16."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fednano.lab.bench import large_clients, large_step
from fednano.lab.bench.large import Needed, Shape, _shards, attempted, lacking, llava_7b, made, make
from fednano.lab.bench.large_clients import Clients
from fednano.lab.bench.large_step import Sides
from fednano.lab.bench.rows import BenchFailed, Reach, Row, Surroundings
from fednano.lab.bench.served import Place
from fednano.lab.bench.wide import clip_small
from fednano.lab.processes import Processes
from fednano.models.frozen import FrozenLLM
from transformers import LlamaConfig, LlamaForCausalLM

_H200 = 143_771 << 20
SMALL = Shape(
    "a small shape",
    LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    ),
    clip_small(side=32, patch=8),
    batch=8,
    tokens=48,
    rank=4,
)
PLACE = Place("cpu", "bf16", 1)


def around(tmp_path: Path, processes: Processes, quick: bool = False) -> Surroundings:
    return Surroundings(tmp_path, processes, quick, tmp_path, print)


@pytest.mark.slow
def test_a_large_step_is_measured_by_either_wire_beside_the_whole_model(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        sides = Sides(around(tmp_path, processes), SMALL, PLACE, 2, 1, in_turns=True)
        factored, on_cpu, dense = sides.rows()
    for row in (factored, on_cpu, dense):
        parts = row.parts
        assert row.figure == pytest.approx(parts["split ms a step"] / parts["whole ms a step"])
        assert row.setting | {"batch": 8, "tokens a sample": 48, "rank": 4} == row.setting
    assert (str(factored.reach), on_cpu.reach, dense.reach) == ("at most 1.05", None, None)
    traffic = "MB a step, both directions"
    assert float(dense.parts[traffic]) > 2 * 8 * 48 * 128 * 2 / 1e6 > float(factored.parts[traffic])
    assert not list(tmp_path.rglob("*.safetensors"))  # many gigabytes where it matters


@pytest.mark.slow
def test_many_clients_are_measured_against_one_large_batch_in_pieces(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        clients = Clients(around(tmp_path, processes), SMALL, PLACE, (1, 4), 0.5, 1, in_turns=False)
        rows = list(clients.rows())
    assert rows[0].parts["sides"] == "one after the other"
    assert [row.setting["large batch"] for row in rows] == [
        "4, computed as 1 of 4",
        "16, computed as 2 of 8",
    ]
    for row, samples in zip(rows, (4, 16), strict=True):
        large = float(row.parts[f"samples/s, one batch of {samples} in one process"])
        assert row.figure == pytest.approx(float(row.parts["samples/s"]) / large)
        assert str(row.reach) == "at least 0.9"


@pytest.mark.parametrize(("bench", "rows"), [(large_step, 3), (large_clients, 5)])
def test_what_a_machine_cannot_measure_has_a_row_that_says_why(
    tmp_path: Path, bench: object, rows: int
) -> None:
    with Processes(tmp_path) as processes:
        found = list(bench.measure(around(tmp_path, processes, quick=True)))
    assert len(found) == rows
    for row in found:
        assert (row.shown, row.met) == ("not measured", None)
        assert row.parts["why"] == "--quick leaves it out"
        assert row.parts["would be measured by"] == f"fednano bench {row.bench}"


def test_too_little_memory_in_the_midst_of_it_is_no_failure() -> None:
    blank = Row("step", "split / whole", math.nan, "x", {"batch": 16}, reach=Reach("at most", 1.05))

    class Full:
        def blank(self) -> list[Row]:
            return [blank]

        def rows(self) -> list[Row]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    (row,) = attempted(Full(), why="")
    assert row.parts["why"] == "the GPU's memory did not suffice: CUDA out of memory"
    assert row.met is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_made(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        found = list(large_step.measure(around(tmp_path, processes)))
    assert all(str(row.parts["why"]).startswith("no GPU that torch can use") for row in found)
    assert not list(tmp_path.iterdir())


def test_a_row_that_was_measured_shows_its_figure_and_holds_its_reach() -> None:
    row = Row("step", "split / whole", 1.2, "x", {"batch": 16}, reach=Reach("at most", 1.05))
    assert (row.shown, row.met) == ("1.200 x", False)
    assert math.isnan(row.unmeasured("no GPU").figure)


def test_the_weights_on_disk_are_a_stock_models_in_that_shape(tmp_path: Path) -> None:
    model = make(tmp_path, SMALL, "cpu")
    found = FrozenLLM.load(model.halves / "llm", device="cpu", dtype="auto")
    stock = LlamaForCausalLM(SMALL.text)
    assert found.parameters == stock.num_parameters() == model.report.llm.parameters
    assert found.fingerprint == model.report.edge.fingerprint
    index = json.loads((model.halves / "llm" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == dict(stock.named_parameters()).keys()
    assert index["metadata"]["total_size"] == 2 * stock.num_parameters()


def test_a_bench_that_fails_leaves_no_weights_behind(tmp_path: Path) -> None:
    with pytest.raises(BenchFailed), made(tmp_path, SMALL, "cpu") as model:
        assert list(model.halves.rglob("*.safetensors"))
        raise BenchFailed("the service kept no bases")
    assert not list(tmp_path.iterdir())


def test_a_large_model_is_written_in_shards_of_a_gibibyte() -> None:
    shape = llava_7b()
    assert shape.parameters == 6_738_939_904
    shards = list(_shards(shape.tensors))
    assert [name for shard in shards for name in shard] == list(shape.tensors)
    sizes = [2 * sum(size.numel() for size in shard.values()) for shard in shards]
    assert max(sizes) <= 1 << 30
    assert len(shards) < 16


def test_what_is_kept_for_the_way_back_is_counted_as_torch_keeps_it() -> None:
    model = LlamaForCausalLM(SMALL.text).bfloat16().requires_grad_(False)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    leaf = torch.randn(4, 300, 128, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = model.model(inputs_embeds=leaf)
    assert held.last_hidden_state.requires_grad
    assert sum(kept.values()) == pytest.approx(SMALL.graph_bytes(4 * 300), rel=0.15)


def test_both_sides_of_a_7b_step_fit_on_one_card_of_141_gigabytes() -> None:
    needed = Needed.by(llava_7b())
    assert needed.apart < needed.together < _H200
    assert lacking(_H200, needed.together, "of the GPU's memory") == ""
    assert lacking(24 << 30, needed.apart, "of the GPU's memory").startswith("24.0 GiB of the GPU")
    longer = replace(llava_7b(), tokens=1400)
    assert Needed.by(longer).together > needed.together
