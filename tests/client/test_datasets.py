"""Private data: the digits in shards, and JSONL files with errors that name the line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fednano.client.datasets import (
    DigitsShard,
    JsonlDataset,
    Shard,
    digits_test,
    global_test_set,
)
from fednano.wire.errors import InvalidRequest
from fednano.wire.run_config import DataConfig
from PIL import Image

CONFIG = DataConfig(partition="dirichlet:0.5")


def write(path: Path, lines: list[object]) -> Path:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return tmp_path


def test_shards_are_disjoint_and_hold_everything() -> None:
    shards = [DigitsShard.deal(CONFIG, 3, i, 4) for i in range(4)]
    ids = [d.id for s in shards for d in (*s.training, *s.kept)]
    assert len(ids) == len(set(ids)) == 1077


def test_what_is_held_back_is_never_trained_on() -> None:
    shard = DigitsShard.deal(CONFIG, 0, 1, 4)
    trained = {e.id.rsplit("-", 1)[0] for r in range(9) for e in shard.epoch(0, r, 0, "c")}
    assert not trained & {e.id.rsplit("-", 1)[0] for e in shard.held_back()}


def test_an_epoch_is_a_function_of_seed_round_and_client() -> None:
    shard = DigitsShard.deal(CONFIG, 0, 1, 4)
    first, again, other = (shard.epoch(0, r, 0, "c") for r in (1, 1, 2))
    assert [e.id for e in first] == [e.id for e in again]
    assert [e.id for e in first] != [e.id for e in other]


def test_an_epoch_has_every_picture_once_with_one_question_and_differs_by_client() -> None:
    shard = DigitsShard.deal(CONFIG, 0, 1, 4)
    mine, others = (shard.epoch(0, 1, 0, client) for client in ("a", "b"))
    assert sorted(e.id.rsplit("-", 1)[0] for e in mine) == [digit.id for digit in shard.training]
    assert {e.kind for e in mine} == {"name", "numeral", "parity"}
    assert [e.id for e in mine] != [e.id for e in others]


def test_scenes_are_dealt_by_their_first_shape() -> None:
    config = DataConfig(source="scenes", partition="dirichlet:0.1")
    shards = [Shard.deal(config, 0, shard, 3) for shard in range(3)]
    seen = [[scene.label for scene in (*s.training, *s.kept)] for s in shards]
    assert sum(map(len, seen)) == 1000
    assert max(max(map(labels.count, labels)) / len(labels) for labels in seen) > 0.6
    kinds = {example.kind for example in shards[0].held_back()}
    assert kinds == {"caption-one", "caption-two", "retrieval"}
    assert all(not example.candidates for example in shards[0].epoch(0, 1, 0, "c"))


def test_a_clients_scanner_takes_what_is_held_back_too_and_leaves_the_test_set_alone() -> None:
    plain, scanned = (
        Shard.deal(DataConfig(partition=partition), 0, 1, 4) for partition in ("iid", "feature:1")
    )
    for before, after in ((plain.training, scanned.training), (plain.kept, scanned.kept)):
        assert [digit.id for digit in before] == [digit.id for digit in after]
        pairs = zip(before, after, strict=True)
        assert all(a.image.tobytes() != b.image.tobytes() for a, b in pairs)
    sets = [
        global_test_set(DataConfig(partition=p, evaluation_limit=3)) for p in ("iid", "feature:1")
    ]
    assert sets[0] == sets[1]


def test_a_limit_keeps_a_shard_small() -> None:
    shard = DigitsShard.deal(CONFIG.model_copy(update={"limit": 20}), 0, 0, 4)
    assert len(shard.training) + len(shard.kept) == 20
    assert len(digits_test(limit=5)) == 15


def test_a_jsonl_file_becomes_examples(folder: Path) -> None:
    lines = [{"image": "a.png", "question": f"Q{i}?", "answer": "yes"} for i in range(10)]
    data = JsonlDataset.read(write(folder / "d.jsonl", lines))
    assert len(data) == 8
    assert {e.question for e in data.everything()} == {f"Q{i}?" for i in range(10)}
    assert data.epoch(0, 1, 0, "c")[0].images[0].mode == "RGB"


def test_a_line_may_offer_candidates(folder: Path) -> None:
    line = {"image": "a.png", "question": "Q?", "answer": "b", "candidates": ["a", "b"]}
    found = JsonlDataset.read(write(folder / "d.jsonl", [line, line])).everything()
    assert found[0].candidates == ("a", "b")


@pytest.mark.parametrize("candidates", [["a", "c"], ["b", "b"], ["b", ""]])
def test_candidates_that_are_no_choice_are_refused(folder: Path, candidates: list[str]) -> None:
    line = {"question": "Q?", "answer": "b", "candidates": candidates}
    with pytest.raises(InvalidRequest, match=r"d\.jsonl:1.*candidate"):
        JsonlDataset.read(write(folder / "d.jsonl", [line]))


def test_text_alone_and_several_images_are_fine(folder: Path) -> None:
    lines = [
        {"question": "Q?", "answer": "A"},
        {"images": ["a.png", "a.png"], "question": "Q?", "answer": "A", "id": "two"},
    ]
    found = JsonlDataset.read(write(folder / "d.jsonl", lines)).everything()
    assert sorted(len(e.images) for e in found) == [0, 2]


def test_images_are_opened_when_their_example_is_taken(folder: Path) -> None:
    lines = [{"image": "a.png", "question": f"Q{i}?", "answer": "yes"} for i in range(10)]
    data = JsonlDataset.read(write(folder / "d.jsonl", lines))
    (folder / "a.png").unlink()
    later = data.epoch(0, 1, 0, "c")[4:]
    assert len(later) == 4
    with pytest.raises(InvalidRequest, match=r"a\.png: expected an image"):
        list(later)


def test_every_bad_line_is_named(folder: Path) -> None:
    (folder / "no.png").write_text("not an image")
    good = {"image": "a.png", "question": "Q?", "answer": "A"}
    lines = [
        good,
        "{broken",
        {**good, "answer": ""},
        {**good, "image": "gone.png"},
        {**good, "image": "no.png"},
        {**good, "colour": "red"},
        {**good, "images": ["a.png"]},
    ]
    with pytest.raises(InvalidRequest) as caught:
        JsonlDataset.read(write(folder / "d.jsonl", lines))
    where = [problem.field.split()[0] for problem in caught.value.problems]
    assert where == [f"d.jsonl:{n}" for n in range(2, 8)]
    assert "d.jsonl:4 image: expected an image, got" in str(caught.value)


def test_a_missing_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"gone\.jsonl.*No such file"):
        JsonlDataset.read(tmp_path / "gone.jsonl")


def test_the_digits_are_scikit_learns() -> None:
    from fednano.client.digits import _digits
    from sklearn.datasets import load_digits

    images, labels = _digits()
    assert (images == load_digits().images).all()
    assert (labels == load_digits().target).all()
