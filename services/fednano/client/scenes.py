"""The second built-in task: describing sketches, and telling which caption belongs to one.

A scene is one coloured shape or two, drawn by an unsteady hand: in pen on squared paper or in chalk
on a board, sometimes hatched, never filled. The embedded model was pre-trained on filled shapes on
plain grounds (`lab/renders.py`), so it knows the words and has the drawing style to learn. Nothing
is downloaded or stored: a scene is a function of its number.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fednano.client.digits import SIDE, Split
from fednano.client.examples import Example
from fednano.wire.partition import TRAINING_IMAGES

Rng = np.random.Generator
Outline = NDArray[np.float64]  # [points, 2 (x, y)], in sheet pixels

QUESTION = "Describe the picture."
SHAPES = ("circle", "square", "triangle", "cross")
PENS = {
    "white": (240, 240, 235),
    "black": (25, 25, 30),
    "red": (205, 35, 40),
    "green": (25, 150, 60),
    "blue": (45, 70, 215),
    "yellow": (225, 195, 30),
}
CANDIDATES = 10  # captions that a scene's own is to be told from, itself included
_ONLY_ON = {"white": "board", "black": "paper"}  # on the other ground nobody would see it
_SEED = 32  # of the drawings and of nothing else
_SHEET = 4 * SIDE  # pixels; drawn larger and sampled down
_ONE_THING = 0.6  # the share of scenes with one thing; the others have two
_HATCHED = 0.4
_POINTS = 48  # of an outline
_TO_A_CORNER = 4  # points; a corner of any shape is one of every fourth
_TRAIN = TRAINING_IMAGES["scenes"]
_NUMBERS: dict[Split, range] = {
    "train": range(_TRAIN),
    "validation": range(_TRAIN, _TRAIN + 200),
    "test": range(_TRAIN + 200, _TRAIN + 400),
}


@dataclass(frozen=True)
class Thing:
    """A shape in a colour."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A sketch, and what is on it from left to right."""

    id: str
    things: tuple[Thing, ...]
    image: Image.Image  # RGB, 32 x 32

    @property
    def label(self) -> int:
        """The first thing's shape: what partitions by label look at."""
        return SHAPES.index(self.things[0].shape)

    @property
    def caption(self) -> str:
        return _caption(self.things)


@cache
def load_scenes(split: Split) -> tuple[Scene, ...]:
    """The scenes of a split: train 1,000, validation 200, test 200."""
    if split not in _NUMBERS:
        raise ValueError(f"split: expected train, validation or test, got {split!r}")
    return tuple(scene(number) for number in _NUMBERS[split])


def scene(number: int) -> Scene:
    """The scene with this number, always the same."""
    rng = np.random.default_rng([_SEED, number])
    ground = "paper" if rng.random() < 0.5 else "board"
    colours = [name for name in PENS if _ONLY_ON.get(name, ground) == ground]
    count = 1 if rng.random() < _ONE_THING else 2
    things = tuple(Thing(_one_of(colours, rng), _one_of(SHAPES, rng)) for _ in range(count))
    return Scene(f"scenes-{number:04d}", things, _drawn(things, ground, rng))


def examples_of(seen: Scene) -> list[Example]:
    """What a scene is scored on: its caption, written; and its caption, told from others."""
    count = "one" if len(seen.things) == 1 else "two"
    images = (seen.image,)
    return [
        Example(f"{seen.id}-caption", images, QUESTION, seen.caption, f"caption-{count}"),
        Example(
            f"{seen.id}-retrieval", images, QUESTION, seen.caption, "retrieval", candidates(seen)
        ),
    ]


def lessons(seen: Scene) -> list[Example]:
    """What a scene is trained on: its caption."""
    return examples_of(seen)[:1]


def candidates(seen: Scene) -> tuple[str, ...]:
    """Ten captions in random order, one of them the scene's. The others have as many things, and half
    of their colours and shapes from the scene: what tells them apart is on the picture.
    """
    rng = np.random.default_rng([_SEED, zlib.crc32(seen.id.encode())])
    found = {seen.caption}
    while len(found) < CANDIDATES:
        found.add(_caption([_resembling(thing, rng) for thing in seen.things]))
    listed = sorted(found)
    return tuple(listed[i] for i in rng.permutation(CANDIDATES))


def _caption(things: Sequence[Thing]) -> str:
    return " and ".join(map(str, things))


def _resembling(thing: Thing, rng: Rng) -> Thing:
    colour = thing.colour if rng.random() < 0.5 else _one_of(list(PENS), rng)
    return Thing(colour, thing.shape if rng.random() < 0.5 else _one_of(SHAPES, rng))


def _one_of(choices: Sequence[str], rng: Rng) -> str:
    return choices[int(rng.integers(len(choices)))]


def _drawn(things: Sequence[Thing], ground: str, rng: Rng) -> Image.Image:
    sheet = _paper(rng) if ground == "paper" else _board(rng)
    width = _SHEET / len(things)
    for slot, thing in enumerate(things):
        radius = rng.uniform(0.34, 0.44) * width
        slack = np.array([width, _SHEET]) / 2 - 1.05 * radius
        centre = np.array([(slot + 0.5) * width, _SHEET / 2]) + rng.uniform(-1, 1, 2) * slack
        _draw(sheet, _outline(thing.shape, radius, rng) + centre, _ink(thing.colour, rng), rng)
    small = np.asarray(sheet.resize((SIDE, SIDE), Image.Resampling.BOX), float)
    noisy = small + rng.normal(0, rng.uniform(0, 6), small.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def _ink(colour: str, rng: Rng) -> tuple[int, int, int]:
    red, green, blue = np.clip(np.array(PENS[colour]) + rng.normal(0, 10, 3), 0, 255).astype(int)
    return int(red), int(green), int(blue)


def _paper(rng: Rng) -> Image.Image:
    """Light, with faint squares."""
    light = int(rng.integers(225, 256))
    sheet = Image.new("RGB", (_SHEET, _SHEET), (light, light, light - int(rng.integers(0, 20))))
    pen, step = ImageDraw.Draw(sheet), int(rng.integers(18, 30))
    line = (light - 50, light - 40, light - 15)
    for place in range(int(rng.integers(step)), _SHEET, step):
        pen.line((place, 0, place, _SHEET), line, 2)
        pen.line((0, place, _SHEET, place), line, 2)
    return sheet


def _board(rng: Rng) -> Image.Image:
    """Dark, green or grey, with what the sponge left."""
    tint = np.array([1.0, rng.uniform(1.0, 1.6), 1.1])
    smears = (rng.uniform(20, 50) + rng.uniform(0, 40, (4, 4)))[..., None] * tint
    wiped = Image.fromarray(smears.astype(np.uint8))
    return wiped.resize((_SHEET, _SHEET), Image.Resampling.BICUBIC)


def _draw(sheet: Image.Image, outline: Outline, ink: tuple[int, int, int], rng: Rng) -> None:
    pen, width = ImageDraw.Draw(sheet), int(rng.integers(6, 11))
    points = [(float(x), float(y)) for x, y in [*outline, outline[0]]]
    if rng.random() < _HATCHED:
        sheet.paste(ink, mask=_hatching(points, rng))
    pen.line(points, ink, width)
    for x, y in points[::_TO_A_CORNER]:
        pen.circle((x, y), width / 2, ink)


def _hatching(points: Sequence[tuple[float, float]], rng: Rng) -> Image.Image:
    """Slanted lines, where they are inside."""
    inside, lines = (Image.new("1", (_SHEET, _SHEET)) for _ in range(2))
    ImageDraw.Draw(inside).polygon(list(points), fill=1)
    pen, step, slant = ImageDraw.Draw(lines), int(rng.integers(12, 18)), rng.uniform(-1, 1)
    for place in range(-_SHEET, 2 * _SHEET, step):
        pen.line((place, 0, place + slant * _SHEET, _SHEET), 1, 3)
    return Image.composite(lines, Image.new("1", (_SHEET, _SHEET)), inside)


def _outline(shape: str, radius: float, rng: Rng) -> Outline:
    """Around the origin, turned a little, by an unsteady hand."""
    corners = _CORNERS[shape]
    following = np.roll(corners, -1, axis=0)
    steps = np.linspace(0, 1, _POINTS // len(corners), endpoint=False)[:, None]
    path = np.concatenate([a + (b - a) * steps for a, b in zip(corners, following, strict=True)])
    angle = rng.normal(0, 0.12)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    unsteady: Outline = radius * (path @ turn.T + _tremble(len(path), rng))
    return unsteady


def _tremble(points: int, rng: Rng) -> Outline:
    """[points, 2]: slow waves along a closed line."""
    along = 2 * np.pi * np.arange(points)[:, None] / points
    waves = [rng.normal(0, 0.05, 2) * np.sin(k * along + rng.uniform(0, 6.3, 2)) for k in (2, 3, 5)]
    return np.asarray(sum(waves), float)


def _ring(points: int) -> Outline:
    angle = 2 * np.pi * np.arange(points) / points
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


_CORNERS: dict[str, Outline] = {
    "circle": _ring(24),
    "square": 0.9 * np.array([(-1.0, -1), (1, -1), (1, 1), (-1, 1)]),
    "triangle": np.array([(0.0, -1), (1, 0.9), (-1, 0.9)]),
    "cross": np.array(
        [
            *((-0.33, -1.0), (0.33, -1.0), (0.33, -0.33), (1.0, -0.33), (1.0, 0.33), (0.33, 0.33)),
            *(
                (0.33, 1.0),
                (-0.33, 1.0),
                (-0.33, 0.33),
                (-1.0, 0.33),
                (-1.0, -0.33),
                (-0.33, -0.33),
            ),
        ]
    ),
}
