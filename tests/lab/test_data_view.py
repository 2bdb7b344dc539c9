"""The picture of the built-in tasks in docs/data.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from fednano.lab.data_view import draw
from PIL import Image


def test_the_picture_shows_scenes_in_colour_and_scanned_images(tmp_path: Path) -> None:
    draw(tmp_path / "data.png")
    with Image.open(tmp_path / "data.png") as picture:
        pixels = np.asarray(picture.convert("RGB"), float)
    assert pixels.shape == (680, 960, 3)
    colour = pixels.max(axis=2) - pixels.min(axis=2)
    above, below = colour[: 680 // 3], colour[680 // 2 :]
    assert (above > 100).mean() > 0.02
    assert (below[:, 480:] > 20).mean() > (below[:, :400] > 20).mean() + 0.05  # digits are grey
