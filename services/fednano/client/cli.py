"""`fednano client run|check|purge` and `fednano ask`. Torch is imported when a command runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fednano.wire.errors import InvalidRequest

client_app = typer.Typer(
    no_args_is_help=True,
    help="A site's own process beside its data. Every option can also be given as "
    "FEDNANO_CLIENT_<OPTION>; FEDNANO_CLIENT_TOKEN_FILE names a file that holds the token.",
)

Coordinator = Annotated[str | None, typer.Option(help="host:port of the coordinator's gRPC.")]
Llm = Annotated[str | None, typer.Option(help="host:port of the LLM service.")]
TokenFile = Annotated[Path | None, typer.Option(help="File with a token of role site.")]
Edge = Annotated[Path | None, typer.Option(help="The edge half that `fednano split` wrote.")]
ClientId = Annotated[str | None, typer.Option("--id", help="Client id. [default: host name]")]
CacheDir = Annotated[
    Path | None, typer.Option(help="Keep encoded images here (mode 0700) between runs.")
]
Data = Annotated[Path | None, typer.Option(help="JSONL file: image(s), question, answer.")]
TlsCa = Annotated[Path | None, typer.Option(help="CA certificate; turns TLS on.")]
Tls = Annotated[bool | None, typer.Option("--tls", help="TLS, checked by the system's CAs.")]
TlsName = Annotated[str | None, typer.Option(help="Name in the certificate, if not the address's.")]
Insecure = Annotated[
    bool | None, typer.Option("--insecure", help="Send tokens in the clear beyond loopback.")
]
Retry = Annotated[float | None, typer.Option(help="Seconds a service may be away.")]
Config = Annotated[Path | None, typer.Option(help="YAML file with any of these settings.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]


def _settings(token_file: Path | None, config: Path | None, **flags: Any) -> Any:
    from fednano.client.settings import ClientSettings

    if token_file is not None:
        try:
            flags["token"] = token_file.read_text().strip()
        except OSError as error:
            raise InvalidRequest.of("--token-file", "a readable file", error) from None
    return ClientSettings.load(flags, config)


@client_app.command("run")
def run_command(
    coordinator: Coordinator = None,
    llm: Llm = None,
    token_file: TokenFile = None,
    edge: Edge = None,
    client_id: ClientId = None,
    run: Annotated[str | None, typer.Option(help="Run to join; else any that wants it.")] = None,
    role: Annotated[str | None, typer.Option(help="trainer or evaluator.")] = None,
    data: Data = None,
    cache_dir: CacheDir = None,
    threads: Annotated[int | None, typer.Option(help="Torch threads. [default: 1]")] = None,
    once: Annotated[bool | None, typer.Option("--once", help="End with the first run.")] = None,
    heartbeat_seconds: Annotated[float | None, typer.Option(help="[default: 2]")] = None,
    retry_seconds: Retry = None,
    tls: Tls = None,
    tls_ca: TlsCa = None,
    tls_server_name: TlsName = None,
    insecure: Insecure = None,
    log_json: Annotated[bool | None, typer.Option("--log-json")] = None,
    log_level: Annotated[str | None, typer.Option(help="[default: info]")] = None,
    config: Config = None,
) -> None:
    """Join runs and train or evaluate, until stopped."""
    from fednano import logs
    from fednano.client import daemon

    flags = {k: v for k, v in locals().items() if k in _FLAGS}
    settings = _settings(token_file, config, id=client_id, **flags)
    logs.configure("client", settings.log_json, settings.log_level)
    raise typer.Exit(daemon.run(settings))


_FLAGS = [
    "coordinator",
    "llm",
    "edge",
    "run",
    "role",
    "data",
    "cache_dir",
    "threads",
    "once",
    "heartbeat_seconds",
    "retry_seconds",
    "tls",
    "tls_ca",
    "tls_server_name",
    "insecure",
    "log_json",
    "log_level",
]


@client_app.command("check")
def check_command(
    coordinator: Coordinator = None,
    llm: Llm = None,
    token_file: TokenFile = None,
    edge: Edge = None,
    client_id: ClientId = None,
    data: Data = None,
    cache_dir: CacheDir = None,
    rank: Annotated[int, typer.Option(min=1, help="Adapter rank to reckon with.")] = 16,
    tls: Tls = None,
    tls_ca: TlsCa = None,
    tls_server_name: TlsName = None,
    insecure: Insecure = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Check data, token, TLS, reachability, fingerprint and disk; show what would leave here."""
    flags = {k: v for k, v in locals().items() if k in _FLAGS}
    settings = _settings(token_file, config, id=client_id, **flags)
    settings.set_threads()
    from fednano.client.check import Check

    report = Check(settings).run(rank)
    if as_json:
        typer.echo(json.dumps({"ok": report.ok, **asdict(report)}, indent=2))
    else:
        _show(report)
    raise typer.Exit(0 if report.ok else 1)


def _show(report: Any) -> None:
    from fednano.client.check import human_bytes

    console = Console()
    for finding in report.findings:
        mark = "[green]ok[/]  " if finding.ok else "[red]bad[/] "
        console.print(f"{mark}[bold]{finding.name}[/]: ", end="")
        console.print(finding.detail, markup=False, highlight=False)
    if report.outflow:
        table = Table("kind", "bytes", "per", "what", title="What would leave this machine")
        for row in report.outflow:
            table.add_row(row.kind, human_bytes(row.bytes), row.per, row.what)
        console.print(table)


@client_app.command("purge")
def purge_command(
    cache_dir: Annotated[Path, typer.Option(help="The cache directory that the client was given.")],
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
) -> None:
    """Remove everything that a client has cached on disk."""
    from fednano.client.cache import purge

    if not yes:
        typer.confirm(f"Remove {cache_dir} and everything in it?", abort=True)
    try:
        size = purge(cache_dir)
    except FileNotFoundError as error:
        raise InvalidRequest(str(error)) from None
    typer.echo(f"removed {size:,} bytes from {cache_dir}")


def ask_command(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    image: Annotated[
        list[Path] | None, typer.Option(exists=True, dir_okay=False, help="Image; repeatable.")
    ] = None,
    run: Annotated[str, typer.Option(help="Answer with this run's adapters; else with none.")] = "",
    round_number: Annotated[
        int | None, typer.Option("--round", min=0, help="Round. [default: the best one]")
    ] = None,
    coordinator: Coordinator = None,
    llm: Llm = None,
    token_file: TokenFile = None,
    edge: Edge = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest words.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    tls: Tls = None,
    tls_ca: TlsCa = None,
    tls_server_name: TlsName = None,
    insecure: Insecure = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Ask the tuned model; the answer appears as it is written."""
    wanted = set(_FLAGS) - {"run", "data"}
    flags = {k: v for k, v in locals().items() if k in wanted}
    settings = _settings(token_file, config, retry_seconds=20.0, **flags)
    settings.set_threads()
    from fednano.client.ask import Question, Which, answer
    from fednano.models.language_model import Sampling

    sampling = Sampling(max_new_tokens, temperature, seed=seed)
    pieces = answer(
        settings, Question(question, tuple(image or ())), Which(run, round_number), sampling
    )
    if as_json:
        typer.echo(json.dumps({"question": question, "answer": "".join(pieces)}))
        return
    for piece in pieces:
        typer.echo(piece, nl=False)
    typer.echo()
