"""Accuracy as rounds go by: by round, by what a client sent and received, by what it computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import fmean, stdev

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fednano.lab.experiment.results import Result, RoundFigures, Spent

_COLOURS = [
    colormaps["tab20"](n) for n in (*range(0, 20, 2), *range(1, 20, 2))
]  # strong, then pale
_DASHES = ("--", ":", "-.")
_MEGA = 1e6


def plot(results: Mapping[str, Sequence[Result]], title: str, path: Path) -> bool:
    """A PNG with a curve for each method, its band one standard deviation over seeds. False, and no
    file, where there is nothing to draw."""
    held = {method: found for method, found in results.items() if found}
    if not held:
        return False
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, sharey=True)
    ways: tuple[tuple[str, Callable[[Spent], float]], ...] = (
        ("round", lambda spent: 1.0),
        ("MB that a client sent and received", lambda spent: (spent.sent + spent.received) / _MEGA),
        ("CPU seconds of a client", lambda spent: spent.client_seconds),
    )
    for axes, (label, cost) in zip(panels, ways, strict=True):
        for number, (method, found) in enumerate(held.items()):
            _curve(axes, found, method, _COLOURS[number % len(_COLOURS)], cost)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=label == "round"))
    panels[0].set_ylabel("accuracy, exact match")
    figure.suptitle(title)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return True


def _curve(
    axes: Axes,
    results: Sequence[Result],
    method: str,
    colour: tuple[float, float, float, float],
    cost: Callable[[Spent], float],
) -> None:
    rounds = [result.figures.rounds for result in results]
    spent = [
        list(accumulate(cost(each.spent) * _rounds(run, i) for i, each in enumerate(run)))
        for run in rounds
    ]
    at = [index for index, each in enumerate(rounds[0]) if each.accuracy is not None]
    x = [fmean(costs[index] - costs[0] for costs in spent) for index in at]
    found = [[_accuracy(run[index]) for run in rounds] for index in at]
    y = [fmean(values) for values in found]
    band = [stdev(values) if len(values) > 1 else 0.0 for values in found]
    axes.plot(x, y, color=colour, label=method, marker="o", markersize=3, linewidth=1.4)
    low, high = ([m + sign * b for m, b in zip(y, band, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    for number, name in enumerate(rounds[0][-1].shadows):
        shadow = [
            fmean(run[index].shadows.get(name, y[k]) for run in rounds)
            for k, index in enumerate(at)
        ]
        label = f"{name}, shadow of {method}"
        axes.plot(x, shadow, color=colour, label=label, linestyle=_DASHES[number % 3], linewidth=1)


def _rounds(run: Sequence[RoundFigures], index: int) -> int:
    """How many rounds an entry stands for: a client alone is only scored at both ends."""
    return run[index].number - run[index - 1].number if index else 0


def _accuracy(each: RoundFigures) -> float:
    assert each.accuracy is not None, "scored in one seed and not in another"
    return each.accuracy
