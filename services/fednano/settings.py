"""How every service is set: a flag over the environment over a file over the default.

A field `port` of the LLM service is `--port`, `FEDNANO_LLM_PORT`, or `port:` in the file named by
`--config`. `FEDNANO_LLM_<FIELD>_FILE` names a file that holds the value: for secrets.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import typer
import yaml
from pydantic import SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from fednano.wire.channels import ClientTls, ServerTls
from fednano.wire.errors import InvalidRequest, Problem

_SHOWN = 80


class SecretFiles(PydanticBaseSettingsSource):
    """Reads `<PREFIX><FIELD>_FILE`: the value is the named file's content."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        prefix = self.config.get("env_prefix", "")
        path = os.environ.get(f"{prefix}{field_name}_FILE".upper())
        return (Path(path).read_text().strip() if path else None), field_name, False

    def __call__(self) -> dict[str, Any]:
        found = {
            name: self.get_field_value(field, name)[0]
            for name, field in self.settings_cls.model_fields.items()
        }
        return {name: value for name, value in found.items() if value is not None}


class Settings(BaseSettings):
    """The base of every service's settings."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True)
    service: ClassVar[str]

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings, env_settings, SecretFiles(settings_cls))

    @classmethod
    def load(cls, flags: dict[str, Any], config: Path | None = None) -> Self:
        """Flags that are None were not given. Raises InvalidRequest naming each bad field."""
        given = {name: value for name, value in flags.items() if value is not None}
        try:
            from_file = yaml.safe_load(config.read_text()) if config else {}
            return cls(**{**_unless_in_environment(cls, from_file or {}), **given})
        except ValidationError as error:
            raise invalid(error) from None
        except (OSError, yaml.YAMLError) as error:
            raise InvalidRequest(f"settings can't be read: {error}") from None


def _unless_in_environment(cls: type[Settings], values: dict[str, Any]) -> dict[str, Any]:
    prefix = cls.model_config.get("env_prefix", "")
    names = {f"{prefix}{name}".upper(): name for name in values}
    return {
        name: values[name]
        for variable, name in names.items()
        if variable not in os.environ and f"{variable}_FILE" not in os.environ
    }


def invalid(error: ValidationError) -> InvalidRequest:
    """Our error for pydantic's, one problem per field. What was given is shown, unless it may hold
    a secret: whole sections and long values are not."""
    problems = [_problem(item) for item in error.errors(include_url=False)]
    return InvalidRequest("; ".join(map(str, problems)), *problems)


def _problem(item: Mapping[str, Any]) -> Problem:
    name = ".".join(str(part) for part in item["loc"]) or "settings"
    if item["type"] == "missing":
        return Problem(name, "a value", "nothing")
    if item["type"] == "value_error":  # a validator of ours: its text names the field itself
        stated = Problem.read(str(item["ctx"]["error"]))
        if stated is not None:
            return stated
    return Problem(name, item["msg"].removeprefix("Input should be "), _shown(item.get("input")))


def _shown(value: object) -> str:
    if isinstance(value, dict | list | SecretStr):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{len(text)} characters"


class ListenerTls(Settings):
    """The two settings that turn TLS on for a service that listens."""

    tls_certificate: Path | None = None
    tls_key: Path | None = None
    insecure: bool = False

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together")
        return self

    def server_tls(self) -> ServerTls | None:
        if self.tls_certificate is None or self.tls_key is None:
            return None
        return ServerTls(self.tls_certificate, self.tls_key)


class CallerTls(Settings):
    """How a service that dials others checks them."""

    tls: bool = False
    tls_ca: Path | None = None
    tls_server_name: str | None = None
    insecure: bool = False

    def client_tls(self) -> ClientTls | None:
        return ClientTls(self.tls_ca, self.tls_server_name) if self.tls or self.tls_ca else None


def option(cls: type[Settings], name: str, *flags: str, help: str = "") -> Any:
    """The flag of a setting: its help, default and environment variable come from there."""
    field = cls.model_fields[name]
    default: Any = "required" if field.is_required() else field.default
    hidden = field.default_factory is not None or default is False or default in (None, "")
    return typer.Option(
        *(flags or (f"--{name.replace('_', '-')}",)),
        help=help or field.description,
        envvar=f"{cls.model_config['env_prefix']}{name}".upper(),
        show_default=False if hidden else str(default),
    )
