"""`fednano coordinator`: starts the coordinator."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import SecretStr

from fednano.coordinator.settings import CoordinatorSettings
from fednano.settings import option
from fednano.wire.errors import FedNanoError, InvalidRequest

_PREFIX = "FEDNANO_COORDINATOR_"


_option = partial(option, CoordinatorSettings)


def _secret(name: str, help: str) -> Any:
    """The flag of a file with a secret: never the secret itself, which others could see."""
    return typer.Option(
        f"--{name.replace('_', '-')}-file",
        help=help,
        envvar=f"{_PREFIX}{name}_FILE".upper(),
        show_default=False,
    )


def coordinator(
    redis_url: Annotated[str | None, _option("redis_url")] = None,
    host: Annotated[str | None, _option("host")] = None,
    grpc_port: Annotated[int | None, _option("grpc_port")] = None,
    http_host: Annotated[str | None, _option("http_host")] = None,
    http_port: Annotated[int | None, _option("http_port")] = None,
    admin_token_file: Annotated[
        Path | None, _secret("admin_token", "file with a first admin's bearer token")
    ] = None,
    session_key_file: Annotated[
        Path | None,
        _secret("session_key", "file with the Ed25519 private key (PEM) that signs LLM tokens"),
    ] = None,
    session_seconds: Annotated[float | None, _option("session_seconds")] = None,
    lease_seconds: Annotated[float | None, _option("lease_seconds")] = None,
    client_seconds: Annotated[float | None, _option("client_seconds")] = None,
    run_file: Annotated[Path | None, _option("run_file")] = None,
    ready_file: Annotated[Path | None, _option("ready_file")] = None,
    max_update_norm: Annotated[float | None, _option("max_update_norm")] = None,
    message_mebibytes: Annotated[int | None, _option("message_mebibytes")] = None,
    drain_seconds: Annotated[float | None, _option("drain_seconds")] = None,
    tls_certificate: Annotated[
        Path | None, _option("tls_certificate", help="PEM; turns TLS on for both, with --tls-key")
    ] = None,
    tls_key: Annotated[Path | None, _option("tls_key", help="PEM")] = None,
    insecure: Annotated[
        bool | None,
        _option("insecure", help="listen in the clear beyond loopback: for trusted networks only"),
    ] = None,
    log_json: Annotated[bool | None, _option("log_json", help="one JSON object per line")] = None,
    log_level: Annotated[str | None, _option("log_level")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of these settings; flags and environment win")
    ] = None,
) -> None:
    """Run federations: rounds and merging; gRPC for clients, REST and a dashboard for people."""
    flags = dict(locals())
    config = flags.pop("config")
    try:
        for name in ("admin_token", "session_key"):
            flags[name] = _read_secret(name, flags.pop(f"{name}_file"))
        settings = CoordinatorSettings.load(flags, config)
        from fednano.coordinator.server import run  # FastAPI and gRPC take a while to load

        run(settings)
    except InvalidRequest as error:
        typer.echo(f"fednano coordinator: {error.detail}", err=True)
        raise typer.Exit(2) from None
    except FedNanoError as error:
        typer.echo(f"fednano coordinator: {error.detail}", err=True)
        raise typer.Exit(1) from None


def _read_secret(name: str, path: Path | None) -> SecretStr | None:
    try:
        return SecretStr(path.read_text().strip()) if path else None
    except OSError as error:
        raise InvalidRequest.of(f"{name}_file", "a file to read", error) from None
