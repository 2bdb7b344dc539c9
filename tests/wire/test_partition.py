"""Partitions as they are written."""

from __future__ import annotations

import pytest
from fednano.wire.partition import Partition, most_clients
from fednano.wire.run_config import DataConfig


@pytest.mark.parametrize(
    ("text", "scheme", "amount"),
    [
        ("iid", "iid", 0.0),
        ("dirichlet:0.5", "dirichlet", 0.5),
        ("quantity:.5", "quantity", 0.5),
        ("quantity:1000000", "quantity", 1e6),
        ("feature:0", "feature", 0.0),
        ("feature:1.0", "feature", 1.0),
    ],
)
def test_a_partition_is_read_and_a_run_may_have_it(text: str, scheme: str, amount: float) -> None:
    read = Partition.read(text)
    assert (read.scheme, read.amount) == (scheme, amount)
    assert DataConfig(partition=text).partition == text


def test_a_long_wrong_one_is_shown_in_part() -> None:
    with pytest.raises(ValueError, match=r"expected iid, .* got 'x{40}'$"):
        Partition.read("x" * 1000)


def test_a_built_in_task_is_enough_for_eight_images_each() -> None:
    assert (most_clients("digits"), most_clients("scenes")) == (134, 125)
