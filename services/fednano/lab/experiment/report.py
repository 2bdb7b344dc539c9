"""report.md: tables over seeds, a paired test behind every "better", and plots beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fednano.lab.experiment.plan import Cell, Plan, Table
from fednano.lab.experiment.plots import plot
from fednano.lab.experiment.results import Figures, Result
from fednano.lab.experiment.statistics import Paired, Spread, holm

REPORT = "report.md"
_MEGA = 1e6
_MERGED = "The merged adapter, where clients have one of their own beside it: test set; own data"
_COSTS = "What a round costs a client: MB up / down, CPU seconds of its own / of the LLM"
Setting = tuple[str | int, ...]


@dataclass(frozen=True)
class Found:
    """A table's results that are there: by setting and method, one for each seed."""

    table: Table
    axes: tuple[str, ...]  # of the settings, those in which they differ
    results: Mapping[tuple[Setting, str], Sequence[Result]]
    missing: int

    @classmethod
    def of(cls, plan: Plan, table: Table, results: Mapping[str, Result]) -> Found:
        cells = list(plan.cells_of(table))
        found: dict[tuple[Setting, str], list[Result]] = {}
        for cell in cells:
            held = found.setdefault((_setting(cell), cell.method.label), [])
            if cell.key in results:
                held.append(results[cell.key])
        differing = tuple(
            axis for axis in cells[0].setting if len({c.setting[axis] for c in cells}) > 1
        )
        missing = sum(cell.key not in results for cell in cells)
        return cls(table, differing, found, missing)

    @property
    def settings(self) -> list[Setting]:
        return list(dict.fromkeys(setting for setting, _ in self.results))

    @property
    def methods(self) -> list[str]:
        return [method.label for method in self.table.methods]

    def named(self, setting: Setting) -> str:
        """By what tells it from the others."""
        told = [
            f"{axis} {value}"
            for axis, value in zip(AXES, setting, strict=True)
            if axis in self.axes
        ]
        return ", ".join(told) or "all"


AXES = ("task", "partition", "clients", "rank", "adapters", "attack")


def _setting(cell: Cell) -> Setting:
    return tuple(cell.setting[axis] for axis in AXES)


def write_report(plan: Plan, results: Mapping[str, Result], folder: Path) -> Path:
    """The report's path; its plots lie in `plots` beside it."""
    lines = [f"# {plan.name}", ""]
    if plan.about:
        lines += [plan.about, ""]
    lines += [*_preamble(plan, results), ""]
    for number, table in enumerate(plan.grids, 1):
        found = Found.of(plan, table, results)
        lines += [f"## {table.name}", "", *_told(table, plan)]
        if found.missing:
            lines += [f"**{found.missing} cells are missing**; the table holds what is there.", ""]
        lines += _table(found, "Accuracy at the end", _accuracy)
        lines += _table(found, "The task's own measures at the end", _measures)
        lines += _table(found, "Accuracy on the clients' own data that was held back", _own)
        lines += _table(found, _MERGED, _shared)
        lines += _table(found, "Shadows, at the end (see docs/strategies.md)", _shadows)
        lines += _tests(found)
        lines += _table(found, _COSTS, _cost)
        for setting in found.settings:
            name = f"{number}-{_slug(found.named(setting))}.png"
            drawn = {method: found.results.get((setting, method), ()) for method in found.methods}
            if plot(drawn, found.named(setting), folder / "plots" / name):
                lines += [f"![{found.named(setting)}](plots/{name})", ""]
    path = folder / REPORT
    path.write_text("\n".join(lines).rstrip() + "\n")
    return path


def _told(table: Table, plan: Plan) -> Iterator[str]:
    """In what its runs differ from the plan's."""
    shared = dict(_flat(plan.run))
    changed = [(name, value) for name, value in _flat(table.run) if shared.get(name) != value]
    if changed:
        yield f"Here: {', '.join(f'{name} {value}' for name, value in changed)}."
        yield ""


def _flat(run: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their path: `training.epochs`."""
    for name, value in run.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _preamble(plan: Plan, results: Mapping[str, Result]) -> Iterator[str]:
    cells = plan.cells()
    done = [results[cell.key] for cell in cells if cell.key in results]
    seconds = sum(result.figures.seconds for result in done)
    yield (
        f"{len(done)} of {len(cells)} cells, {seconds / 60:.0f} minutes of one process in all. Scored"
        f" on the {plan.split} split by exact match of generated answers; mean ± standard deviation"
        " over seeds."
    )


def _table(found: Found, title: str, shown: Callable[[Sequence[Result]], str]) -> Iterator[str]:
    """Methods by settings, or, where these are more, the other way round; nothing where there is
    nothing to show."""
    rows = {m: [shown(found.results[s, m]) for s in found.settings] for m in found.methods}
    rows = {method: row for method, row in rows.items() if any(row)}
    if not rows:
        return
    names = [found.named(setting) for setting in found.settings]
    yield f"### {title}"
    yield ""
    if len(names) > len(found.methods):
        turned = list(zip(*rows.values(), strict=True))
        yield from _rows([", ".join(found.axes), *rows], names, turned)
    else:
        yield from _rows(["method", *names], list(rows), list(rows.values()))
    yield ""


def _rows(
    head: Sequence[str], names: Sequence[str], rows: Sequence[Sequence[str]]
) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + " --- |" * len(head)
    for name, row in zip(names, rows, strict=True):
        if any(row):
            yield f"| {name} | {' | '.join(row)} |"


def _spread(results: Sequence[Result], figure: Callable[[Figures], Sequence[float]]) -> str:
    values = [fmean(found) for result in results if (found := figure(result.figures))]
    return str(Spread.of(values)) if values else ""


def _accuracy(results: Sequence[Result]) -> str:
    return _spread(results, lambda figures: [figures.accuracy])


def _measures(results: Sequence[Result]) -> str:
    ends = [result.figures.rounds[-1].measures for result in results]
    names = [name for name in (ends[0] if ends else ()) if not name.startswith("accuracy.")]
    return "; ".join(f"{name} {Spread.of([end[name] for end in ends])}" for name in names)


def _own(results: Sequence[Result]) -> str:
    return _spread(results, lambda figures: figures.own)


def _shared(results: Sequence[Result]) -> str:
    found = [result for result in results if result.figures.own_shared]
    if not found:
        return ""
    own = _spread(found, lambda figures: figures.own_shared)
    return f"{_spread(found, lambda figures: [figures.merged])}; {own}"


def _shadows(results: Sequence[Result]) -> str:
    names = list(results[0].figures.rounds[-1].shadows) if results else []
    ends = [result.figures.rounds[-1].shadows for result in results]
    return "; ".join(f"{name} {Spread.of([end[name] for end in ends])}" for name in names)


def _cost(results: Sequence[Result]) -> str:
    spent = [r.spent for result in results for r in result.figures.rounds if r.spent.client_seconds]
    if not spent:
        return ""
    up, down = fmean(s.sent for s in spent) / _MEGA, fmean(s.received for s in spent) / _MEGA
    own, llm = fmean(s.client_seconds for s in spent), fmean(s.llm_seconds for s in spent)
    return f"{up:.2f} / {down:.2f}, {own:.2f} / {llm:.2f}"


def _tests(found: Found) -> Iterator[str]:
    """Each method less the baseline, by seed: over the settings that both have, or in each."""
    table = found.table
    if not table.baseline:
        return
    apart = table.tests == "apart" and len(found.settings) > 1
    among = [[one] for one in found.settings] if apart else [found.settings]
    compared = [
        (method, found.named(settings[0]), what, paired)
        for what, figure in (("test", _of_test), ("own data", _of_own))
        for method in found.methods
        if method != table.baseline
        for settings in among
        if (paired := _paired(found, settings, method, figure)) is not None
    ]
    if not compared:
        return
    yield f"### Against {table.baseline}"
    yield ""
    mean = "" if apart or len(found.settings) == 1 else "; the mean over the settings"
    yield (
        f"A pair is a seed: both methods have its data and start in common{mean}. Student's paired"
        " t-test, two-sided; p adjusted by Holm's method for all rows of this table."
    )
    yield ""
    adjusted = holm([paired.p for *_, paired in compared])
    head = ["method", *(["setting"] if apart else []), "on", "difference", "95 % interval", "pairs"]
    rows = [
        [*([named] if apart else []), what, *_told_pairs(paired, p)]
        for (_, named, what, paired), p in zip(compared, adjusted, strict=True)
    ]
    yield from _rows([*head, "p", "p adjusted"], [method for method, *_ in compared], rows)
    yield ""


def _told_pairs(paired: Paired, adjusted: float) -> list[str]:
    return [
        f"{paired.difference:+.4f}",
        f"{paired.low:+.4f} to {paired.high:+.4f}",
        str(paired.pairs),
        f"{paired.p:.3f}",
        f"{adjusted:.3f}" + (" **" if adjusted < 0.05 else ""),
    ]


def _of_test(figures: Figures) -> float:
    return figures.accuracy


def _of_own(figures: Figures) -> float:
    return fmean(figures.own)


def _paired(
    found: Found, settings: Sequence[Setting], method: str, figure: Callable[[Figures], float]
) -> Paired | None:
    """The method less the baseline, by seed; over several settings, their mean."""
    both: dict[int, list[tuple[float, float]]] = {}
    for setting in settings:
        others = {r.seed: r for r in found.results[setting, found.table.baseline]}
        for result in found.results[setting, method]:
            if result.seed in others:
                pair = figure(result.figures), figure(others[result.seed].figures)
                both.setdefault(result.seed, []).append(pair)
    whole = max(map(len, both.values()), default=0)
    full = [pairs for pairs in both.values() if len(pairs) == whole]  # else it is another mean
    return Paired.of(
        [fmean(one for one, _ in pairs) for pairs in full],
        [fmean(other for _, other in pairs) for pairs in full],
    )


def _slug(text: str) -> str:
    return "".join(char if char.isalnum() or char in ".-" else "-" for char in text)
