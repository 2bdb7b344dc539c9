"""An exported adapter in the unmodified stock model is the split system."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fednano.client.adapters import NanoAdapters
from fednano.client.batches import Batch
from fednano.client.edge import EdgeHalf, NanoEdge
from fednano.client.examples import Example
from fednano.client.trainer import Trainer
from fednano.models.checkpoint import Origin
from fednano.models.export import export_peft
from fednano.models.frozen import FrozenLLM
from fednano.models.language_model import LowRank, Sampling
from fednano.wire.errors import InvalidRequest
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from tests.client.test_parity import prompt_of
from tests.tiny import TINY, large_tensors, no_adapters

pytestmark = pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*:UserWarning")
ORIGIN = Origin("test", 3, "f" * 64)


def low_ranks(adapters: NanoAdapters) -> dict[str, LowRank]:
    return {modality.name.lower(): a.low_rank() for modality, a in adapters.items()}


def uneven() -> NanoAdapters:
    """Different ranks for image and text."""
    image, text = large_tensors(rank=3, seed=2), large_tensors(rank=5, seed=1)
    chosen = {n: t for n, t in image.items() if n.startswith("image")}
    chosen |= {n: t for n, t in text.items() if n.startswith("text")}
    return NanoAdapters.from_tensors(chosen, scale=0.7)


@pytest.fixture
def exported(tmp_path: Path) -> tuple[PeftModel, NanoAdapters]:
    adapters = uneven()
    export_peft(TINY, low_ranks(adapters), tmp_path, ORIGIN)
    stock = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32)
    return PeftModel.from_pretrained(stock, str(tmp_path)).eval(), adapters


def test_logits_are_those_of_the_split_system(
    exported: tuple[PeftModel, NanoAdapters],
    edge: EdgeHalf,
    frozen: FrozenLLM,
    examples: list[Example],
) -> None:
    peft, adapters = exported
    for example in examples:
        inputs = edge.processor(
            text=prompt_of(edge, example), images=list(example.images) or None, return_tensors="pt"
        )
        batch = Batch.of([edge.prepare(example, with_answer=False)])
        with torch.no_grad():
            wanted = peft(**inputs).logits[0]
        positions = torch.arange(len(batch.base))
        split = frozen.forward(
            batch.sequences(NanoEdge(adapters)(batch).detach()), positions, keep=False
        ).logits
        plain = frozen.forward(batch.sequences(batch.base), positions, keep=False).logits
        assert (plain - split).abs().max() > 0.5
        torch.testing.assert_close(split, wanted, rtol=1e-4, atol=1e-4)


def test_generation_is_stock_generate_on_the_exported_adapter(
    exported: tuple[PeftModel, NanoAdapters], trainer: Trainer, examples: list[Example]
) -> None:
    peft, adapters = exported
    edge = trainer.edge
    found = trainer.answers(adapters, examples, Sampling(max_new_tokens=12))
    assert found != trainer.answers(no_adapters(), examples, Sampling(max_new_tokens=12))
    for example, answer in zip(examples, found, strict=True):
        inputs = edge.processor(
            text=prompt_of(edge, example), images=list(example.images) or None, return_tensors="pt"
        )
        ids = peft.generate(**inputs, max_new_tokens=12, do_sample=False)
        assert answer == edge.answer_text(ids[0, inputs["input_ids"].shape[1] :].tolist())
    assert any(len(answer.split()) > 2 for answer in found)


def test_the_embedding_table_is_not_in_the_file(
    exported: tuple[PeftModel, NanoAdapters], tmp_path: Path
) -> None:
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 40_000
    assert "`disable_adapter()`" in (tmp_path / "README.md").read_text()


def test_an_adapter_of_another_width_is_refused(tmp_path: Path) -> None:
    narrow = NanoAdapters.from_tensors(large_tensors(hidden=64), scale=1.0)
    with pytest.raises(InvalidRequest, match="expected width 128, got 64"):
        export_peft(TINY, low_ranks(narrow), tmp_path, ORIGIN)
