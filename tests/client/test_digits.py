"""The digits: their splits, their questions."""

import numpy as np
import pytest
from fednano.client.digits import examples_of, load_split, questions

FIRST_OF_TEST = [("digits-0000", 0), ("digits-0011", 1), ("digits-0012", 2)]


def test_splits_are_disjoint_and_exhaustive():
    splits = [{digit.id for digit in load_split(name)} for name in ("train", "validation", "test")]
    assert [len(ids) for ids in splits] == [1077, 360, 360]
    assert len(set.union(*splits)) == 1797


def test_splits_are_stratified():
    for name, expected in (("train", 108), ("validation", 36), ("test", 36)):
        counts = np.bincount([digit.label for digit in load_split(name)])
        assert np.abs(counts - expected).max() <= 4


def test_splits_never_change():
    assert [(digit.id, digit.label) for digit in load_split("test")[:3]] == FIRST_OF_TEST


def test_digits_are_light_on_black_and_as_large_as_the_vision_tower_wants():
    image = load_split("validation")[0].image
    assert (image.size, image.mode) == ((32, 32), "RGB")
    assert np.asarray(image)[:, :2].mean() < 40 < np.asarray(image).mean()


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="expected train, validation or test, got 'dev'"):
        load_split("dev")


def test_every_digit_is_asked_for_its_name_numeral_and_parity():
    assert [(kind, answer) for kind, _, answer in questions(7)] == [
        ("name", "seven"),
        ("numeral", "7"),
        ("parity", "no"),
    ]


def test_examples_of_a_digit_carry_its_image_and_distinct_ids():
    digit = load_split("train")[0]
    examples = examples_of(digit)
    assert len({example.id for example in examples}) == 3
    assert all(example.images == (digit.image,) for example in examples)
