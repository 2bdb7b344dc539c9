"""`fednano llm`: starts the LLM service."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fednano.llm.settings import LlmSettings
from fednano.settings import option
from fednano.wire.errors import FedNanoError, InvalidRequest

_option = partial(option, LlmSettings)


def llm(
    model: Annotated[Path | None, _option("model")] = None,
    host: Annotated[str | None, _option("host")] = None,
    port: Annotated[int | None, _option("port")] = None,
    metrics_host: Annotated[str | None, _option("metrics_host")] = None,
    metrics_port: Annotated[int | None, _option("metrics_port")] = None,
    device: Annotated[str | None, _option("device")] = None,
    dtype: Annotated[str | None, _option("dtype")] = None,
    device_map: Annotated[str | None, _option("device_map")] = None,
    tensor_parallel: Annotated[bool | None, _option("tensor_parallel")] = None,
    attention: Annotated[str | None, _option("attention")] = None,
    weights: Annotated[str | None, _option("weights")] = None,
    gradient_checkpointing: Annotated[str | None, _option("gradient_checkpointing")] = None,
    compile: Annotated[bool | None, _option("compile")] = None,
    threads: Annotated[int | None, _option("threads")] = None,
    queue: Annotated[int | None, _option("queue")] = None,
    batch_tokens: Annotated[int | None, _option("batch_tokens")] = None,
    join_backward_tokens: Annotated[int | None, _option("join_backward_tokens")] = None,
    generations: Annotated[int | None, _option("generations")] = None,
    tokens_per_sample: Annotated[int | None, _option("tokens_per_sample")] = None,
    tokens_per_request: Annotated[int | None, _option("tokens_per_request")] = None,
    samples_per_request: Annotated[int | None, _option("samples_per_request")] = None,
    message_mebibytes: Annotated[int | None, _option("message_mebibytes")] = None,
    new_tokens: Annotated[int | None, _option("new_tokens")] = None,
    activation_seconds: Annotated[float | None, _option("activation_seconds")] = None,
    activation_tokens: Annotated[int | None, _option("activation_tokens")] = None,
    base_mebibytes: Annotated[int | None, _option("base_mebibytes")] = None,
    base_directory: Annotated[Path | None, _option("base_directory")] = None,
    base_disk_mebibytes: Annotated[int | None, _option("base_disk_mebibytes")] = None,
    base_seconds: Annotated[float | None, _option("base_seconds")] = None,
    drain_seconds: Annotated[float | None, _option("drain_seconds")] = None,
    session_public_key_file: Annotated[
        Path | None,
        typer.Option(
            help="file with the coordinator's public key (PEM), for tokens; or the key itself in"
            " FEDNANO_LLM_SESSION_PUBLIC_KEY",
            envvar="FEDNANO_LLM_SESSION_PUBLIC_KEY_FILE",
            show_default="required",
        ),
    ] = None,
    tls_certificate: Annotated[
        Path | None, _option("tls_certificate", help="PEM; turns TLS on, with --tls-key")
    ] = None,
    tls_key: Annotated[Path | None, _option("tls_key", help="PEM")] = None,
    insecure: Annotated[
        bool | None,
        _option(
            "insecure",
            help="listen in the clear beyond loopback: for trusted networks only",
        ),
    ] = None,
    name: Annotated[str | None, _option("name")] = None,
    ready_file: Annotated[Path | None, _option("ready_file")] = None,
    log_json: Annotated[bool | None, _option("log_json")] = None,
    log_level: Annotated[str | None, _option("log_level")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of these settings; flags and environment win")
    ] = None,
) -> None:
    """Serve the frozen LLM over gRPC: embeddings in; losses, gradients and tokens out."""
    flags = dict(locals())
    config, key_file = flags.pop("config"), flags.pop("session_public_key_file")
    try:
        flags["session_public_key"] = _read_key(key_file)
        settings = LlmSettings.load(flags, config)
        from fednano.llm.server import run  # torch takes seconds to load

        run(settings)
    except InvalidRequest as error:
        typer.echo(f"fednano llm: {error.detail}", err=True)
        raise typer.Exit(2) from None
    except FedNanoError as error:
        typer.echo(f"fednano llm: {error.detail}", err=True)
        raise typer.Exit(1) from None


def _read_key(path: Path | None) -> str | None:
    try:
        return path.read_text() if path else None
    except OSError as error:
        raise InvalidRequest.of("session_public_key_file", "a file to read", error) from None
