"""The built-in task: its splits, its partitions, its questions."""

import numpy as np
import pytest
from fednano.client.digits import (
    BadPartition,
    examples_of,
    load_split,
    one_question_each,
    partition,
    questions,
)

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


@pytest.mark.parametrize("scheme", ["iid", "dirichlet:0.5", "dirichlet:0.01"])
@pytest.mark.parametrize("clients", [1, 4, 30])
def test_partitions_are_disjoint_and_exhaustive_and_leave_nobody_empty(scheme, clients):
    labels = [digit.label for digit in load_split("train")]
    shares = partition(labels, clients, scheme, seed=0)
    assert sorted(np.concatenate(shares)) == list(range(len(labels)))
    assert len(shares) == clients
    assert min(len(share) for share in shares) >= 8


def test_partitions_are_functions_of_the_seed():
    labels = list(range(10)) * 40
    first, again, other = (partition(labels, 4, "dirichlet:0.5", seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_small_alpha_skews_the_labels():
    labels = np.repeat(np.arange(10), 100)
    shares = partition(labels, 4, "dirichlet:0.1", seed=0)
    assert max(np.bincount(labels[share]).max() / len(share) for share in shares) > 0.3


@pytest.mark.parametrize("scheme", ["even", "dirichlet", "dirichlet:", "dirichlet:-1", "iid:2"])
def test_an_unknown_scheme_is_refused(scheme):
    with pytest.raises(BadPartition, match=f'scheme: expected "iid" .* got {scheme!r}'):
        partition([0] * 100, 2, scheme, seed=0)


@pytest.mark.parametrize("clients", [0, 13])
def test_an_impossible_number_of_clients_is_refused(clients):
    with pytest.raises(BadPartition, match=f"clients: expected 1 to 12 .* got {clients}"):
        partition([0] * 100, clients, "iid", seed=0)


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


def test_an_epoch_asks_once_about_every_digit_and_differs_by_round_and_client():
    digits = load_split("validation")[:50]
    epochs = [
        [e.id for e in one_question_each(digits, seed=0, round=r, client=c)]
        for r, c in ((1, "a"), (1, "a"), (2, "a"), (1, "b"))
    ]
    assert {identity.rsplit("-", 1)[0] for identity in epochs[0]} == {d.id for d in digits}
    assert epochs[0] == epochs[1]
    assert epochs[0] != epochs[2] != epochs[3] != epochs[0]
