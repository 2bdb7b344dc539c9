"""What the halves of a checkpoint say about themselves, in a `fednano.json` beside their weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from fednano.wire.errors import InvalidRequest

RECORD = "fednano.json"
FORMAT = 1
Half = Literal["edge", "llm"]


@dataclass(frozen=True)
class HalfRecord:
    """One half of a checkpoint and how it is to be loaded."""

    half: Half
    name: str
    family: str  # transformers' model_type of the whole
    fingerprint: str  # of the whole; the same in both halves
    hidden_size: int
    vocabulary: int
    dtype: str  # of the weights, as torch names it
    loader: str  # the class that opens this half
    parameters: int
    bytes: int
    embeddings: bool = False  # edge: the embedding table is here and need not be asked for
    format: int = FORMAT

    def write(self, directory: Path) -> None:
        (directory / RECORD).write_text(json.dumps(asdict(self), indent=2) + "\n")


@dataclass(frozen=True)
class Origin:
    """Where the adapter comes from, for its README."""

    run: str
    round: int
    fingerprint: str


def read_record(directory: Path, half: Half) -> HalfRecord:
    """Raises InvalidRequest where `directory` is not that half."""
    path = directory / RECORD
    try:
        record = HalfRecord(**json.loads(path.read_text()))
    except FileNotFoundError:
        raise InvalidRequest(
            f"{directory} is no {half} half of a model: it has no {RECORD}. "
            f"Make one with `fednano split MODEL_DIR --out DIR` and use DIR/{half}."
        ) from None
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"{path} can't be read: {error}") from None
    if record.half != half:
        raise InvalidRequest.of(str(path), f"the {half} half", f"the {record.half} half")
    if record.format != FORMAT:
        raise InvalidRequest.of(f"{path}: format", FORMAT, record.format)
    return record


def fingerprint(directory: Path) -> str:
    """SHA-256 over a checkpoint's config and weights, in hexadecimal.

    Raises InvalidRequest where there are no safetensors weights.
    """
    weights = sorted(directory.glob("*.safetensors"))
    config = directory / "config.json"
    if not weights or not config.is_file():
        raise InvalidRequest(
            f"{directory} is no Hugging Face checkpoint: "
            "expected config.json and *.safetensors files in it"
        )
    digest = hashlib.sha256(config.read_bytes())
    for path in weights:
        with path.open("rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
    return digest.hexdigest()
