"""A client's private data: the built-in digits in shards, or its own JSONL file.

Every client holds back a part of its data to be scored on: that part is never trained on.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fednano.client import digits
from fednano.client.examples import Example
from fednano.wire.errors import InvalidRequest, Problem
from fednano.wire.run_config import DataConfig

HELD_BACK = 0.2
"""The share of a client's samples that it is scored on and doesn't train on."""
_MOST_PROBLEMS = 10


class Dataset(Protocol):
    """What a trainer draws from."""

    def __len__(self) -> int:
        """Samples to train on."""
        ...

    def epoch(self, seed: int, round_number: int, epoch: int, client: str) -> Sequence[Example]:
        """A training epoch, in an order that is a function of the arguments alone."""
        ...

    def held_back(self) -> Sequence[Example]:
        """What the client is scored on."""
        ...


@dataclass(frozen=True)
class DigitsShard:
    """One client's share of the built-in digits' training split."""

    training: Sequence[digits.DigitImage]
    kept: Sequence[digits.DigitImage]

    @classmethod
    def deal(cls, config: DataConfig, seed: int, shard: int, of: int) -> DigitsShard:
        """Share `shard` of `of`, by the run's partition and seed."""
        everything = digits.load_split("train")
        labels = [digit.label for digit in everything]
        mine = digits.partition(labels, of, config.partition, seed)[shard]
        shuffled = np.random.default_rng([seed, shard]).permutation(mine)
        if config.limit:
            shuffled = shuffled[: config.limit]
        kept = max(1, round(len(shuffled) * HELD_BACK))
        return cls(
            [everything[i] for i in np.sort(shuffled[kept:])],
            [everything[i] for i in np.sort(shuffled[:kept])],
        )

    def __len__(self) -> int:
        return len(self.training)

    def epoch(self, seed: int, round_number: int, epoch: int, client: str) -> list[Example]:
        """Every image once, with one random question each."""
        return digits.one_question_each(
            self.training, seed=seed, round=round_number, client=client, epoch=epoch
        )

    def held_back(self) -> list[Example]:
        return [example for digit in self.kept for example in digits.examples_of(digit)]


def digits_test(limit: int = 0) -> list[Example]:
    """The global test set of the built-in task: all questions about every test image."""
    chosen = digits.load_split("test")
    return [example for digit in chosen[: limit or None] for example in digits.examples_of(digit)]


class JsonlLine(BaseModel):
    """One line: {"image": "path"} or {"images": [...]}, "question", "answer", optional "id", "kind".

    Paths are relative to the file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    image: str | None = None
    images: tuple[str, ...] = ()
    id: str = ""
    kind: str = ""

    @model_validator(mode="after")
    def _one_of(self) -> JsonlLine:
        if self.image is not None and self.images:
            raise ValueError("give image or images, not both")
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.image,) if self.image is not None else self.images


@dataclass(frozen=True)
class JsonlDataset:
    """A site's own examples."""

    path: Path
    training: Sequence[JsonlLine]
    kept: Sequence[JsonlLine]

    @classmethod
    def read(cls, path: Path) -> JsonlDataset:
        """Checks every line and every image.

        Raises InvalidRequest that names the lines which can't be used.
        """
        lines = read_jsonl(path)
        if len(lines) < 2:
            raise InvalidRequest.of(str(path), "at least 2 examples", len(lines))
        shuffled = np.random.default_rng(0).permutation(len(lines))
        kept = max(1, round(len(lines) * HELD_BACK))
        return cls(path, [lines[i] for i in shuffled[kept:]], [lines[i] for i in shuffled[:kept]])

    def __len__(self) -> int:
        return len(self.training)

    def epoch(self, seed: int, round_number: int, epoch: int, client: str) -> Sequence[Example]:
        """Every example once."""
        entropy = [seed, round_number, epoch, zlib.crc32(client.encode())]
        order = np.random.default_rng(entropy).permutation(len(self.training))
        return Unopened(self.path.parent, [self.training[i] for i in order])

    def held_back(self) -> Sequence[Example]:
        return Unopened(self.path.parent, self.kept)

    def everything(self) -> Sequence[Example]:
        """For an evaluator, which never trains."""
        return Unopened(self.path.parent, [*self.training, *self.kept])


@dataclass(frozen=True)
class Unopened(Sequence[Example]):
    """Examples whose images are opened whenever one is taken: memory need not hold all of them."""

    folder: Path
    lines: Sequence[JsonlLine]

    def __len__(self) -> int:
        return len(self.lines)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Unopened: ...

    def __getitem__(self, index: int | slice) -> Example | Unopened:
        if isinstance(index, slice):
            return Unopened(self.folder, self.lines[index])
        line = self.lines[index]
        images = tuple(open_image(self.folder / name) for name in line.paths)
        return Example(line.id, images, line.question, line.answer, line.kind)


def open_image(path: Path) -> Image.Image:
    """RGB; raises InvalidRequest where it is no image."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InvalidRequest.of(str(path), "an image", error) from None


def read_jsonl(path: Path) -> list[JsonlLine]:
    """Raises InvalidRequest with a Problem for each of the first bad lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest.of(str(path), "a UTF-8 JSONL file", error) from None
    lines: list[JsonlLine] = []
    problems: list[Problem] = []
    for number, raw in enumerate(text.splitlines(), start=1):
        if raw.strip():
            problems += _check_line(path, number, raw, lines)
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:_MOST_PROBLEMS])
        more = len(problems) - _MOST_PROBLEMS
        rest = f"\n  and {more} more" if more > 0 else ""
        raise InvalidRequest(f"{path} can't be used:\n{shown}{rest}", *problems)
    return lines


def _check_line(path: Path, number: int, raw: str, lines: list[JsonlLine]) -> Iterator[Problem]:
    """Appends the line to `lines`, or yields what is wrong with it."""
    where = f"{path.name}:{number}"
    try:
        value: Any = json.loads(raw)
        line = JsonlLine.model_validate(value)
    except json.JSONDecodeError as error:
        yield Problem(where, "a JSON object", error.msg)
        return
    except ValidationError as error:
        for item in error.errors(include_url=False):
            field = ".".join(map(str, item["loc"]))
            yield Problem(f"{where} {field}".strip(), item["msg"], _shortened(item["input"]))
        return
    for name in line.paths:
        try:
            open_image(path.parent / name)
        except InvalidRequest as error:
            yield Problem(f"{where} image", error.problems[0].expected, error.problems[0].got)
            return
    lines.append(line if line.id else line.model_copy(update={"id": where}))


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
