"""The `fednano` command. Each part brings its own commands; heavy imports wait until they run."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fednano import __version__
from fednano.client.cli import ask_command, client_app
from fednano.coordinator.cli import coordinator
from fednano.lab.cli import bench_command, demo_command, experiment_command
from fednano.llm.cli import llm
from fednano.models.account_cli import account_command
from fednano.models.cli import export_command, split_command
from fednano.runs_cli import runs_app, tokens_app
from fednano.wire.errors import FedNanoError, InvalidRequest

app = typer.Typer(
    name="fednano",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Federated tuning of multimodal LLMs by split inference.",
)
app.command("demo")(demo_command)
app.command("llm")(llm)
app.command("coordinator")(coordinator)
app.add_typer(client_app, name="client")
app.add_typer(runs_app, name="runs")
app.add_typer(tokens_app, name="tokens")
app.command("split")(split_command)
app.command("ask")(ask_command)
app.command("export")(export_command)
app.command("experiment")(experiment_command)
app.command("bench")(bench_command)
app.command("account")(account_command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Federated tuning of multimodal LLMs by split inference."""


def keep_freed_memory() -> None:
    """glibc returns a large block to the system when it is freed, and gets it again page by page, until
    it has seen one of that size freed (mallopt(3), "dynamic mmap threshold"). So it sees one of nearly
    the largest size that counts, whose pages nobody touches. Other allocators don't mind."""
    bytearray((32 << 20) - (1 << 16))


def main() -> None:
    """Exit status 0, 1 (failed) or 2 (bad usage or settings); no traceback for what a user can mend."""
    keep_freed_memory()
    try:
        app()
    except InvalidRequest as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except FedNanoError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(1)


if __name__ == "__main__":
    main()
