"""Runs that train other weights than NanoAdapters: what goes together, whom they let in, and what
they begin with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fednano.coordinator.strategies import first_adapter
from fednano.wire.errors import InvalidRequest, WrongModel
from fednano.wire.placements import Shapes, placement_of
from fednano.wire.run_config import RunConfig
from fednano.wire.tensor_pb2 import FP32, TensorSpec
from pydantic import ValidationError

from tests.coordinator.conftest import ADMIN, Running
from tests.coordinator.federation import Crowd, FakeClient, config_of

CONNECTOR: Shapes = (("connector.bias", (4,)), ("connector.weight", (4, 3)))
LAYERS: Shapes = (("lora.layers.0.q_proj", (4, 6)), ("lora.layers.0.v_proj", (2, 6)))
FEDAVG = {"strategy": {"name": "fedavg"}}


def placed(placement: str, **changes: Any) -> RunConfig:
    return config_of(placement=placement, **{**FEDAVG, **changes})


@pytest.mark.parametrize(
    ("placement", "changes", "told"),
    [
        ("encoder", {}, "Input should be 'nano-adapters', 'connector' or 'lora'"),
        ("connector", {"strategy": {}}, "strategy.name: expected another strategy, such as fedavg"),
        ("lora", {"strategy": {"name": "fednano"}}, "gradients of single samples"),
        ("lora", {"shadows": [{"name": "fednano-ef"}]}, "shadows.0: expected another strategy"),
        ("connector", {"strategy": {"name": "scaffold"}}, "controls are kept for NanoAdapters"),
        ("connector", {"strategy": {"name": "product"}}, "are no product B A, got product"),
        ("connector", {"strategy": {"name": "ffa"}}, "are no product B A, got ffa"),
        ("lora", {"strategy": {"name": "product"}}, "square"),
        ("lora", {"strategy": {"name": "flora"}}, "stack"),
        ("connector", {"training": {"wire": "factored"}}, "are no x + U W, got factored"),
        ("lora", {"training": {"wire": "factored"}}, "training.wire: expected dense beside"),
        ("lora", {"training": {"wire_dtype": "bf16"}}, "training.wire_dtype: expected fp32 beside"),
        ("lora", {"training": {"loss": "client"}}, "training.loss: expected server beside"),
    ],
)
def test_what_does_not_go_with_a_placement_is_refused_with_the_reason(
    placement: str, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        placed(placement, **changes)
    assert told in str(refused.value)


@pytest.mark.parametrize("placement", ["connector", "lora"])
def test_an_own_adapter_is_fine_tuned_and_not_mixed(placement: str) -> None:
    both = {"evaluation": {"own_data": "ends"}}
    assert placed(placement, personal="fine-tuned", **both).personal == "fine-tuned"
    with pytest.raises(ValidationError, match="personal: expected none or fine-tuned beside"):
        placed(placement, personal="feddpa-f", **both)


def test_every_placement_begins_with_the_checkpoint() -> None:
    connector = first_adapter(placed("connector"), 8, CONNECTOR)
    assert {name: tensor.shape for name, tensor in connector.items()} == dict(CONNECTOR)
    assert not any(tensor.any() for tensor in connector.values())
    lora, again, other = (first_adapter(placed("lora", seed=s), 8, LAYERS) for s in (0, 0, 1))
    for name, (outputs, inputs) in LAYERS:
        down = lora[f"{name}.down"]
        assert down.shape == (2, inputs)
        assert 0 < np.abs(down).max() <= inputs**-0.5
        assert np.array_equal(lora[f"{name}.up"], np.zeros((outputs, 2), np.float32))
        assert np.array_equal(down, again[f"{name}.down"])
        assert not np.array_equal(down, other[f"{name}.down"])
    assert first_adapter(placed("nano-adapters"), 8, ()).keys() >= {"text.down", "image.up"}


def test_tensors_say_by_their_names_where_they_go() -> None:
    assert placement_of(name for name, _ in CONNECTOR) == "connector"
    assert placement_of(name + ".up" for name, _ in LAYERS) == "lora"
    assert placement_of(["image.down", "image.up"]) == placement_of([]) == "nano-adapters"


def specs(weights: Shapes) -> list[TensorSpec]:
    return [TensorSpec(name=name, dtype=FP32, shape=shape) for name, shape in weights]


def joining(client: FakeClient, weights: Shapes) -> Callable[[], Any]:
    return lambda: client.join(weights=specs(weights))


def admit(client: FakeClient, weights: Shapes) -> None:
    """Once enrolment is open."""
    while not client.join(weights=specs(weights)).HasField("member"):
        time.sleep(0.05)


async def opened(coordinator: Running, placement: str, count: int = 3) -> list[FakeClient]:
    """Clients of a run with that placement; none has joined."""
    await coordinator.store.create_run(placed(placement, rounds=1), "test")
    return [FakeClient(coordinator.port, ADMIN, name, run="trial") for name in "abc"[:count]]


@pytest.mark.parametrize(
    ("placement", "weights", "got"),
    [
        ("connector", (("connector.bias", (5,)), CONNECTOR[1]), "connector.bias [5]"),
        ("connector", CONNECTOR[:1], "no more"),
        ("lora", LAYERS[::-1], "lora.layers.0.v_proj [2, 6]"),
    ],
)
async def test_a_member_with_other_weights_than_the_first_is_refused(
    coordinator: Running, placement: str, weights: Shapes, got: str
) -> None:
    first, second = await opened(coordinator, placement, 2)
    await asyncio.to_thread(admit, first, CONNECTOR + LAYERS)
    with pytest.raises(WrongModel, match="trains other weights: weights: expected") as refused:
        await asyncio.to_thread(joining(second, weights))
    (problem,) = refused.value.problems
    assert (problem.field, problem.got) == ("weights", got)
    assert (await coordinator.store.run("trial")).members == ("a",)
    for client in (first, second):
        client.close()


@pytest.mark.parametrize(
    ("placement", "told"), [("lora", "give --llm-half DIR"), ("connector", "start a newer one")]
)
async def test_who_has_not_what_a_placement_trains_waits_with_the_reason(
    coordinator: Running, placement: str, told: str
) -> None:
    (client,) = await opened(coordinator, placement, 1)
    other = LAYERS if placement == "connector" else CONNECTOR
    reply = await asyncio.to_thread(joining(client, other))
    assert told in reply.wait.reason
    assert (await coordinator.store.run("trial")).members == ()
    client.close()


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ((("image.down", (2, 3)),), "weights: expected connector.<name> or lora.<layer>"),
        ((("lora.q", (2, 3, 4)),), "weights.lora.q: expected at most 8 sizes, and 2 of a layer"),
        ((("connector.w", (0, 3)),), "weights.connector.w: expected at most 8 sizes"),
        ((CONNECTOR[0], CONNECTOR[0]), "weights: expected each name once"),
        ((("connector.w", (1 << 20, 1 << 20)),), "weights: expected at most"),
    ],
)
async def test_weights_that_no_run_could_train_are_refused(
    coordinator: Running, weights: Shapes, told: str
) -> None:
    (client,) = await opened(coordinator, "connector", 1)
    with pytest.raises(InvalidRequest) as refused:
        await asyncio.to_thread(joining(client, weights))
    assert told in str(refused.value)
    client.close()


@pytest.mark.parametrize("placement", ["connector", "lora"])
async def test_its_updates_are_merged_as_any_others(coordinator: Running, placement: str) -> None:
    clients = await opened(coordinator, placement)
    for client in clients:
        await asyncio.to_thread(admit, client, CONNECTOR + LAYERS)
        client.fisher = False
    with Crowd(clients) as crowd:
        await asyncio.to_thread(crowd.wait)
    first = await coordinator.store.adapter_of_round("trial", 0)
    config = placed(placement, rounds=1)
    weights = CONNECTOR if placement == "connector" else LAYERS
    wanted = first_adapter(config, 8, weights)
    assert {n: t.tobytes() for n, t in first.tensors.items()} == {
        n: t.tobytes() for n, t in wanted.items()
    }
    merged = (await coordinator.store.adapter_of_round("trial", 1)).tensors
    assert merged.keys() == wanted.keys()
    assert all(not np.array_equal(merged[name], wanted[name]) for name in wanted)
