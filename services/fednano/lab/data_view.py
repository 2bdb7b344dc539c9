"""What the built-in tasks look like: `python -m fednano.lab.data_view PICTURE.png`.

Scenes with their captions; then a few images as the scanners of four clients see them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from PIL import Image

from fednano.client.digits import load_split
from fednano.client.partitions import Scanner
from fednano.client.scenes import Scene, load_scenes

_COLUMNS = 10
_SCANNERS = 4


def draw(picture: Path) -> None:
    """Writes the picture in docs/data.md."""
    figure = Figure(figsize=(9.6, 6.8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(2.6, 5)).flat
    _show_scenes(above, load_scenes("train")[: 2 * _COLUMNS])
    digits = [(digit.id, digit.image) for digit in load_split("train")[: _COLUMNS // 2]]
    scenes = [(scene.id, scene.image) for scene in load_scenes("train")[: _COLUMNS // 2]]
    _show_scanners(below, digits + scenes)
    figure.savefig(picture, pil_kwargs={"optimize": True})


def _show_scenes(part: SubFigure, scenes: Sequence[Scene]) -> None:
    part.suptitle("scenes", fontsize=10)
    for place, scene in zip(part.subplots(2, _COLUMNS).flat, scenes, strict=True):
        _put(place, scene.image)
        place.set_title(scene.caption.replace(" and ", "\nand "), fontsize=5.5, pad=2)


def _show_scanners(part: SubFigure, images: Sequence[tuple[str, Image.Image]]) -> None:
    part.suptitle("feature:1, the same images in four clients' scanners", fontsize=10)
    rows = part.subplots(_SCANNERS + 1, _COLUMNS)
    for row, client in zip(rows, (None, *range(_SCANNERS)), strict=True):
        for place, (name, image) in zip(row, images, strict=True):
            _put(place, image if client is None else Scanner(client, 1.0).scan(image, name))
        row[0].set_ylabel("as it is" if client is None else f"client {client}", fontsize=7)


def _put(place: Axes, image: Image.Image) -> None:
    place.imshow(image, interpolation="nearest")
    place.set(xticks=[], yticks=[])


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
