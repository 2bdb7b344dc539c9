"""How the LLM service is set: FEDNANO_LLM_<FIELD>, flags over environment over file."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from fednano.models.choices import Attention, Checkpointing, Weights
from fednano.settings import ListenerTls
from fednano.wire.sessions import SessionVerifier


class LlmSettings(ListenerTls):
    """Everything that the LLM service is told at start."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, env_prefix="FEDNANO_LLM_")
    service: ClassVar[str] = "llm"

    model: Path = Field(description="directory of the LLM half that `fednano split` wrote")
    session_public_key: str = Field(
        description="Ed25519 public key (PEM) of the coordinator that signs callers' tokens; several"
        " while keys are changed"
    )
    host: str = Field("127.0.0.1", description="address that gRPC binds")
    port: int = Field(50051, ge=0, le=65535, description="gRPC; 0: any free one")
    metrics_host: str = Field("127.0.0.1", description="address that the metrics listener binds")
    metrics_port: int = Field(
        9101, ge=-1, le=65535, description="Prometheus; 0: any free one, -1: no metrics listener"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the LLM runs")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="of the weights; auto: fp32 on a CPU, bf16 on a GPU"
    )
    device_map: str = Field(
        "",
        description="layers on several devices: auto, balanced, balanced_low_0, sequential, or a YAML"
        " or JSON file {module: device}",
    )
    tensor_parallel: bool = Field(
        False, description="a part of each layer on every rank that torchrun started"
    )
    attention: Attention = Field(
        "auto", description="its implementation; auto: the family's own choice, sdpa for most"
    )
    weights: Weights = Field(
        "auto",
        description="of the linear layers: int8 (torchao) or nf4, 4 bits (bitsandbytes), made from the"
        " checkpoint's while loading; auto: as dtype says",
    )
    gradient_checkpointing: Checkpointing = Field(
        "auto",
        description="layers are computed again on the way back rather than kept: less memory, more"
        " time, the same bytes; auto: where one sample does not fit otherwise, and with int8",
    )
    compile: bool = Field(
        False, description="layers by torch.compile; needs a C++ compiler, and time at first use"
    )
    threads: int = Field(0, ge=0, description="CPU threads of one computation; 0: torch's choice")
    queue: int = Field(64, ge=1, description="requests that may wait; more are refused as busy")
    batch_tokens: int = Field(
        -1,
        ge=-1,
        description="of requests that are joined into one batch, padding counted; 0: one request per"
        " batch, -1: 1024 on a CPU, 8192 on a GPU",
    )
    join_backward_tokens: int = Field(
        -1,
        ge=-1,
        description="the largest Forward that is joined with others'; its Backward computes forward"
        " again. 0: none, -1: none on a CPU, 1024 on a GPU",
    )
    generations: int = Field(4, ge=1, description="answers that are written at the same time")
    tokens_per_sample: int = Field(0, ge=0, description="limit; 0: the model's own")
    tokens_per_request: int = Field(
        32_768, ge=1, description="limit; each sample counts as long as the longest of its request"
    )
    samples_per_request: int = Field(256, ge=1, description="limit")
    message_mebibytes: int = Field(
        256, ge=1, description="limit of one request, or one reply, all its chunks together"
    )
    new_tokens: int = Field(1024, ge=1, description="limit of one answer")
    activation_seconds: float = Field(
        120, gt=0, description="how long Forward's activation waits for its Backward"
    )
    activation_tokens: int = Field(
        65_536, ge=1, description="tokens whose activations are kept at most"
    )
    base_mebibytes: int = Field(
        1024,
        ge=0,
        description="memory for uploaded bases, with which clients send less (the factored wire);"
        " 0: not offered",
    )
    base_directory: Path | None = Field(
        None, description="bases that memory has no room for lie here while the service runs"
    )
    base_disk_mebibytes: int = Field(
        16_384, ge=1, description="limit of what lies in base_directory"
    )
    base_seconds: float = Field(
        21_600, gt=0, description="how long a base is kept that nobody uses"
    )
    drain_seconds: float = Field(30, ge=0, description="for the running calls at shutdown")
    name: str = Field("", description="of this replica; empty: the host's name and a random part")
    ready_file: Path | None = Field(None, description="the ports, as JSON, once serving")
    log_json: bool = Field(False, description="logs as JSON, one object per line")
    log_level: str = Field("info", description="debug, info, warning or error")

    def verifier(self) -> SessionVerifier:
        """Checks callers' tokens. Raises InvalidRequest, which does not repeat what may be secret."""
        return SessionVerifier(self.session_public_key.encode())
