"""The weights that a client could train beside NanoAdapters, as their files' heads tell: no weight is
read for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from safetensors import safe_open

from fednano.models.checkpoint import read_record
from fednano.models.llava import CONNECTOR as MODULE
from fednano.wire.errors import InvalidRequest
from fednano.wire.placements import CONNECTOR, LORA, Shapes

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""The layers of an LLM that get a LoRA, in the order of its modules."""


def trainable(edge: Path, llm: Path | None = None) -> Shapes:
    """The connector's and, of a client that has the LLM half too, the layers' that get a LoRA.

    Raises InvalidRequest where `llm` is no LLM half, another model's, or has no such layers, and where
    there is no PEFT to train them.
    """
    found = dict(_shapes(edge))
    connector = [name for name in sorted(found) if name.startswith(f"{MODULE}.")]
    told = [(CONNECTOR + name.removeprefix(f"{MODULE}."), found[name]) for name in connector]
    return (*told, *(_layers(edge, llm) if llm is not None else ()))


def _layers(edge: Path, llm: Path) -> Shapes:
    """In the model's order, which the coordinator draws by."""
    if find_spec("peft") is None:
        raise InvalidRequest.of("--llm-half", "PEFT, which the extra export brings", "none")
    record, own = read_record(llm, "llm"), read_record(edge, "edge")
    if record.fingerprint != own.fingerprint:
        expected = f"the LLM of {edge} (fingerprint {own.fingerprint})"
        raise InvalidRequest.of("--llm-half", expected, record.fingerprint)
    names = {
        name.removeprefix("model.").removesuffix(".weight"): shape
        for name, shape in _shapes(llm)
        if name.endswith(tuple(f".{layer}.weight" for layer in PROJECTIONS))
    }
    if not names:
        raise InvalidRequest.of("--llm-half", f"an LLM with {', '.join(PROJECTIONS)}", "none")
    return tuple((LORA + name, names[name]) for name in sorted(names, key=_place))


def _place(layer: str) -> tuple[list[int], int]:
    numbers = [int(found) for found in re.findall(r"\d+", layer)]
    return numbers, PROJECTIONS.index(layer.rpartition(".")[2])


def _shapes(half: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of all tensors in its files."""
    for path in sorted(half.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, tuple(file.get_slice(name).get_shape())
