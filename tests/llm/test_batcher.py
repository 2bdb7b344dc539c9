"""Who is next, and how much of a batch: rules that need no device."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from fednano.llm.batcher import Batcher
from fednano.llm.batches import Budget, Joined
from fednano.llm.jobs import Call, Joinable, Sender
from fednano.llm.joining import Scores
from fednano.llm.shares import Shares
from fednano.models.language_model import Modality, Segment, Sequences
from fednano.models.memory import out_of_memory


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def request(client: str, *lengths: int) -> Joinable:
    """A score of samples of these lengths."""
    segments = tuple((Segment(Modality.TEXT, 0, length),) for length in lengths)
    sequences = Sequences(torch.zeros(sum(lengths), 1), segments)
    work = Scores(lambda *_: None, sequences, torch.zeros(sum(lengths)))
    return Joinable(Sender(client), "score", work)


def sizes(batch: Joined) -> dict[str, list[int]]:
    """Lengths of each client's samples in a batch."""
    return {part.job.sender.client: list(part.work.lengths) for part in batch.parts}


def test_shares_follow_the_weights_and_nobody_starves():
    shares, served = Shares({"train": 8, "score": 4, "write": 2}), Counter()
    for _ in range(1400):
        kind = shares.order(["train", "score", "write"])[0]
        served[kind] += 1
        shares.charge(kind, 0.5)
    assert {kind: round(count / 100) for kind, count in served.items()} == {
        "train": 8, "score": 4, "write": 2,
    }  # fmt: skip


def test_who_was_away_has_neither_saved_nor_lost_anything():
    shares = Shares()
    for _ in range(100):
        shares.charge(shares.order(["old"])[0], 10)
    served = Counter()
    for _ in range(100):
        name = shares.order(["old", "new"])[0]
        served[name] += 1
        shares.charge(name, 10)
    assert abs(served["old"] - served["new"]) <= 1
    shares.order(["other"])
    assert len(shares._had) <= 3


def test_a_huge_request_takes_the_whole_budget_while_nobody_else_calls():
    clock = Clock()
    batcher = Batcher(tokens=800, answers=1, clock=clock)
    batcher.add(request("huge", *[10] * 200))
    assert [len(sizes(batcher.next())["huge"]) for _ in range(3)] == [80, 80, 40]
    assert batcher.next() is None


def test_neighbours_wait_for_a_slice_of_a_huge_request_and_then_come_first():
    clock = Clock()
    batcher = Batcher(tokens=800, answers=1, clock=clock)
    batcher.add(request("small", 10, 10))
    batcher.next()
    batcher.add(request("huge", *[10] * 200))
    assert sizes(batcher.next()) == {"huge": [10] * 10}  # the small one may be back at any moment
    batcher.add(request("small", 10, 10))
    assert sizes(batcher.next()) == {"small": [10, 10], "huge": [10] * 10}
    clock.now = 10.0
    assert sizes(batcher.next()) == {"huge": [10] * 80}  # it has not come back


def test_a_client_with_many_requests_gets_as_much_as_one_with_few():
    clock = Clock()
    batcher = Batcher(tokens=40, answers=1, clock=clock)
    for _ in range(30):
        batcher.add(request("many", 10, 10))
    served: Counter[str] = Counter()
    for _ in range(10):
        batcher.add(request("few", 10, 10))
        for client, lengths in sizes(batcher.next()).items():
            served[client] += sum(lengths)
    assert served == {"many": 200, "few": 200}


def test_the_shortest_samples_of_a_divided_request_go_together():
    batcher = Batcher(tokens=60, answers=1, clock=Clock())
    batcher.add(request("one", 3, 20, 5, 19, 4, 21, 30))
    found = [sizes(batch)["one"] for batch in iter(batcher.next, None)]
    assert found == [[3, 4, 5], [19, 20], [21, 30]]


def test_calls_of_their_own_and_joined_work_take_turns():
    batcher = Batcher(tokens=100, answers=1, clock=Clock())
    batcher.add(Call(Sender("a"), "train", lambda: 1, tokens=50))
    batcher.add(Call(Sender("a"), "train", lambda: 2, tokens=50))
    batcher.add(Call(Sender("b"), "train", lambda: 3, tokens=10))
    found = [batch.turns()[0].items[0] for batch in iter(batcher.next, None)]
    assert found == [1, 3, 2]


def test_a_budget_that_was_too_much_is_halved_and_grows_again():
    clock = Clock()
    budget = Budget(1000, recovery=60, clock=clock)
    budget.shrink(400)
    assert budget.now == 200
    budget.shrink(900)  # one that had been begun before
    assert budget.now == 200
    found = []
    for clock.now in (59, 60, 120, 180):
        found.append(budget.now)
    assert found == [200, 400, 800, 1000]


def test_a_cpu_without_memory_is_told_from_other_failures():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2) @ torch.ones(3)
    assert not out_of_memory(caught.value)
