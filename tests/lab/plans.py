"""Plans, small ones, and results for them that nobody measured."""

from __future__ import annotations

from typing import Any

from fednano.lab.experiment.plan import Cell, Plan
from fednano.lab.experiment.results import Figures, Result, RoundFigures, Spent

SMALL = {"rounds": 2, "data": {"limit": 24, "evaluation_limit": 4}}


def plan_of(**changes: Any) -> Plan:
    return Plan.model_validate({"name": "small", "methods": ["fedavg"], "run": SMALL, **changes})


def cells(**changes: Any) -> list[Cell]:
    return plan_of(**{"seeds": [0], "clients": [2], **changes}).cells()


def result(cell: Cell, accuracy: float, model: str = "m") -> Result:
    rounds = [
        RoundFigures(n, accuracy - 0.1 * (2 - n), 1.0, spent=Spent(10**6, 10**6, 1.0, 2.0))
        for n in range(3)
    ]
    figures = Figures(rounds, [accuracy], [], [], "d", 60.0)
    return Result(cell.key, cell.method.label, cell.config.seed, cell.setting, model, figures)
