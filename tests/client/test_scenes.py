"""The scenes: what is on them, what is said of them, and what they are told from."""

from __future__ import annotations

import numpy as np
import pytest
from fednano.client.edge import EdgeHalf
from fednano.client.scenes import examples_of, lessons, load_scenes, scene
from numpy.typing import NDArray


def test_a_scene_is_a_function_of_its_number() -> None:
    first, again, other = scene(7), scene(7), scene(8)
    assert (first.image.tobytes(), first.caption) == (again.image.tobytes(), again.caption)
    assert first.image.tobytes() != other.image.tobytes()
    assert (first.image.size, first.image.mode) == ((32, 32), "RGB")


def test_splits_are_disjoint() -> None:
    splits = [load_scenes(split) for split in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [1000, 200, 200]
    assert len({seen.id for split in splits for seen in split}) == 1400
    with pytest.raises(ValueError, match="expected train, validation or test, got 'dev'"):
        load_scenes("dev")  # type: ignore[arg-type]


def test_every_colour_and_shape_is_drawn_about_as_often_and_two_things_in_two_fifths() -> None:
    scenes = load_scenes("train")
    shapes = np.bincount([seen.label for seen in scenes])
    assert shapes.min() > 0.8 * shapes.max()
    assert 0.35 < np.mean([len(seen.things) == 2 for seen in scenes]) < 0.45
    seen = [thing.colour for each in scenes for thing in each.things]
    shares = {colour: seen.count(colour) / len(seen) for colour in set(seen)}
    assert len(shares) == 6
    assert min(shares.values()) > 0.07  # white and black are on one ground only


@pytest.mark.parametrize(("colour", "channel"), [("red", 0), ("green", 1), ("blue", 2)])
def test_a_colour_that_is_named_is_on_the_picture(colour: str, channel: int) -> None:
    def strongest(pixels: NDArray[np.float64]) -> float:
        others = np.delete(pixels, channel, axis=2).max(axis=2)
        return float((pixels[..., channel] - others).max())

    drawn = [seen for seen in load_scenes("train") if colour in seen.caption]
    assert len(drawn) > 100
    assert min(strongest(np.asarray(seen.image, float)) for seen in drawn) > 20


def test_a_caption_is_in_the_models_words(edge: EdgeHalf) -> None:
    for seen in load_scenes("test"):
        ids = edge.tokenizer(seen.caption)["input_ids"]
        assert edge.tokenizer.unk_token_id not in ids


def test_a_scene_is_trained_on_by_its_caption_and_scored_by_that_and_by_a_choice() -> None:
    two = next(seen for seen in load_scenes("train") if len(seen.things) == 2)
    written, chosen = examples_of(two)
    assert lessons(two) == [written]
    assert (written.kind, written.candidates) == ("caption-two", ())
    assert written.answer == chosen.answer == " and ".join(map(str, two.things))
    assert (chosen.kind, len(chosen.candidates)) == ("retrieval", 10)


def test_candidates_are_ten_different_captions_in_no_order_that_gives_the_right_one_away() -> None:
    places = []
    for seen in load_scenes("test"):
        chosen = examples_of(seen)[1]
        assert len(set(chosen.candidates)) == 10
        assert {text.count(" and ") for text in chosen.candidates} == {len(seen.things) - 1}
        places.append(chosen.candidates.index(seen.caption))
    assert np.bincount(places, minlength=10).min() > 5  # 20 each, but for chance
