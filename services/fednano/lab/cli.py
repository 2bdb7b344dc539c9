"""`fednano demo`, `fednano bench` and `fednano experiment`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

FLOWER_VENV = Path("~/.cache/fednano/flower")


def demo_command(
    clients: Annotated[int, typer.Option(min=1, max=64, help="Client processes.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Federated rounds.")] = 10,
    strategy: Annotated[
        str, typer.Option(help="fedavg, fednano, fednano-ef or another of docs/strategies.md.")
    ] = "fednano-ef",
    partition: Annotated[
        str, typer.Option(help="iid, dirichlet:ALPHA, quantity:ALPHA or feature:STRENGTH.")
    ] = "dirichlet:0.5",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    keep: Annotated[bool, typer.Option("--keep", help="Go on serving when it is done.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Write all figures here.")
    ] = None,
) -> None:
    """A whole federation on this machine: real services, a small real model, real handwriting."""
    from fednano.lab.demo import Demo

    demo = Demo(clients, rounds, strategy, partition, seed)
    raise typer.Exit(demo.run(keep, json_file))


def bench_command(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="Which.")] = None,
    show_list: Annotated[bool, typer.Option("--list", help="Show the benches and end.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Smaller sizes; every row states its own.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Write all figures here.")
    ] = None,
    flower_venv: Annotated[
        Path, typer.Option(help="Flower's own environment; made where it is missing.")
    ] = FLOWER_VENV,
) -> None:
    """Measure speed and memory as ratios, side by side; exit status 1 where a reach is missed."""
    from fednano.lab.bench.run import list_benches, run_benches

    if show_list:
        list_benches()
        return
    raise typer.Exit(run_benches(names or [], quick, json_file, flower_venv.expanduser()))


def experiment_command(
    plan: Annotated[
        Path,
        typer.Argument(metavar="PLAN", dir_okay=False, help="A YAML file: docs/experiments.md."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False, help="Directory of results, tables, plots.  [default: its name]"
        ),
    ] = None,
    table: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Run only its cells; may be repeated."),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(min=0, help="Cells at a time, a process of one thread each; 0: a core each."),
    ] = 0,
    show_list: Annotated[bool, typer.Option("--list", help="Show the cells and end.")] = False,
    only_report: Annotated[
        bool, typer.Option("--report", help="Only write tables and plots of what is there.")
    ] = False,
) -> None:
    """Compare methods: many federations, in one process each; tables, plots and tests over seeds.

    What is done is kept, a line of JSON for each cell: after Ctrl-C the same command goes on.
    """
    from rich.console import Console

    from fednano.lab.experiment.plan import Plan
    from fednano.lab.experiment.run import Experiment, cores, described

    read, console = Plan.read(plan), Console()
    if show_list:
        for cell in read.cells_in(table or ()):
            console.print(f"{cell.key}  {described(cell)}", highlight=False, soft_wrap=True)
        return
    experiment = Experiment(read, out or Path(read.name), workers or cores(), table or ())
    if only_report:
        experiment.report(console)
        return
    raise typer.Exit(experiment.run(console))
