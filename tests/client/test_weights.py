"""What a client tells of the weights that it could train."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fednano.client.weights import PROJECTIONS, trainable
from fednano.models.split import split
from fednano.wire.errors import InvalidRequest
from fednano.wire.placements import trained_by

from tests.tiny import TINY


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("halves") / "tiny"
    split(TINY, directory)
    return directory


def test_the_edge_half_has_a_connector_and_no_layers(halves: Path) -> None:
    assert trainable(halves / "edge") == (
        ("connector.linear_1.bias", (128,)),
        ("connector.linear_1.weight", (128, 128)),
        ("connector.linear_2.bias", (128,)),
        ("connector.linear_2.weight", (128, 128)),
    )


def test_layers_are_told_in_the_order_of_the_model(halves: Path) -> None:
    found = trained_by("lora", trainable(halves / "edge", halves / "llm"))
    names = [f"lora.layers.{n}.self_attn.{layer}" for n in range(4) for layer in PROJECTIONS]
    assert found == tuple((name, (128, 128)) for name in names)


def test_a_half_that_does_not_go_with_the_other_is_refused(halves: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="expected the llm half, got the edge half"):
        trainable(halves / "edge", halves / "edge")
    other = shutil.copytree(halves / "llm", tmp_path / "llm")
    record = json.loads((other / "fednano.json").read_text())
    (other / "fednano.json").write_text(json.dumps({**record, "fingerprint": "0" * 64}))
    with pytest.raises(InvalidRequest, match=r"--llm-half: expected the LLM of .*, got 0000"):
        trainable(halves / "edge", other)
