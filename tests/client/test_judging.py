"""What answers are worth, by hand."""

from __future__ import annotations

import pytest
from fednano.client.adapters import NanoAdapters
from fednano.client.batches import Batch
from fednano.client.datasets import global_test_set
from fednano.client.edge import EdgeHalf, NanoEdge
from fednano.client.examples import Example
from fednano.client.judging import Judgement, Rank, accuracies, measures
from fednano.client.trainer import Trainer
from fednano.client.wires import DenseWire
from fednano.models.frozen import FrozenLLM
from fednano.wire.run_config import DataConfig

from tests.tiny import large_tensors

CAPTION = Example("c", (), "Describe the picture.", "a red circle", "caption")
CHOICE = Example("r", (), "Which?", "b", "retrieval", ("a", "b", "c"))


@pytest.mark.parametrize(
    ("answer", "right", "shared"),
    [
        ("a red circle", True, 1.0),
        (" A Red Circle", True, 1.0),
        ("a red square", False, 2 / 3),
        ("a red circle and a red cross", False, 2 * 3 / (3 + 7)),
        ("circle circle", False, 2 * 1 / (3 + 2)),
        ("", False, 0.0),
    ],
)
def test_captions_are_right_word_for_word_and_share_words(
    answer: str, right: bool, shared: float
) -> None:
    judged = Judgement.of(CAPTION, answer)
    assert (judged.right, judged.shared) == (right, pytest.approx(shared))


def test_the_right_candidate_loses_every_tie() -> None:
    assert [Rank.of(CHOICE, losses).place for losses in ([3, 1, 2], [1, 2, 3], [1, 1, 1])] == [
        1,
        2,
        3,
    ]


def test_what_is_no_number_comes_last() -> None:
    nan = float("nan")
    assert Rank.of(CHOICE, [nan, nan, nan]).place == 3


def test_choices_are_no_part_of_the_accuracy_unless_there_is_nothing_else() -> None:
    judged = [Judgement.of(CAPTION, "a red circle"), Judgement.of(CAPTION, "a red square")]
    ranked = [Rank("retrieval", place) for place in (1, 2, 5, 6)]
    assert accuracies(judged, ranked) == (0.5, {"caption": 0.5, "retrieval": 0.25})
    assert accuracies([], ranked) == (0.25, {"retrieval": 0.25})
    assert measures(judged, ranked) == {
        "f1": pytest.approx(5 / 6),
        "retrieval.recall1": 0.25,
        "retrieval.recall5": 0.75,
        "retrieval.rank": 3.5,
    }


def test_answers_of_one_word_have_no_f1() -> None:
    assert measures([Judgement.of(Example("d", (), "Q?", "seven"), "two")], []) == {}


def test_ranks_are_those_of_each_candidates_own_loss(
    trainer: Trainer, edge: EdgeHalf, frozen: FrozenLLM
) -> None:
    """Against scoring every candidate by itself, in a batch of one."""
    tensors = {name: tensor * 0.1 for name, tensor in large_tensors().items()}
    adapters = NanoAdapters.from_tensors(tensors, scale=0.7)
    examples = global_test_set(DataConfig(source="scenes", evaluation_limit=6))
    found = trainer.evaluate(adapters, examples, batch_size=8)
    places = []
    for example in examples:
        losses = []
        for text in example.candidates:
            alone = edge.prepare(Example("", example.images, example.question, text))
            score = DenseWire(frozen).score(NanoEdge(adapters), Batch.of([alone]))
            losses.append(float(score.loss_sums / score.token_counts))
        if losses:
            own = losses[example.candidates.index(example.answer)]
            places.append(sorted(losses).index(own) + 1)
    assert len(places) == 6
    assert found.measures["retrieval.rank"] == sum(places) / 6
    assert found.measures["retrieval.recall1"] == found.by_kind["retrieval"] == places.count(1) / 6
    assert found.samples == 12
