"""Answers that are written together say what each says alone."""

from __future__ import annotations

import weakref

import pytest
import torch
from fednano.models.frozen import FrozenLLM
from fednano.models.generation import Answer
from fednano.models.language_model import LowRank, Sampling, Sequences
from fednano.wire.errors import InvalidRequest

from tests.models.causal import FAMILIES, HIDDEN, build, packed

NEVER = (-1,)
Ids = dict[int, list[int]]


@pytest.fixture(scope="module", params=FAMILIES)
def engine(request: pytest.FixtureRequest) -> FrozenLLM:
    return FrozenLLM(build(request.param), "mark")


def adapter() -> LowRank:
    made = torch.Generator().manual_seed(3)
    return LowRank(
        torch.randn(4, HIDDEN, generator=made), torch.randn(HIDDEN, 4, generator=made), 0.3
    )


def questions(engine: FrozenLLM) -> list[tuple[Sequences, Sampling, LowRank | None]]:
    """Of other lengths, samplings and adapters each; the second is over soon."""
    return [
        (packed(engine, (7, 3), seed=1), Sampling(14, stop_ids=NEVER), adapter()),
        (packed(engine, (20,), seed=2), Sampling(3, stop_ids=NEVER), None),
        (packed(engine, (2, 9), seed=3), Sampling(12, 1.5, 0.9, seed=4, stop_ids=(5, 6)), None),
    ]


def keep(written: object, ids: Ids) -> None:
    assert isinstance(written, list)
    for token in written:
        ids.setdefault(token.sample, []).append(token.id)


def alone(engine: FrozenLLM) -> list[Ids]:
    found: list[Ids] = [{} for _ in range(3)]
    for ids, question in zip(found, questions(engine), strict=True):
        for tokens in engine.generate(*question):
            keep(tokens, ids)
    return found


def write_on(engine: FrozenLLM, answers: list[Answer], found: list[Ids]) -> None:
    """One step of those that have not ended."""
    live = [i for i, answer in enumerate(answers) if not answer.ended]
    for i, written in zip(live, engine.write([answers[i] for i in live]), strict=True):
        keep(written, found[i])


def test_answers_begun_one_after_the_other_share_their_steps(engine):
    """Each joins two steps after the last, with another length of prompt; the second leaves first."""
    answers, found = [], [dict[int, list[int]]() for _ in range(3)]
    for question in questions(engine):
        answers.append(engine.answer(*question))
        write_on(engine, answers, found)
        write_on(engine, answers, found)
    assert answers[1].ended
    assert answers[0].batch is answers[2].batch is not None
    while not all(answer.ended for answer in answers):
        write_on(engine, answers, found)
    assert found == alone(engine)


def test_padding_is_cut_when_the_long_answers_are_over(engine):
    first, long = (engine.answer(*question) for question in questions(engine)[:2])
    for _ in range(3):
        engine.write([first, long])
    assert long.ended
    engine.write([first])
    assert first.batch.mask.shape[1] == 7 + 3 + 1 - 1  # prompt and what has been fed since
    assert first.batch.cache.get_seq_length() == first.batch.mask.shape[1]


def test_an_answer_that_has_lost_its_cache_goes_on_as_if_nothing_had_been(engine):
    answers = [engine.answer(*question) for question in questions(engine)]
    found: list[Ids] = [{} for _ in answers]
    for step in range(20):
        if step % 4 == 2:
            answers[step % 3].lose()
        if not all(answer.ended for answer in answers):
            write_on(engine, answers, found)
    assert found == alone(engine)


def test_one_that_is_not_finite_does_not_end_the_others(engine):
    question = questions(engine)[0]
    wrong = Sequences(question[0].values * float("inf"), question[0].segments)
    answers = [engine.answer(*question), engine.answer(wrong, *question[1:])]
    good, bad = engine.write(answers)
    assert isinstance(bad, InvalidRequest)
    assert answers[1].ended
    ids: Ids = {}
    keep(good, ids)
    while not answers[0].ended:
        keep(engine.write([answers[0]])[0], ids)
    assert ids == alone(engine)[0]


def test_a_cache_is_gone_with_its_last_answer(engine):
    answer = engine.answer(*questions(engine)[0])
    engine.write([answer])
    batch = weakref.ref(answer.batch)
    del answer
    assert batch() is None
