"""All cells of a plan, several at a time, each in its process; what is done is not done again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fednano.lab.experiment.cell import Bench, Solo
from fednano.lab.experiment.plan import Cell, Plan
from fednano.lab.experiment.report import write_report
from fednano.lab.experiment.results import Result, ResultsFile
from fednano.lab.federation import TINY_MODEL
from fednano.models.checkpoint import read_record
from fednano.models.split import split
from fednano.wire.errors import FedNanoError

RESULTS = "results.jsonl"
_LOOK = 0.3  # seconds between two looks at what workers say


class Interrupted(BaseException):
    """A signal asked for an end."""


class CellFailed(FedNanoError):
    """A cell ended with an error; the sentence says which, and why."""


@dataclass(frozen=True)
class Experiment:
    """A plan, and where its results lie."""

    plan: Plan
    folder: Path
    workers: int
    tables: Sequence[str] = ()
    """The names of those that are run; none: all. The report has every table."""

    def run(self, console: Console) -> int:
        """Returns the exit status: 0 where every cell is done, 1 where one failed, 130 after a
        signal."""
        cells = self.plan.cells_in(self.tables)
        self.folder.mkdir(parents=True, exist_ok=True)
        with _signals():
            try:
                return self._run(cells, console)
            except Interrupted as signalled:
                console.print(f"\n{signalled}: what is done is kept; the same command goes on")
                return 130

    def _run(self, cells: Sequence[Cell], console: Console) -> int:
        with tempfile.TemporaryDirectory(prefix="fednano-experiment-") as directory:
            halves = Path(directory)
            with console.status("cutting the model in two"):
                split(Path(self.plan.model) if self.plan.model else TINY_MODEL, halves)
            model = read_record(halves / "llm", "llm").fingerprint
            file = ResultsFile(self.folder / RESULTS)
            known = file.read(model)
            file.mend()
            left = [cell for cell in cells if cell.key not in known]
            left.sort(key=lambda cell: cell.config.seed)  # a whole picture early, then more seeds
            there = len(cells) - len(left)
            told = f"{there} of {len(cells)} cells are there already"
            console.print(told if there else f"{len(left)} cells", highlight=False)
            failed = 0
            try:
                for result in self._results(left, halves, model, console):
                    if isinstance(result, Result):
                        file.append([result])
                    else:
                        failed += 1
                        console.print(f"failed: {result}", highlight=False, soft_wrap=True)
            finally:
                self.report(console, model)
        return 1 if failed else 0

    def report(self, console: Console, model: str = "") -> None:
        """Tables and plots of what is there, of the model that is named, or came last."""
        file = ResultsFile(self.folder / RESULTS)
        found = file.read(model or file.last_model())
        self.folder.mkdir(parents=True, exist_ok=True)
        written = write_report(self.plan, found, self.folder)
        console.print(f"tables and plots: {written}", highlight=False, soft_wrap=True)

    def _results(
        self, cells: Sequence[Cell], halves: Path, model: str, console: Console
    ) -> Iterator[Result | CellFailed]:
        """As they come. Raises CellFailed where the processes themselves fail."""
        if not cells:
            return
        context = multiprocessing.get_context("spawn")
        said: Any = context.Queue()
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        pool = ProcessPoolExecutor(min(self.workers, len(cells)), context, _prepare, (halves, said))
        try:
            with _progress(console, len(cells)) as (advance, say):
                running = {pool.submit(_run, cell): cell for cell in cells}
                while running:
                    done, _ = wait(running, _LOOK, FIRST_COMPLETED)
                    while not said.empty():
                        say(*said.get())
                    for future in done:
                        cell = running.pop(future)
                        yield _result(future, cell, model)
                        advance(cell.key)
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            said.close()


def _result(future: Future[Any], cell: Cell, model: str) -> Result | CellFailed:
    """One cell's failure is no other's."""
    try:
        figures = future.result()
    except BrokenProcessPool:
        raise CellFailed("a process of the experiment has ended; was memory short?") from None
    except Exception as error:
        return CellFailed(f"{described(cell)}: {type(error).__name__}: {error}")
    return Result(cell.key, cell.method.label, cell.config.seed, cell.setting, model, figures)


def cores() -> int:
    """That this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def described(cell: Cell) -> str:
    return ", ".join(
        [
            cell.method.label,
            *(f"{k} {v}" for k, v in cell.setting.items()),
            f"seed {cell.config.seed}",
        ]
    )


_bench: Bench | None = None
_said: Any = None


def _prepare(halves: Path, said: Any) -> None:
    """In a worker: the model is loaded once. Signals are the parent's business."""
    global _bench, _said
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _bench, _said = Bench.load(halves), said


def _run(cell: Cell) -> Any:
    assert _bench is not None, "a worker that was not prepared"

    def progress(text: str) -> None:
        _said.put((cell.key, f"{described(cell)}: {text}"))

    return Solo(_bench, cell, progress).run()


@contextmanager
def _progress(
    console: Console, cells: int
) -> Iterator[tuple[Callable[[str], None], Callable[[str, str], None]]]:
    """`advance(key)` when a cell is done, `say(key, text)` of one that runs."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as shown:
        whole = shown.add_task("cells", total=cells)
        lines: dict[str, Any] = {}

        def say(key: str, text: str) -> None:
            if key not in lines:
                lines[key] = shown.add_task(text, total=None)
            shown.update(lines[key], description=text)

        def advance(key: str) -> None:
            if key in lines:
                shown.remove_task(lines.pop(key))
            shown.advance(whole)

        yield advance, say


@contextmanager
def _signals() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise Interrupted(signal.Signals(number).name)

    before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
