"""Settings of a client, of `client check` and of `ask`."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from fednano.client.replicas import parse_target
from fednano.settings import CallerTls
from fednano.wire.channels import check_exposure


class ClientSettings(CallerTls):
    """`FEDNANO_CLIENT_<FIELD>`, or the flag of the same name."""

    model_config = SettingsConfigDict(env_prefix="FEDNANO_CLIENT_")
    service: ClassVar[str] = "client"

    coordinator: str = Field("127.0.0.1:50052", description="host:port of the coordinator's gRPC")
    llm: str = Field("127.0.0.1:50051", description="host:port of the LLM service")
    token: SecretStr = Field(description="bearer token of role site")
    edge: Path = Field(description="the edge half, as `fednano split` wrote it")
    llm_half: Path | None = Field(
        None, description="the LLM half too, for runs with placement lora; no other run opens it"
    )
    id: str = Field(default_factory=socket.gethostname, min_length=1, max_length=128)
    run: str = Field("", description="the run to join; empty: any that wants this client")
    role: Literal["trainer", "evaluator"] = Field("trainer", description="what it does in a run")
    data: Path | None = Field(None, description="JSONL file, for runs on the clients' own data")
    cache_dir: Path | None = Field(None, description="keep encoded images here (mode 0700)")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "cpu",
        description="where images are encoded and NanoAdapters trained; auto: a GPU, if any",
    )
    threads: int = Field(1, ge=1, description="torch threads")
    once: bool = Field(False, description="end with the first run: 0 finished, 1 otherwise")
    heartbeat_seconds: float = Field(2.0, gt=0, description="between signs of life")
    retry_seconds: float = Field(300.0, gt=0, description="how long a service may be away")
    log_json: bool = Field(False, description="logs as JSON, one object per line")
    log_level: str = Field("info", description="debug, info, warning or error")

    def check(self) -> None:
        """Raises InvalidRequest for addresses that are none, or that need TLS."""
        for field in ("coordinator", "llm"):
            host, _ = parse_target(getattr(self, field))
            check_exposure(field, host, self.client_tls(), self.insecure)

    def set_threads(self) -> None:
        """Before torch starts any: several processes with several threads each are far slower."""
        os.environ["OMP_NUM_THREADS"] = str(self.threads)
        import torch

        torch.set_num_threads(self.threads)
