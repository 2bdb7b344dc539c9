"""How the coordinator is set: FEDNANO_COORDINATOR_<FIELD>, flags over environment over file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from fednano.settings import ListenerTls


class CoordinatorSettings(ListenerTls):
    """Everything that a coordinator is told at start."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix="FEDNANO_COORDINATOR_"
    )
    service: ClassVar[str] = "coordinator"

    redis_url: str = Field("redis://127.0.0.1:6379/0", description="the only state")
    host: str = Field("127.0.0.1", description="address that gRPC binds")
    grpc_port: int = Field(50052, ge=0, le=65535, description="0: any free one")
    http_host: str = Field("127.0.0.1", description="address that HTTP binds")
    http_port: int = Field(8080, ge=0, le=65535, description="0: any free one")
    admin_token: SecretStr = Field(
        SecretStr(""), description="a first admin's bearer token; never written to Redis"
    )
    session_key: SecretStr = Field(
        SecretStr(""), description="Ed25519 private key (PEM) that signs tokens for the LLM service"
    )
    session_seconds: float = Field(900, ge=2, description="life of a token for the LLM service")
    lease_seconds: float = Field(5, ge=0.3, description="how long a leader is trusted unheard")
    client_seconds: float = Field(15, gt=0, description="a client unheard for so long is lost")
    run_file: Path | None = Field(None, description="a run.yaml that is applied at start")
    ready_file: Path | None = Field(None, description="the ports, as JSON, once serving")
    max_update_norm: float = Field(
        1e4, gt=0, description="times max(1, norm of the base): a larger step is refused"
    )
    message_mebibytes: int = Field(1024, ge=1, description="of one update, all chunks together")
    drain_seconds: float = Field(5, ge=0, description="for running calls at shutdown")
    log_json: bool = False
    log_level: str = "info"

    @model_validator(mode="before")
    @classmethod
    def _shared_admin_token(cls, values: dict[str, Any]) -> dict[str, Any]:
        """FEDNANO_ADMIN_TOKEN(_FILE) is the name that the command line shares with us."""
        if values.get("admin_token"):
            return values
        path = os.environ.get("FEDNANO_ADMIN_TOKEN_FILE")
        token = Path(path).read_text().strip() if path else os.environ.get("FEDNANO_ADMIN_TOKEN")
        return {**values, "admin_token": token} if token else values
