"""`fednano client run|check|purge` and `fednano ask`. Torch is imported when a command runs."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fednano.client.settings import ClientSettings
from fednano.settings import option
from fednano.wire.errors import InvalidRequest

if TYPE_CHECKING:
    from fednano.client.check import Report

client_app = typer.Typer(
    no_args_is_help=True,
    help="A site's own process beside its data. FEDNANO_CLIENT_TOKEN_FILE names a file that holds "
    "the token.",
)


_option = partial(option, ClientSettings)


Coordinator = Annotated[str | None, _option("coordinator")]
Llm = Annotated[str | None, _option("llm")]
Edge = Annotated[Path | None, _option("edge")]
LlmHalf = Annotated[Path | None, _option("llm_half")]
Id = Annotated[str | None, _option("id", help="client id; the host's name unless given")]
Data = Annotated[Path | None, _option("data")]
CacheDir = Annotated[Path | None, _option("cache_dir")]
Device = Annotated[str | None, _option("device")]
Tls = Annotated[bool | None, _option("tls", "--tls", help="check services by the system's CAs")]
TlsCa = Annotated[Path | None, _option("tls_ca", help="check services by this CA (PEM)")]
TlsServerName = Annotated[
    str | None, _option("tls_server_name", help="name in the certificate, if not the address's")
]
Insecure = Annotated[
    bool | None,
    _option("insecure", "--insecure", help="send tokens in the clear beyond this machine"),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(help="file with a token of role site", envvar="FEDNANO_CLIENT_TOKEN_FILE"),
]
Config = Annotated[Path | None, typer.Option(help="YAML file with any of these settings")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on standard output")]


def _settings(context: typer.Context, **more: Any) -> ClientSettings:
    """From the options of the command that are settings, and `more`."""
    given = context.params
    flags = {name: value for name, value in given.items() if name in ClientSettings.model_fields}
    token_file = given["token_file"]
    if token_file is not None:
        try:
            flags["token"] = token_file.read_text().strip()
        except OSError as error:
            raise InvalidRequest.of("--token-file", "a readable file", error) from None
    return ClientSettings.load({**flags, **more}, given["config"])


@client_app.command("run")
def run_command(
    context: typer.Context,
    coordinator: Coordinator = None,
    llm: Llm = None,
    token_file: TokenFile = None,
    edge: Edge = None,
    llm_half: LlmHalf = None,
    id: Id = None,
    run: Annotated[str | None, _option("run")] = None,
    role: Annotated[str | None, _option("role", help="trainer or evaluator")] = None,
    data: Data = None,
    cache_dir: CacheDir = None,
    device: Device = None,
    threads: Annotated[int | None, _option("threads")] = None,
    once: Annotated[bool | None, _option("once", "--once")] = None,
    heartbeat_seconds: Annotated[float | None, _option("heartbeat_seconds")] = None,
    retry_seconds: Annotated[float | None, _option("retry_seconds")] = None,
    tls: Tls = None,
    tls_ca: TlsCa = None,
    tls_server_name: TlsServerName = None,
    insecure: Insecure = None,
    log_json: Annotated[bool | None, _option("log_json", "--log-json")] = None,
    log_level: Annotated[str | None, _option("log_level")] = None,
    config: Config = None,
) -> None:
    """Join runs and train or evaluate, until stopped."""
    from fednano import logs

    settings = _settings(context)
    logs.configure("client", settings.log_json, settings.log_level)
    from fednano.client import daemon

    raise typer.Exit(daemon.run(settings))


@client_app.command("check")
def check_command(
    context: typer.Context,
    coordinator: Coordinator = None,
    llm: Llm = None,
    token_file: TokenFile = None,
    edge: Edge = None,
    llm_half: LlmHalf = None,
    id: Id = None,
    data: Data = None,
    cache_dir: CacheDir = None,
    device: Device = None,
    rank: Annotated[int, typer.Option(min=1, help="adapter rank to reckon with")] = 16,
    tls: Tls = None,
    tls_ca: TlsCa = None,
    tls_server_name: TlsServerName = None,
    insecure: Insecure = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Check data, token, TLS, reachability, fingerprint and disk; show what would leave here."""
    settings = _settings(context)
    settings.set_threads()
    from fednano.client.check import Check

    with Meanwhile():
        report = Check(settings).run(rank)
    if as_json:
        typer.echo(json.dumps({"ok": report.ok, **asdict(report)}, indent=2))
    else:
        _show(report)
    raise typer.Exit(0 if report.ok else 1)


class Meanwhile(logging.Handler):
    """What is logged while a command works, as lines like those of a check's findings, on standard
    error: a service that is asked again is one."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def __enter__(self) -> None:
        logging.getLogger().addHandler(self)

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        detail = " ".join(str(getattr(record, "reason", "")).split())
        _print_line(Console(stderr=True), "[yellow]...[/]", record.getMessage(), detail)


def _print_line(console: Console, mark: str, name: str, detail: str) -> None:
    line = Text.from_markup(mark).append(" ").append(name, "bold")
    console.print(line.append(f": {detail}" if detail else ""), soft_wrap=True)


def _show(report: Report) -> None:
    from fednano.client.check import human_bytes

    console = Console()
    for finding in report.findings:
        mark = "[green]ok[/] " if finding.ok else "[red]bad[/]"
        _print_line(console, mark, finding.name, finding.detail)
    if report.outflow:
        table = Table("kind", "bytes", "per", "what", title="What would leave this machine")
        for row in report.outflow:
            table.add_row(row.kind, human_bytes(row.bytes), row.per, row.what)
        console.print(table)


@client_app.command("purge")
def purge_command(
    cache_dir: Annotated[Path, typer.Option(help="the cache directory that the client was given")],
    yes: Annotated[bool, typer.Option("--yes", help="don't ask")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove everything that a client has cached on disk."""
    from fednano.client.cache import purge

    if not yes:
        typer.confirm(f"Remove {cache_dir} and everything in it?", abort=True)
    try:
        size = purge(cache_dir)
    except FileNotFoundError as error:
        raise InvalidRequest(str(error)) from None
    removed = {"removed_bytes": size, "cache_dir": str(cache_dir)}
    typer.echo(json.dumps(removed) if as_json else f"removed {size:,} bytes from {cache_dir}")


def ask_command(
    context: typer.Context,
    question: Annotated[str, typer.Argument(help="what to ask")],
    image: Annotated[
        list[Path] | None, typer.Option(exists=True, dir_okay=False, help="image; repeatable")
    ] = None,
    adapters_of: Annotated[
        str, typer.Option("--run", help="answer with this run's adapters; else with none")
    ] = "",
    round_number: Annotated[
        int | None, typer.Option("--round", min=0, help="of the run  [default: the best one]")
    ] = None,
    personal: Annotated[
        bool, typer.Option("--personal", help="with the adapter that this client kept of the run")
    ] = False,
    coordinator: Coordinator = None,
    llm: Llm = None,
    token_file: TokenFile = None,
    edge: Edge = None,
    llm_half: LlmHalf = None,
    id: Id = None,
    cache_dir: CacheDir = None,
    device: Device = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest words")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="of sampling, where temperature is not 0")] = 0,
    tls: Tls = None,
    tls_ca: TlsCa = None,
    tls_server_name: TlsServerName = None,
    insecure: Insecure = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Ask the tuned model; the answer appears as it is written."""
    settings = _settings(context, retry_seconds=20.0)
    settings.set_threads()
    from fednano import tracing
    from fednano.client.ask import Question, Which, answer
    from fednano.models.language_model import Sampling

    tracing.configure("client")
    asked = Question(question, tuple(image or ()))
    sampling = Sampling(max_new_tokens, temperature, seed=seed)
    pieces = answer(settings, asked, Which(adapters_of, round_number, personal), sampling)
    with Meanwhile():
        if as_json:
            typer.echo(json.dumps({"question": question, "answer": "".join(pieces)}))
            return
        for piece in pieces:
            typer.echo(piece, nl=False)
        typer.echo()
