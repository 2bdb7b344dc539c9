"""What a run may be asked to do, and how a bad wish is named."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from fednano.coordinator.cohorts import evaluation_seconds
from fednano.wire.run_config import RunConfig, StrategyConfig, StrategyName
from pydantic import ValidationError

DIGITS = "at most 134 for data.source digits (1077 training images, at least 8 each), got 135"
PARTITION = (
    "data.partition: expected iid, dirichlet:ALPHA or quantity:ALPHA with ALPHA above 0, at most"
    " 1000000, or feature:STRENGTH with STRENGTH from 0 to 1, got"
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
    "partition",
    [
        "dirichlet:0",
        "dirichlet:0.0",
        "dirichlet:",
        "dirichlet:1e9",
        "iid\n",
        "by-hand",
        "quantity:0",
        "quantity",
        "feature:1.01",
        "feature",
    ],
)
def test_a_partition_that_deals_nothing_is_named(partition: str) -> None:
    assert f"{PARTITION} {partition!r}" in refusal(data={"partition": partition})


def test_the_built_in_task_has_images_for_so_many_clients() -> None:
    assert DIGITS in refusal(clients=135)
    assert RunConfig(name="trial", clients=134).clients == 134
    scenes = "at most 125 for data.source scenes (1000 training images, at least 8 each), got 126"
    assert scenes in refusal(clients=126, data={"source": "scenes"})
    own = RunConfig.model_validate({"name": "trial", "clients": 135, "data": {"source": "own"}})
    assert own.clients == 135


def strategy(**values: Any) -> StrategyConfig:
    return StrategyConfig.model_validate(values)


def test_a_strategy_has_the_settings_that_are_its_own_and_their_defaults() -> None:
    assert strategy() == strategy(name="fednano-ef", fisher="scaled", damping=0.1)
    assert strategy(name="fedadam").momentum == 0.9
    assert strategy(name="fedadagrad").momentum is None
    assert strategy(name="trimmed-mean", trim=0.3).trim == 0.3


@pytest.mark.parametrize(
    ("values", "owners"),
    [
        ({"name": "product", "fisher": "raw"}, "fednano, fednano-ef"),
        ({"trim": 0.2}, "trimmed-mean"),
        ({"name": "krum", "selected": 2}, "multi-krum"),
        ({"name": "fedavg", "mu": 0.1}, "fedprox"),
        ({"name": "fedadagrad", "momentum": 0.5}, "fedavgm, fedadam, fedyogi"),
    ],
)
def test_the_setting_of_another_strategy_is_refused_by_its_name(
    values: dict[str, Any], owners: str
) -> None:
    field = list(values)[-1]
    expected = f"strategy.{field}: expected nothing for {values.get('name', 'fednano-ef')!r}"
    assert f"{expected}, as it is a setting of {owners} alone" in refusal(strategy=values)


@pytest.mark.parametrize(
    "values",
    [
        {"name": "trimmed-mean", "trim": 0.5},
        {"name": "krum", "byzantine": 0},
        {"name": "fedadam", "second_momentum": 1},
        {"name": "fedavgm", "momentum": -0.1},
        {"name": "fedprox", "mu": 0},
        {"name": ["fedavg"]},
    ],
)
def test_a_setting_out_of_its_bounds_is_named(values: dict[str, Any]) -> None:
    assert f"strategy.{list(values)[-1]}" in refusal(strategy=values)


@pytest.mark.parametrize(
    ("values", "least"),
    [
        ({"name": "median"}, 3),
        ({"name": "trimmed-mean"}, 5),
        ({"name": "trimmed-mean", "trim": 0.1}, 10),
        ({"name": "trimmed-mean", "trim": 0.34}, 3),
        ({"name": "krum"}, 5),
        ({"name": "krum", "byzantine": 2}, 7),
        ({"name": "multi-krum", "selected": 6}, 7),
    ],
)
def test_a_robust_strategy_wants_enough_updates_to_be_robust(
    values: dict[str, Any], least: int
) -> None:
    text = f"min_clients: expected at least {least} updates for strategy.name {values['name']}"
    assert text in refusal(strategy=values, clients=20, min_clients=least - 1)
    RunConfig.model_validate(
        {"name": "trial", "clients": 20, "min_clients": least, "strategy": values}
    )


@pytest.mark.parametrize("name", get_args(StrategyName))
def test_a_configuration_is_what_it_was_after_a_journey_as_json(name: str) -> None:
    config = strategy(name=name)
    assert StrategyConfig.model_validate_json(config.model_dump_json()) == config


def test_what_0_1_0_wrote_for_fedavg_is_still_read() -> None:
    assert strategy(name="fedavg", fisher="scaled", damping=0.1) == strategy(name="fedavg")


def test_a_name_that_is_null_is_the_default() -> None:
    assert strategy(name=None) == strategy(name="fednano-ef")


def test_an_unknown_name_is_what_is_refused() -> None:
    with pytest.raises(ValidationError) as caught:
        strategy(name="fednanoef", fisher="raw")
    assert [error["loc"] for error in caught.value.errors()] == [("name",)]


def test_what_a_strategy_does_not_have_is_left_out_of_what_is_stored_and_sent() -> None:
    assert strategy(name="fedavg").model_dump() == {"name": "fedavg"}
    assert strategy().model_dump() == {"name": "fednano-ef", "fisher": "scaled", "damping": 0.1}
    fields = RunConfig.model_json_schema(mode="serialization")["$defs"]["StrategyConfig"]
    assert {"name", "fisher", "trim"} <= fields["properties"].keys()


def test_krum_takes_as_many_clients_as_its_matrix_may_be_large() -> None:
    body = {"name": "big", "clients": 3000, "min_clients": 5, "data": {"source": "own"}}
    with pytest.raises(ValidationError, match=r"at most 2000 in a round for strategy\.name krum"):
        RunConfig.model_validate({**body, "strategy": {"name": "krum"}})
    RunConfig.model_validate({**body, "cohort": 50, "strategy": {"name": "krum"}})


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (
            {"adapter": {"ranks": [4, 16]}},
            "adapter.ranks: expected nothing for fednano-ef, which merges A and B element by"
            " element; product and flora merge what adapters of different ranks do",
        ),
        (
            {"strategy": {"name": "product"}, "adapter": {"rank": 8, "ranks": [4, 16]}},
            "adapter.ranks: expected at most adapter.rank (8), got 16",
        ),
        (
            {"strategy": {"name": "product"}, "adapter": {"ranks": [4, 0]}},
            "adapter.ranks.1",
        ),
        (
            {"strategy": {"name": "flora", "max_rank": 8}},
            "strategy.max_rank: expected 0, or adapter.rank (16) at least, got 8",
        ),
        (
            {"strategy": {"name": "flora"}, "training": {"wire": "factored"}},
            "training.wire: expected dense for flora, got factored, which saves nothing",
        ),
        (
            {"strategy": {"name": "flora"}, "shadows": [{"name": "fedavg"}]},
            "shadows.0: expected none where flora leads, whose clients send what they add",
        ),
        (
            {"strategy": {"name": "product"}, "adapter": {"ranks": [4]}, "shadows": [{}]},
            "adapter.ranks: expected nothing for fednano-ef",
        ),
        ({"strategy": {"name": "scaffold", "mu": 0.1}}, "as it is a setting of fedprox alone"),
    ],
)
def test_what_does_not_go_with_ranks_or_controls_is_refused_with_the_reason(
    values: dict[str, Any], reason: str
) -> None:
    assert reason in refusal(**values)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"evaluation": {"own_data": "never"}}, "evaluation.own_data: expected ends or always for"),
        ({"strategy": {"name": "flora"}}, "personal: expected none with flora, where a client"),
        (
            {"strategy": {"name": "product"}, "adapter": {"ranks": [4]}},
            "personal: expected none with adapter.ranks",
        ),
    ],
)
def test_what_does_not_go_with_adapters_of_clients_own_is_refused(
    values: dict[str, Any], reason: str
) -> None:
    assert reason in refusal(personal="fine-tuned", **values)


def test_who_trains_once_more_has_the_time_of_a_round_for_it() -> None:
    body = {"name": "t", "rounds": 3, "round_seconds": 50, "evaluation": {"seconds": 20}}
    plain = RunConfig.model_validate(body)
    personal = RunConfig.model_validate(
        {**body, "personal": "feddpa-f", "shadows": [{"name": "median"}], "min_clients": 3}
    )
    assert [evaluation_seconds(plain, number) for number in (2, 3)] == [20, 20]
    assert [evaluation_seconds(personal, number) for number in (2, 3)] == [40, 90]


def test_ranks_are_dealt_out_in_turn() -> None:
    body = {"name": "t", "strategy": {"name": "product"}, "adapter": {"rank": 8, "ranks": [2, 8]}}
    adapter = RunConfig.model_validate(body).adapter
    assert [adapter.rank_of(member) for member in range(5)] == [2, 8, 2, 8, 2]
    assert RunConfig(name="t").adapter.rank_of(3) == 16
