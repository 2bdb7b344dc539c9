"""`fednano demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo_command(
    clients: Annotated[int, typer.Option(min=1, max=64, help="Client processes.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Federated rounds.")] = 10,
    strategy: Annotated[str, typer.Option(help="fedavg, fednano or fednano-ef.")] = "fednano-ef",
    partition: Annotated[str, typer.Option(help="iid or dirichlet:ALPHA.")] = "dirichlet:0.5",
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
