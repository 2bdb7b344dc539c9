"""A federation by the factored wire learns what it learns by the dense one, with fewer bytes."""

from __future__ import annotations

import numpy as np
import pytest
from fednano.lab.federation import Federation

from tests.lab.conftest import adapter_of, small_run, state_of, wait_for

pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]
EPOCHS = 3
MEMBERS = ("client-1", "client-2", "evaluator")


def finish(federation: Federation, wire: str) -> None:
    """A run of one round by that wire, to its end."""
    training = {"wire": wire, "epochs": EPOCHS, "learning_rate": 1e-3}
    federation.create_run(small_run(wire, rounds=1, training=training, adapter={"rank": 4}))
    federation.start_client("evaluator", wire, "evaluator", once="true")
    for name in MEMBERS[:2]:
        federation.start_client(name, wire, once="true")
    wait_for(lambda: state_of(federation, wire) in ("finished", "failed"), f"run {wire}", 240)
    assert state_of(federation, wire) == "finished"
    wait_for(
        lambda: all(federation.processes.status(name) is not None for name in MEMBERS),
        "the end of the clients",
    )


def merged(federation: Federation, run: str) -> dict[str, np.ndarray]:
    found = adapter_of(federation, run, 1)
    return {name: np.frombuffer(data, "<f4") for name, data in found.items()}


def test_both_wires_end_with_the_same_adapters(federation: Federation) -> None:
    for wire in ("dense", "factored"):
        finish(federation, wire)
    wanted, found = merged(federation, "dense"), merged(federation, "factored")
    for name, tensor in wanted.items():
        assert np.linalg.norm(found[name] - tensor) < 1e-3 * np.linalg.norm(tensor), name
    with federation.rest() as api:
        metrics = [
            api.get(f"runs/{run}/rounds/1").json()["metrics"] for run in ("dense", "factored")
        ]
        totals = {
            run: api.get(f"runs/{run}/ledger").json()["totals"] for run in ("dense", "factored")
        }
    assert metrics[0]["accuracy"] == metrics[1]["accuracy"]
    assert metrics[0]["loss"] == pytest.approx(metrics[1]["loss"], rel=1e-4)
    assert totals["factored"]["sent"]["bases"] > 0
    assert "bases" not in totals["dense"]["sent"]
    assert totals["factored"]["sent"]["embeddings"] < totals["dense"]["sent"]["embeddings"] / 4
    assert (
        totals["factored"]["received"]["gradients"] < totals["dense"]["received"]["gradients"] / 4
    )
    for name in MEMBERS:
        assert "Traceback" not in (federation.directory / f"{name}.log").read_text()
