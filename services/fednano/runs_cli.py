"""`fednano runs` and `fednano tokens`: steering the coordinator over REST."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn
from urllib.parse import quote

import typer
import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from fednano.rest_client import RestClient, RestSettings, run_path
from fednano.runs_watch import client_table, round_table, shadow_tables, state, watch
from fednano.settings import invalid
from fednano.wire.errors import FedNanoError, InvalidRequest
from fednano.wire.run_config import RunConfig
from fednano.wire.sessions import write_keys

runs_app = typer.Typer(help="Create, watch and steer runs.", no_args_is_help=True)
tokens_app = typer.Typer(help="Make and revoke access tokens.", no_args_is_help=True)

Url = Annotated[str | None, typer.Option(help="The coordinator [env: FEDNANO_URL].")]
TokenFile = Annotated[
    Path | None,
    typer.Option(help="File with the bearer token [env: FEDNANO_TOKEN_FILE or FEDNANO_TOKEN]."),
]
Ca = Annotated[
    Path | None, typer.Option(help="CA certificate of the coordinator's TLS [env: FEDNANO_CA].")
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Send the token in the clear beyond this machine.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the coordinator's reply as JSON.")]
Run = Annotated[str, typer.Argument(help="The run's name.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY.PATH=VALUE, over what the file says; may be repeated."),
]


class Role(StrEnum):
    ADMIN = "admin"
    VIEWER = "viewer"
    SITE = "site"


def _fail(error: FedNanoError, status: int) -> NoReturn:
    """The sentence, and each field at fault where the sentence doesn't name it already."""
    console = Console(stderr=True, highlight=False)
    console.print(f"error: {error.detail}", markup=False, soft_wrap=True)
    for problem in error.problems:
        if str(problem) not in error.detail:
            console.print(f"  {problem}", markup=False, soft_wrap=True)
    raise typer.Exit(status)


@contextmanager
def session(
    url: str | None, token_file: Path | None, ca: Path | None, insecure: bool
) -> Iterator[RestClient]:
    """A client; what goes wrong with or within it ends the command without a traceback."""
    try:
        token = token_file.read_text().strip() if token_file else None
        flags = {"url": url, "token": token, "ca": ca, "insecure": insecure or None}
        client = RestClient(RestSettings.load(flags))
    except OSError as error:
        _fail(InvalidRequest.of("token-file", "a readable file", error), 2)
    except FedNanoError as error:
        _fail(error, 2)
    try:
        with client:
            yield client
    except FedNanoError as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _moment(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


# --- run.yaml and --set


def read_config(file: Path | None, settings: list[str], name: str | None = None) -> RunConfig:
    """The run that the file, the settings over it and the name over both ask for.

    Raises InvalidRequest naming every field at fault.
    """
    body = _read_yaml(file) if file else {}
    for setting in settings:
        _set(body, setting)
    if name is not None:
        body["name"] = name
    try:
        return RunConfig.model_validate(body)
    except ValidationError as error:
        raise invalid(error) from None


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        body = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidRequest(f"{file} can't be read: {error}") from None
    if not isinstance(body, dict):
        raise InvalidRequest.of(str(file), "a mapping of a run's fields", type(body).__name__)
    return body


def _set(body: dict[str, Any], setting: str) -> None:
    """Puts `a.b=value` into `body`; the value is read as YAML."""
    path, equals, text = setting.partition("=")
    *sections, key = path.split(".")
    if not (equals and all(sections) and key):
        raise InvalidRequest.of("--set", "KEY.PATH=VALUE", repr(setting))
    for section in sections:
        body = body.setdefault(section, {})
        if not isinstance(body, dict):
            raise InvalidRequest.of(f"--set {path}", f"{section} to be a section", "a value")
    try:
        body[key] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InvalidRequest.of(f"--set {path}", "a YAML value", repr(text)) from None


def _config(file: Path | None, settings: list[str] | None, name: str | None = None) -> RunConfig:
    try:
        return read_config(file, settings or [], name)
    except InvalidRequest as error:
        _fail(error, 2)


# --- fednano runs


@runs_app.command()
def create(
    name: Run,
    settings: Set = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="run.yaml")] = None,
    url: Url = None,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Create a run from its name, its defaults and what --set says."""
    config = _config(file, settings, name)
    with session(url, token_file, ca, insecure) as client:
        _apply(client, config, as_json)


@runs_app.command()
def apply(
    file: Annotated[Path, typer.Option("-f", "--file", help="run.yaml")],
    settings: Set = None,
    url: Url = None,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Create the run that a file describes; a second time changes nothing."""
    config = _config(file, settings)
    with session(url, token_file, ca, insecure) as client:
        _apply(client, config, as_json)


def _apply(client: RestClient, config: RunConfig, as_json: bool) -> None:
    status, run = client.post("/runs", config.model_dump(mode="json"))
    if as_json:
        _print_json(run)
    else:
        typer.echo(f"run {run['name']} {'created' if status == 201 else 'unchanged'}")


@runs_app.command("list")
def list_runs(
    url: Url = None,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """List all runs, newest first."""
    with session(url, token_file, ca, insecure) as client:
        runs = client.items("/runs")
    if as_json:
        _print_json(runs)
        return
    table = Table("run", "state", "rounds", "members", "created", box=None, pad_edge=False)
    for run in runs:
        done = f"{run['last_round'] or 0}/{run['config']['rounds']}"
        members = str(len(run["members"]))
        table.add_row(run["name"], state(run["state"]), done, members, _moment(run["created_at"]))
    Console().print(table if runs else "no runs yet")


@runs_app.command()
def show(
    run: Run,
    url: Url = None,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Show a run with its clients and rounds."""
    with session(url, token_file, ca, insecure) as client:
        record = client.get(run_path(run))
        rounds = client.items(f"{run_path(run)}/rounds")
        clients = client.get(f"{run_path(run)}/clients")["items"]
    if as_json:
        _print_json({**record, "clients": clients, "rounds": rounds})
        return
    console = Console()
    console.print(f"[bold]{run}[/]", state(record["state"]), record["failure"])
    console.print(
        f"created {_moment(record['created_at'])} by {record['created_by']}, "
        f"round {record['last_round'] or 0} of {record['config']['rounds']}",
        markup=False,
    )
    if clients:
        console.print(client_table(clients))
    if rounds:
        console.print(round_table(rounds), *shadow_tables(rounds))


@runs_app.command("watch")
def watch_run(
    run: Run,
    url: Url = None,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as JSON.")] = False,
) -> None:
    """Follow a run until it ends: 0 when it finished, 1 when it failed or was stopped."""
    with session(url, token_file, ca, insecure) as client:
        status = watch(client, run, as_json)
    raise typer.Exit(status)


@runs_app.command()
def pause(
    run: Run,
    url: Url = None,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Hold a run where it is; `resume` goes on."""
    with session(url, token_file, ca, insecure) as client:
        _command(client, run, "pause", as_json)


@runs_app.command()
def resume(
    run: Run,
    url: Url = None,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Let a paused run go on."""
    with session(url, token_file, ca, insecure) as client:
        _command(client, run, "resume", as_json)


@runs_app.command()
def stop(
    run: Run,
    url: Url = None,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """End a run for good; its results stay."""
    with session(url, token_file, ca, insecure) as client:
        _command(client, run, "stop", as_json)


def _command(client: RestClient, run: str, command: str, as_json: bool) -> None:
    _, record = client.post(f"{run_path(run)}/{command}")
    if as_json:
        _print_json(record)
    else:
        typer.echo(f"run {run} is {record['state']}")


# --- fednano tokens


@tokens_app.command("create")
def create_token(
    name: Annotated[str, typer.Argument(help="Whose it is.")],
    role: Annotated[Role, typer.Option(help="What it may do.")],
    url: Url = None,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Make a token. Its secret is printed this once, alone on standard output."""
    with session(url, token_file, ca, insecure) as client:
        _, token = client.post("/tokens", {"name": name, "role": role.value})
    if as_json:
        _print_json(token)
    else:
        typer.echo(f"token {token['id']} for {token['name']} ({token['role']}):", err=True)
        typer.echo(token["secret"])


@tokens_app.command("keys")
def make_keys(
    out: Annotated[Path, typer.Option(help="Directory for session.key and session.pub.")],
) -> None:
    """Make the key pair of sessions: the coordinator signs with one, LLM services check with the
    other. Keys that are there already are kept."""
    private, public = write_keys(out)
    typer.echo(f"{private}: for coordinators, keep it secret")
    typer.echo(f"{public}: for LLM services")


@tokens_app.command("list")
def list_tokens(
    url: Url = None,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """List tokens, without their secrets."""
    with session(url, token_file, ca, insecure) as client:
        tokens = client.get("/tokens")["items"]
    if as_json:
        _print_json(tokens)
        return
    table = Table("id", "name", "role", "created", "", box=None, pad_edge=False)
    for token in tokens:
        revoked = "revoked" if token["revoked"] else ""
        created = _moment(token["created_at"])
        table.add_row(token["id"], token["name"], token["role"], created, revoked)
    Console().print(table if tokens else "no tokens yet")


@tokens_app.command("revoke")
def revoke_token(
    token_id: Annotated[str, typer.Argument(metavar="ID", help="As `tokens list` shows it.")],
    url: Url = None,
    token_file: TokenFile = None,
    ca: Ca = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Refuse a token from now on."""
    with session(url, token_file, ca, insecure) as client:
        token = client.delete(f"/tokens/{quote(token_id, safe='')}")
    if as_json:
        _print_json(token)
    else:
        typer.echo(f"token {token['id']} of {token['name']} is revoked")
