"""Synthetic pictures for pre-training: printed digits and simple scenes, with questions.

Digits are printed in the fonts that Pillow and matplotlib carry, two of which are held out for
the evaluation, then bent, coarsened, coloured and made noisy; scenes are one or two coloured
shapes. Everything is a function of a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import map_coordinates

from fednano.client.digits import SIDE, WORDS, questions

Mask = NDArray[np.float32]  # [side, side] in 0..1, 1 where there is ink
Pixels = NDArray[np.uint8]  # [side, side, 3]
Rng = np.random.Generator

TRAIN_FONTS = (
    "Pillow",
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
)
HELD_OUT_FONTS = ("DejaVuSans-BoldOblique", "DejaVuSerif-Italic")
COLOURS = {
    "white": (250, 250, 250),
    "black": (8, 8, 8),
    "red": (220, 30, 30),
    "green": (30, 170, 50),
    "blue": (40, 60, 225),
    "yellow": (235, 215, 40),
}
SHAPES = ("circle", "square", "triangle", "cross")
NOUNS = (*WORDS, *SHAPES)
_DIGIT_WEIGHTS = {
    "name": 0.28, "numeral": 0.23, "parity": 0.19, "greater": 0.13,
    "colour": 0.06, "presence": 0.04, "caption": 0.07,
}  # fmt: skip
REPHRASED = {
    "What digit is this?": ("Which digit is it?", "Name the digit."),
    "Write the digit as a numeral.": ("Which numeral is it?",),
    "Is the digit even?": ("Is it even?",),
    "Is the digit greater than four?": ("Is it greater than four?",),
    "What colour is it?": ("Name the colour.",),
    "What shape is this?": ("Name the shape.",),
    "Describe the picture.": ("What is in the picture?",),
}
_COLOUR_WEIGHTS = (0.4, 0.2, 0.1, 0.1, 0.1, 0.1)  # grey handwriting is what comes afterwards
_DIGIT_BEND, _SHAPE_BEND = 0.06, 0.03  # of the side; a bent square is soon a circle
_GLYPH = 64  # pixels; glyphs are drawn at twice the final side and sampled down


@dataclass(frozen=True)
class Thing:
    """What there is to see: a colour and a noun (a digit's word or a shape)."""

    colour: str
    noun: str


@dataclass(frozen=True)
class Picture:
    """A render and, from left to right, what is on it."""

    pixels: Pixels
    things: tuple[Thing, ...]

    @property
    def is_digit(self) -> bool:
        return self.things[0].noun in WORDS


def render(
    count: int, seed: int, fonts: Sequence[str] = TRAIN_FONTS, scenes: float = 0.2
) -> list[Picture]:
    """`count` pictures, a share `scenes` of one (two fifths) or two shapes, the rest digits."""
    rng = np.random.default_rng(seed)
    return [_picture(rng, fonts, scenes) for _ in range(count)]


def ask(picture: Picture, count: int, rng: Rng) -> list[tuple[str, str]]:
    """`count` different kinds of question about a picture, as (question, answer)."""
    asked = all_questions(picture, rng)
    if not picture.is_digit:
        kinds = rng.permutation(list(asked))[:count]
    else:
        weights = np.array([_DIGIT_WEIGHTS[kind] for kind in asked])
        kinds = rng.choice(list(asked), count, replace=False, p=weights / weights.sum())
    pairs = [(_put(asked[str(kind)][0], rng), asked[str(kind)][1]) for kind in kinds]
    return pairs + pairs[: count - len(pairs)]


def _put(question: str, rng: Rng) -> str:
    """The question, in a quarter of cases in other words."""
    others = REPHRASED.get(question, ())
    return str(rng.choice(others)) if others and rng.random() < 0.25 else question


def all_questions(picture: Picture, rng: Rng) -> dict[str, tuple[str, str]]:
    """Every kind of question that fits a picture, with (question, answer)."""
    things = picture.things
    asked = {
        "presence": _presence(things, rng),
        "caption": ("Describe the picture.", _caption(things)),
    }
    if len(things) == 1:
        asked["colour"] = ("What colour is it?", things[0].colour)
    if picture.is_digit:
        digit = WORDS.index(things[0].noun)
        asked |= {kind: (question, answer) for kind, question, answer in questions(digit)}
        asked["greater"] = ("Is the digit greater than four?", "yes" if digit > 4 else "no")
    elif len(things) == 1:
        asked["shape"] = ("What shape is this?", things[0].noun)
    return asked


def _presence(things: tuple[Thing, ...], rng: Rng) -> tuple[str, str]:
    seen = {"digit" if thing.noun in WORDS else thing.noun for thing in things}
    nouns = ("digit", *SHAPES)
    missing = [noun for noun in nouns if noun not in seen]
    noun = rng.choice(sorted(seen)) if rng.random() < 0.5 else rng.choice(missing)
    return f"Is there a {noun}?", "yes" if noun in seen else "no"


def _caption(things: tuple[Thing, ...]) -> str:
    if things[0].noun in WORDS:
        return f"the digit {things[0].noun} in {things[0].colour}"
    return " and ".join(f"a {thing.colour} {thing.noun}" for thing in things)


def _picture(rng: Rng, fonts: Sequence[str], scenes: float) -> Picture:
    draw = rng.random()
    if draw < 1 - scenes:
        digit = int(rng.integers(10))
        colour = str(rng.choice(list(COLOURS), p=_COLOUR_WEIGHTS))
        mask = _coarse(_bent(_glyph(str(rng.choice(fonts)), digit, int(rng.integers(4))), rng), rng)
        return Picture(_painted([(mask, colour)], rng), (Thing(colour, WORDS[digit]),))
    if draw < 1 - 0.6 * scenes:
        thing = _thing(rng, list(COLOURS))
        mask = _bent(_shape(thing.noun), rng, bend=_SHAPE_BEND)
        return Picture(_painted([(mask, thing.colour)], rng), (thing,))
    return _two_shapes(rng)


def _two_shapes(rng: Rng) -> Picture:
    # White and black never share a picture: no background would set both off.
    colours = [name for name in COLOURS if name != ("white" if rng.random() < 0.5 else "black")]
    things = (_thing(rng, colours), _thing(rng, colours))
    layers = []
    for slot, thing in enumerate(things):
        mask = np.zeros((SIDE, SIDE), np.float32)
        top = int(rng.integers(1, SIDE // 2))
        small = _bent(_shape(thing.noun), rng, side=SIDE // 2, bend=_SHAPE_BEND)
        mask[top : top + SIDE // 2, slot * SIDE // 2 : (slot + 1) * SIDE // 2] = small
        layers.append((mask, thing.colour))
    return Picture(_painted(layers, rng), things)


def _thing(rng: Rng, colours: Sequence[str]) -> Thing:
    return Thing(str(rng.choice(colours)), str(rng.choice(SHAPES)))


@cache
def _font(name: str) -> ImageFont.FreeTypeFont:
    if name == "Pillow":
        font = ImageFont.load_default(size=80)
        if not isinstance(font, ImageFont.FreeTypeFont):
            raise RuntimeError("Pillow was built without FreeType, so it has no scalable font")
        return font
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(str(path), size=80)


@cache
def _glyph(font: str, digit: int, weight: int) -> Mask:
    """A digit that fills its square; `weight` is extra stroke width in pixels of an 80 px font."""
    face = _font(font)
    left, top, right, bottom = face.getbbox(str(digit), stroke_width=weight)
    canvas = Image.new("L", (int(right - left), int(bottom - top)))
    draw = ImageDraw.Draw(canvas)
    draw.text((-left, -top), str(digit), fill=255, font=face, stroke_width=weight)
    width = max(12, round(_GLYPH * canvas.width / canvas.height))
    square = Image.new("L", (_GLYPH, _GLYPH))
    resized = canvas.resize((min(width, _GLYPH), _GLYPH), Image.Resampling.LANCZOS)
    square.paste(resized, ((_GLYPH - resized.width) // 2, 0))
    return (np.asarray(square, np.float32) / 255).astype(np.float32)


@cache
def _shape(noun: str) -> Mask:
    canvas = Image.new("L", (_GLYPH, _GLYPH))
    draw = ImageDraw.Draw(canvas)
    low, third, high = 2, _GLYPH // 3, _GLYPH - 3
    if noun == "circle":
        draw.ellipse((low, low, high, high), fill=255)
    elif noun == "square":
        draw.rectangle((low + 4, low + 4, high - 4, high - 4), fill=255)
    elif noun == "triangle":
        draw.polygon(((_GLYPH // 2, low), (low, high), (high, high)), fill=255)
    else:
        draw.rectangle((third, low, 2 * third, high), fill=255)
        draw.rectangle((low, third, high, 2 * third), fill=255)
    return (np.asarray(canvas, np.float32) / 255).astype(np.float32)


def _bent(mask: Mask, rng: Rng, side: int = SIDE, bend: float = _DIGIT_BEND) -> Mask:
    """An affine and an elastic deformation (deviation `bend` of the side), sampled at once."""
    angle, shear = rng.normal(0, 0.14), rng.normal(0, 0.14)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    scale = np.diag(1 / rng.uniform(0.68, 1.0, 2))
    matrix = turn @ np.array([[1, 0], [shear, 1]]) @ scale
    axis = np.linspace(-1, 1, side)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"))  # [2 (y, x), side, side]
    field = _smooth(rng.normal(0, 2 * bend, (2, 4, 4)), side)  # in half sides
    source = np.einsum("ij,jyx->iyx", matrix, grid) + field + rng.normal(0, 0.05, (2, 1, 1))
    inner = (mask.shape[0] - 1) / 2
    bent: Mask = map_coordinates(mask, (source + 1) * inner, order=1, output=np.float32)
    return bent


def _smooth(coarse: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """[n, k, k] bicubically to [n, side, side]."""
    fields = [Image.fromarray(field.astype(np.float32)) for field in coarse]
    size = (side, side)
    return np.stack([np.asarray(f.resize(size, Image.Resampling.BICUBIC), float) for f in fields])


def _coarse(mask: Mask, rng: Rng) -> Mask:
    """In 40 % of cases what is left after 8 to 16 pixels a side."""
    if rng.random() >= 0.4:
        return mask
    side = int(rng.integers(8, 17))
    small = Image.fromarray(mask).resize((side, side), Image.Resampling.BOX)
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32)


def _painted(layers: Sequence[tuple[Mask, str]], rng: Rng) -> Pixels:
    """Coloured ink on a grey background that sets it off, with contrast and noise."""
    names = {name for _, name in layers}
    light = 255 - rng.exponential(25) if names & {"black", "blue"} else rng.exponential(25)
    if "white" in names and "blue" in names:
        light = rng.uniform(0, 15)
    canvas = np.full((SIDE, SIDE, 3), np.clip(light, 0, 255)) + rng.normal(0, 5, 3)
    for mask, name in layers:
        ink = np.array(COLOURS[name]) + rng.normal(0, 10, 3)
        alpha = np.clip(mask * rng.uniform(0.75, 1.2), 0, 1)[..., None]
        canvas = canvas * (1 - alpha) + ink * alpha
    canvas += rng.normal(0, rng.uniform(0, 14), canvas.shape)
    return np.clip(canvas, 0, 255).astype(np.uint8)
