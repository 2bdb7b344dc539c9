"""However the LLM computes, it is the same function; where it is another one, it says so."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import pytest
import torch
import yaml
from fednano.models.compute import Compute, quantised, unquantised
from fednano.models.frozen import FrozenLLM
from fednano.models.language_model import Sampling
from fednano.models.parallel import Spread
from fednano.wire.errors import InvalidRequest
from transformers import PreTrainedModel

from tests.models.causal import FAMILIES, build, packed, several_labels

WEIGHTS = torch.tensor([0.3, 0.1, 2.0])
WANTED = torch.tensor([4, 8, 19])
LIBRARIES = {"int8": "torchao", "nf4": "bitsandbytes"}


@pytest.fixture(params=LIBRARIES)
def narrow(request: pytest.FixtureRequest) -> str:
    if find_spec(LIBRARIES[request.param]) is None:
        pytest.skip(f"{LIBRARIES[request.param]} is not installed: fednano[quantised]")
    return str(request.param)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    build().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def everything(engine: FrozenLLM) -> list[torch.Tensor]:
    sequences, labels = packed(engine), several_labels()
    step = engine.step(sequences, labels, WEIGHTS)
    kept = engine.forward(sequences, WANTED)
    above = torch.randn(3, engine.vocabulary, generator=torch.Generator().manual_seed(1))
    back = engine.backward(kept.activation, above)
    answers = list(engine.generate(sequences, Sampling(6)))
    ids = torch.tensor([token.id for tokens in answers for token in tokens])
    return [step.loss_sums, step.gradient, kept.logits, back, ids]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_computed_again_give_the_same_bytes(family):
    engine = FrozenLLM(build(family), "mark")
    kept = everything(engine)
    engine.recompute("on")
    assert all(map(torch.equal, everything(engine), kept))
    assert kept[1].any()


def test_layers_computed_again_may_lie_on_the_disk(directory, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    (tmp_path / "map.yaml").write_text(yaml.safe_dump(places))
    spread, again = Spread(str(tmp_path / "map.yaml")), Compute(checkpointing="on")
    engine = FrozenLLM.load(directory, spread=spread, compute=again)
    assert all(map(torch.equal, everything(engine), everything(FrozenLLM.load(directory, "cpu"))))


def test_less_is_kept_for_the_way_back():
    """Of each layer no more than its input and what all layers share."""
    engine = FrozenLLM(build(), "mark")
    whole = held_bytes(engine)
    engine.recompute("on")
    assert held_bytes(engine) < whole / 3


def held_bytes(engine: FrozenLLM) -> int:
    held: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    engine.step(packed(engine), several_labels(), WEIGHTS)  # makes what is made once
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        engine.activate(packed(engine, (40,) * 8), torch.tensor([39]))
    return sum(held.values())


TIGHT = """
import resource, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from fednano.models.frozen import FrozenLLM
from fednano.models.language_model import Modality, Segment, Sequences
torch.set_num_threads(1)
torch.manual_seed(0)
shape = dict(hidden_size=64, intermediate_size=512, num_hidden_layers=24, num_attention_heads=4)
engine = FrozenLLM(LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)), "mark")
def step(tokens):
    values = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1))
    sequences = Sequences(values, ((Segment(Modality.TEXT, 0, tokens),),))
    return engine.step(sequences, torch.arange(tokens) % 64, torch.ones(1)).gradient
step(8)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (300 << 20), resource.RLIM_INFINITY))
engine.recompute("off")
try:
    step(2000)
except RuntimeError as error:
    assert "can't allocate memory" in str(error), error
else:
    sys.exit("there was memory enough")
engine.recompute("auto")
found = step(2000)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
engine.recompute("off")
assert torch.equal(found, step(2000))
print("equal")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process")
def test_one_sample_that_does_not_fit_is_tried_once_more_with_less():
    done = subprocess.run([sys.executable, "-c", TIGHT], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("equal\n", 0), done.stderr


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_the_one_that_was_asked_for(directory, attention):
    engine = FrozenLLM.load(directory, "cpu", compute=Compute(attention))
    assert engine._model.config._attn_implementation == attention
    expected = everything(FrozenLLM.load(directory, "cpu"))
    torch.testing.assert_close(everything(engine), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(which("g++") is None, reason="g++ is not installed")
@pytest.mark.filterwarnings("ignore")  # those of torch's own compiler
def test_compiled_layers_are_the_same_function_for_every_length(directory, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes that outlive the test
    plain = FrozenLLM.load(directory, "cpu")
    compiled = FrozenLLM.load(directory, "cpu", compute=Compute(compile=True))
    for lengths in ((7, 3, 11), (20, 5, 9, 12)):
        given = packed(plain, lengths), several_labels(lengths), torch.ones(len(lengths))
        with torch.compiler.set_stance("default" if len(lengths) == 3 else "fail_on_recompile"):
            found = compiled.step(*given)
        expected = plain.step(*given)
        torch.testing.assert_close(found.loss_sums, expected.loss_sums)
        torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-4, atol=1e-5)


def test_what_can_not_be_compiled_is_refused(directory, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InvalidRequest, match=r"compile: expected the C\+\+ compiler.* got none"):
        FrozenLLM.load(directory, "cpu", compute=Compute(compile=True))


def dequantised(engine: FrozenLLM, stock: PreTrainedModel) -> PreTrainedModel:
    """The stock model with the weights that `engine` computes with."""
    made = deepcopy(stock)
    for name, module in engine._model.named_modules():
        weight = getattr(module, "weight", None)
        if hasattr(weight, "quant_state"):
            from bitsandbytes.functional import dequantize_4bit

            plain = dequantize_4bit(weight.data, weight.quant_state)
        elif type(weight).__name__ == "Int8Tensor":
            plain = weight.dequantize()
        else:
            continue
        made.get_submodule(name).weight = torch.nn.Parameter(plain.detach())
    return made


def test_quantised_weights_have_the_gradients_of_what_they_stand_for(directory, narrow):
    stock = build()
    engine = FrozenLLM.load(directory, "cpu", fingerprint="mark", compute=Compute(weights=narrow))
    stands_for = dequantised(engine, stock)
    changed = zip(stands_for.parameters(), stock.parameters(), strict=True)
    assert sum(not torch.equal(*pair) for pair in changed) == 14  # 7 linear layers in each of 2
    found, expected = everything(engine), everything(FrozenLLM(stands_for, "mark"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected[1].any()


def test_a_quantised_model_is_another_one_and_says_so(directory, narrow):
    engine = FrozenLLM.load(directory, "cpu", fingerprint="mark", compute=Compute(weights=narrow))
    assert (engine.fingerprint, engine.precision) == (f"mark+{narrow}", f"float32+{narrow}")
    assert unquantised(engine.fingerprint) == "mark" == quantised("mark", "auto")
    assert FrozenLLM.load(directory, "cpu", fingerprint="mark").precision == "float32"


@pytest.mark.parametrize(
    ("compute", "spread", "problem"),
    [
        (Compute(weights="nf4"), Spread("auto"), "weights: expected auto beside device_map"),
        (Compute(compile=True), Spread("auto"), "compile: expected false beside device_map"),
        (
            Compute(weights="int8"),
            Spread(tensor_parallel=True),
            "weights: expected auto beside tensor_parallel",
        ),
        (
            Compute(checkpointing="on"),
            Spread(tensor_parallel=True),
            "gradient_checkpointing: expected auto or off beside tensor_parallel",
        ),
    ],
)
def test_what_excludes_each_other_is_refused(compute, spread, problem):
    with pytest.raises(InvalidRequest, match=problem):
        compute.check(spread)


def test_flash_attention_is_refused_where_it_can_not_be_had(directory):
    flash = Compute("flash_attention_2")
    with pytest.raises(InvalidRequest, match=r"attention: expected bf16 or fp16 on a GPU .* cpu"):
        flash.options(torch.device("cpu"), torch.bfloat16)
    if find_spec("flash_attn") is None:
        with pytest.raises(InvalidRequest, match=r"attention: expected flash-attn .* got no flash"):
            FrozenLLM.load(directory, "cpu", compute=flash)
