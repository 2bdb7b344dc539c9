"""A checkpoint in two halves: nothing is missing, and each opens alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fednano.client.edge import EdgeHalf
from fednano.models.checkpoint import fingerprint, read_record
from fednano.models.frozen import FrozenLLM
from fednano.models.split import split
from fednano.wire.errors import InvalidRequest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests.tiny import TINY, picture


def test_the_halves_hold_every_parameter_once(halves: Path) -> None:
    whole = AutoModelForImageTextToText.from_pretrained(TINY)
    edge, llm = read_record(halves / "edge", "edge"), read_record(halves / "llm", "llm")
    assert edge.parameters + llm.parameters == whole.num_parameters()
    assert edge.fingerprint == llm.fingerprint == fingerprint(TINY)


def test_the_llm_half_is_a_stock_causal_lm(halves: Path) -> None:
    llm = AutoModelForCausalLM.from_pretrained(halves / "llm", dtype=torch.float32)
    whole = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32)
    ids = torch.tensor([[4, 54, 40, 44, 5]])
    torch.testing.assert_close(llm(ids).logits, whole(input_ids=ids).logits)


def test_the_client_never_opens_the_llm_half(
    halves: Path, frozen: FrozenLLM, tmp_path: Path
) -> None:
    alone = tmp_path / "edge"
    (halves / "edge").rename(alone)
    try:
        assert EdgeHalf(alone, frozen).features(picture(0)).shape == (16, 128)
    finally:
        alone.rename(halves / "edge")
    assert not any(
        "language_model" in name for name in load_file(halves / "edge/model.safetensors")
    )


def test_embedding_rows_may_travel_with_the_edge_half(frozen: FrozenLLM, tmp_path: Path) -> None:
    split(TINY, tmp_path, with_embeddings=True)
    assert read_record(tmp_path / "edge", "edge").embeddings
    own, asked = EdgeHalf(tmp_path / "edge", frozen), frozen.embed(torch.tensor([7, 9]))
    torch.testing.assert_close(own._rows([7, 9]), asked)


def test_a_split_may_be_repeated_but_overwrites_nothing_else(tmp_path: Path) -> None:
    split(TINY, tmp_path)
    split(TINY, tmp_path)
    other = tmp_path / "other" / "edge"
    other.mkdir(parents=True)
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(InvalidRequest, match="expected an empty directory or an earlier split"):
        split(TINY, other.parent)
    assert (other / "thesis.txt").read_text() == "mine"


def test_what_is_no_checkpoint_is_said_so(tmp_path: Path, halves: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"expected config\.json and \*\.safetensors"):
        split(tmp_path, tmp_path / "out")
    with pytest.raises(InvalidRequest, match="expected one of llava, got llama"):
        split(halves / "llm", tmp_path / "out")


def test_the_wrong_half_is_said_so(halves: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="expected the edge half, got the llm half"):
        read_record(halves / "llm", "edge")
    with pytest.raises(InvalidRequest, match="fednano split"):
        read_record(tmp_path, "edge")
