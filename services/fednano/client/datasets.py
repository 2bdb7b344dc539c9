"""A client's private data: a built-in task in shards, or its own JSONL file.

Every client holds back a part of its data to be scored on: that part is never trained on.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Generic, Protocol, TypeVar, overload

import numpy as np
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fednano.client import digits, scenes
from fednano.client.examples import Example
from fednano.client.partitions import Scanner, partition
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


P = TypeVar("P", digits.DigitImage, scenes.Scene)


@dataclass(frozen=True)
class Task(Generic[P]):
    """A built-in task."""

    pictures: Callable[[digits.Split], Sequence[P]]
    lessons: Callable[[P], list[Example]]
    """What a picture is trained on: one of these in an epoch."""
    exam: Callable[[P], list[Example]]
    """What it is scored on."""


TASKS: dict[str, Task[Any]] = {
    "digits": Task(digits.load_split, digits.examples_of, digits.examples_of),
    "scenes": Task(scenes.load_scenes, scenes.lessons, scenes.examples_of),
}


@dataclass(frozen=True)
class Shard(Generic[P]):
    """One client's share of a built-in task's training split."""

    task: Task[P]
    training: Sequence[P]
    kept: Sequence[P]

    @classmethod
    def deal(cls, config: DataConfig, seed: int, shard: int, of: int) -> Shard[Any]:
        """Share `shard` of `of`, by the run's task, partition and seed."""
        task = TASKS[config.source]
        everything = task.pictures("train")
        labels = [picture.label for picture in everything]
        mine = partition(labels, of, config.partition, seed)[shard]
        shuffled = np.random.default_rng([seed, shard]).permutation(mine)
        if config.limit:
            shuffled = shuffled[: config.limit]
        kept = max(1, round(len(shuffled) * HELD_BACK))
        scanner = Scanner.of(config.partition, shard)
        training, held_back = (
            [_scanned(everything[i], scanner) for i in np.sort(chosen)]
            for chosen in (shuffled[kept:], shuffled[:kept])
        )
        return Shard(task, training, held_back)

    def __len__(self) -> int:
        return len(self.training)

    def epoch(self, seed: int, round_number: int, epoch: int, client: str) -> list[Example]:
        """Every picture once, in random order, with one of its lessons by chance."""
        entropy = [seed, round_number, epoch, zlib.crc32(client.encode())]
        rng = np.random.default_rng(entropy)
        lessons = (self.task.lessons(self.training[i]) for i in rng.permutation(len(self)))
        return [offered[rng.integers(len(offered))] for offered in lessons]

    def held_back(self) -> list[Example]:
        return [example for picture in self.kept for example in self.task.exam(picture)]


DigitsShard = Shard  # its name where a run is on digits


def _scanned(picture: P, scanner: Scanner | None) -> P:
    if scanner is None:
        return picture
    return replace(picture, image=scanner.scan(picture.image, picture.id))


def global_test_set(config: DataConfig) -> list[Example]:
    """The global test set of a built-in task: all that is asked about every test picture."""
    task = TASKS[config.source]
    chosen = task.pictures("test")[: config.evaluation_limit or None]
    return [example for picture in chosen for example in task.exam(picture)]


def digits_test(limit: int = 0) -> list[Example]:
    """The test set of the digits, or of the first of them."""
    return global_test_set(DataConfig(evaluation_limit=limit))


class JsonlLine(BaseModel):
    """One line: {"image": "path"} or {"images": [...]}, "question", "answer", optional "id", "kind",
    "candidates".

    Paths are relative to the file. Candidates are answers that the right one is to be told from; it is
    one of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    image: str | None = None
    images: tuple[str, ...] = ()
    id: str = ""
    kind: str = ""
    candidates: tuple[Annotated[str, Field(min_length=1)], ...] = ()

    @model_validator(mode="after")
    def _one_of(self) -> JsonlLine:
        if self.image is not None and self.images:
            raise ValueError("give image or images, not both")
        if self.candidates and self.answer not in self.candidates:
            raise ValueError("the answer is to be one of the candidates")
        if len(set(self.candidates)) < len(self.candidates):
            raise ValueError("a candidate is there twice")
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
        return Example(line.id, images, line.question, line.answer, line.kind, line.candidates)


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
