"""What an experiment found: the file that keeps it, the tests over seeds, the report."""

from __future__ import annotations

from pathlib import Path

import pytest
from fednano.lab.experiment.plan import Plan
from fednano.lab.experiment.report import write_report
from fednano.lab.experiment.results import ResultsFile
from fednano.lab.experiment.run import RESULTS
from fednano.lab.experiment.statistics import Paired, Spread, holm
from fednano.wire.errors import InvalidRequest
from scipy.stats import ttest_rel

from tests.lab.plans import cells, plan_of, result

DOCS = Path(__file__).parents[2] / "docs"


def test_the_paired_test_is_student_s() -> None:
    a, b = [0.90, 0.91, 0.89, 0.93, 0.92], [0.88, 0.90, 0.90, 0.90, 0.91]
    found = Paired.of(a, b)
    assert found is not None
    t, p = ttest_rel(a, b)
    assert found.difference == pytest.approx(0.012)
    assert found.p == pytest.approx(p)
    margin = 2.776445 * 0.012 / t  # the quantile of four degrees of freedom, from a table
    assert (found.low, found.high) == pytest.approx((0.012 - margin, 0.012 + margin))
    assert Paired.of(a[:2], b[:2]) is None


def test_holm_adjusts_for_the_number_of_tests() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path / RESULTS)
    (cell,) = cells()
    file.append([result(cell, 0.8)])
    whole = file.path.read_text()
    file.path.write_text(whole + whole[:40])
    assert file.read() == {cell.key: result(cell, 0.8)}
    file.mend()
    assert file.path.read_text() == whole


def test_what_is_no_result_is_told_with_its_line(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path / RESULTS)
    file.path.write_text('{"key": 1}\n')
    with pytest.raises(InvalidRequest, match="line 1: expected a result of fednano experiment"):
        file.read()


def test_the_report_has_means_spreads_tests_and_plots(tmp_path: Path) -> None:
    plan = plan_of(
        methods=["fedavg", "median"], clients=[4, 5], seeds=[0, 1, 2, 3], baseline="fedavg"
    )
    found = {}
    for cell in plan.cells():
        better = 0.05 + 0.001 * cell.config.seed if cell.method.label == "median" else 0.0
        found[cell.key] = result(cell, 0.8 + 0.01 * cell.config.seed + better)
    missing = next(c.key for c in plan.cells() if c.config.clients == 5 and c.config.seed == 3)
    del found[missing]
    text = write_report(plan, found, tmp_path).read_text()
    assert "15 of 16 cells" in text
    assert "1 cells are missing" in text
    assert "| method | clients 4 | clients 5 |" in text
    assert "| fedavg | 0.815 ± 0.013 | 0.810 ± 0.010 |" in text
    assert "| median | test | +0.0510 | +0.0485 to +0.0535 | 3 |" in text  # of whole seeds
    assert "1.00 / 1.00, 1.00 / 2.00" in text
    plots = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert plots == ["1-clients-4.png", "1-clients-5.png"]


def test_each_setting_may_be_tested_by_itself(tmp_path: Path) -> None:
    plan = plan_of(
        methods=["fedavg", "median"],
        clients=[4, 5],
        seeds=[0, 1, 2],
        baseline="fedavg",
        tests="apart",
    )
    found = {}
    for cell in plan.cells():
        worse = 0.1 if (cell.method.label, cell.config.clients) == ("median", 5) else 0.0
        found[cell.key] = result(cell, 0.8 + 0.01 * cell.config.seed - worse)
    text = write_report(plan, found, tmp_path).read_text()
    assert "| median | clients 4 | test | +0.0000 |" in text
    assert "| median | clients 5 | test | -0.1000 |" in text


def test_the_tables_of_the_results_page_are_those_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fednano.lab.experiment.report.plot", lambda *drawn: False)
    rows = set()
    for plan, results in (("results", "results.jsonl"), ("tuning", "tuning/results.jsonl")):
        file = ResultsFile(DOCS / "results" / results)
        found = file.read(file.last_model())
        text = write_report(Plan.read(DOCS / f"plans/{plan}.yaml"), found, tmp_path).read_text()
        assert "cells are missing" not in text
        rows |= {line for line in text.splitlines() if line.startswith("|")}
    shown = [
        line for line in (DOCS / "results.md").read_text().splitlines() if line.startswith("|")
    ]
    assert len(shown) > 150
    assert [line for line in shown if line not in rows] == []


def test_a_single_seed_has_no_spread() -> None:
    assert str(Spread.of([0.5])) == "0.500"
