"""What a run may be asked to do, and how a bad wish is named."""

from __future__ import annotations

from typing import Any

import pytest
from fednano.wire.run_config import RunConfig, TrainingConfig
from pydantic import ValidationError

DIGITS = "at most 134 for data.source digits (1077 training images, at least 8 each), got 135"
PARTITION = (
    "data.partition: expected iid or dirichlet:ALPHA with ALPHA above 0, at most 1000000, got"
)


def refusal(**values: Any) -> str:
    with pytest.raises(ValidationError) as refused:
        RunConfig.model_validate({"name": "trial", **values})
    return str(refused.value)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e300, 31 * 86400])
@pytest.mark.parametrize("field", ["round_seconds", "enrol_seconds", "evaluation.seconds"])
def test_a_deadline_is_a_number_within_a_month(field: str, value: float) -> None:
    section, _, name = field.rpartition(".")
    values = {section: {name: value}} if section else {name: value}
    assert field in refusal(**values)


def test_no_number_is_infinite() -> None:
    for section, field in (("training", "max_grad_norm"), ("strategy", "damping")):
        assert f"{section}.{field}" in refusal(**{section: {field: float("inf")}})


@pytest.mark.parametrize(
    "partition", ["dirichlet:0", "dirichlet:0.0", "dirichlet:", "dirichlet:1e9", "iid\n", "by-hand"]
)
def test_a_partition_that_deals_nothing_is_named(partition: str) -> None:
    assert f"{PARTITION} {partition!r}" in refusal(data={"partition": partition})


def test_the_built_in_task_has_images_for_so_many_clients() -> None:
    assert DIGITS in refusal(clients=135)
    assert RunConfig(name="trial", clients=134).clients == 134
    own = RunConfig.model_validate({"name": "trial", "clients": 135, "data": {"source": "own"}})
    assert own.clients == 135


def test_the_factored_wire_needs_the_loss_on_the_service() -> None:
    TrainingConfig(wire="factored")
    with pytest.raises(ValidationError, match=r"training\.wire: expected dense where"):
        TrainingConfig(wire="factored", loss="client")
