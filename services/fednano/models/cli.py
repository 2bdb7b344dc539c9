"""`fednano split` and `fednano export`: what works on checkpoints."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fednano.models.checkpoint import Origin, fingerprint
from fednano.wire.errors import Conflict, Problem, WrongModel
from fednano.wire.placements import placement_of

AsJson = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]


def split_command(
    model_dir: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="A LLaVA checkpoint's directory.")
    ],
    out: Annotated[Path, typer.Option(help="Where edge/ and llm/ are written.")],
    with_embeddings: Annotated[
        bool,
        typer.Option(
            "--with-embeddings",
            help="Put the embedding table into edge/ too; else clients ask for the rows they need.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Cut a checkpoint into the client's half and the LLM."""
    from fednano.models.split import split

    console = Console(stderr=True)
    with console.status(f"splitting {model_dir}"):
        report = split(model_dir, out, with_embeddings)
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
    else:
        _show(asdict(report), out)


def _show(report: dict[str, dict[str, Any]], out: Path) -> None:
    table = Table("half", "parameters", "share", "bytes", "directory", "opened by")
    total = sum(half["parameters"] for half in report.values())
    for name, half in report.items():
        table.add_row(
            name,
            f"{half['parameters']:,}",
            f"{half['parameters'] / total:.1%}",
            f"{half['bytes']:,}",
            str(out / name),
            half["loader"],
        )
    console = Console()
    console.print(table)
    console.print(f"fingerprint {report['edge']['fingerprint']}", highlight=False)


def load_adapter(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors, fp32, and the metadata of a file as REST serves it."""
    import torch
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        return {n: file.get_tensor(n).to(torch.float32) for n in file.keys()}, metadata  # noqa: SIM118


def export_command(
    run: Annotated[str, typer.Option(help="The run's name.")],
    model: Annotated[
        Path,
        typer.Option(exists=True, file_okay=False, help="The stock checkpoint that was split."),
    ],
    out: Annotated[Path, typer.Option(help="Where the PEFT adapter is written.")],
    round_number: Annotated[
        int | None, typer.Option("--round", min=0, help="Round. [default: the best one]")
    ] = None,
    url: Annotated[str | None, typer.Option(help="The coordinator [env: FEDNANO_URL].")] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the bearer token [env: FEDNANO_TOKEN_FILE].")
    ] = None,
    ca: Annotated[Path | None, typer.Option(help="CA certificate [env: FEDNANO_CA].")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Send the token in the clear beyond this machine.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a round's adapters as a PEFT LoRA adapter for the unmodified stock model."""
    from fednano.rest_client import run_path
    from fednano.runs_cli import session

    with session(url, token_file, ca, insecure) as client:
        record = client.get(run_path(run))
        number = _chosen_round(record, round_number)
        body = client.download(f"{run_path(run)}/rounds/{number}/adapter")
    digest = fingerprint(model)
    _check_model(digest, record)
    _export(body, model, out, Origin(run, number, digest))
    if as_json:
        typer.echo(json.dumps({"run": run, "round": number, "out": str(out)}))
    else:
        typer.echo(f"run {run}, round {number}: PEFT adapter for {model} written to {out}")


def _chosen_round(record: dict[str, Any], wanted: int | None) -> int:
    if wanted is not None:
        return wanted
    best = record["best_round"] if record["best_round"] is not None else record["last_round"]
    if best is None:
        raise Conflict(f"run {record['name']} has no finished round yet")
    return int(best)


def _check_model(found: str, record: dict[str, Any]) -> None:
    """Raises WrongModel where the run's members hold halves of another checkpoint."""
    wanted = record["fingerprint"]
    if wanted and wanted != found:
        problem = Problem("--model fingerprint", wanted, found)
        raise WrongModel(f"the run tuned another checkpoint: {problem}", problem)


def _export(body: bytes, model: Path, out: Path, origin: Origin) -> None:
    from fednano.models.export import export_peft
    from fednano.models.export_weights import export_connector, export_lora
    from fednano.models.language_model import LowRank

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "adapter.safetensors"
        path.write_bytes(body)
        tensors, metadata = load_adapter(path)
    scale, where = float(metadata["scale"]), placement_of(tensors)
    if where == "lora":
        export_lora(model, tensors, scale, out, origin)
    elif where == "connector":
        export_connector(model, tensors, out, origin)
    else:
        names = sorted({name.partition(".")[0] for name in tensors})
        pairs = {n: LowRank(tensors[f"{n}.down"], tensors[f"{n}.up"], scale) for n in names}
        export_peft(model, pairs, out, origin)
