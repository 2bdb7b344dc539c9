"""`fednano client check`: would this client work, and what would leave this machine?"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fednano.client import digits
from fednano.client.batches import Batch, Prepared
from fednano.client.coordination import CoordinatorClient
from fednano.client.datasets import JsonlDataset
from fednano.client.edge import EdgeHalf
from fednano.client.examples import Example
from fednano.client.messages import announced
from fednano.client.meter import Meter
from fednano.client.remote import Caller, RemoteLanguageModel
from fednano.client.replicas import Replicas
from fednano.client.settings import ClientSettings
from fednano.client.weights import trainable
from fednano.models.checkpoint import read_record
from fednano.models.compute import quantisation, unquantised
from fednano.wire.errors import FedNanoError, InvalidRequest, WrongModel
from fednano.wire.placements import trained_by
from fednano.wire.tensor_pb2 import FP32

_LOOKED_AT = 16  # examples that stand for all
_RANK = 16
_BATCH = 16


@dataclass(frozen=True)
class Finding:
    """One thing that was checked."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Outflow:
    """Bytes of one kind that would leave this machine, and what they are."""

    kind: str
    bytes: int
    per: str
    what: str


@dataclass
class Report:
    """Everything that `client check` found out."""

    findings: list[Finding] = field(default_factory=list)
    outflow: list[Outflow] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings)


@dataclass
class Check:
    """Goes through a client's settings one by one; nothing is trained and no run is joined."""

    settings: ClientSettings
    report: Report = field(default_factory=Report)

    def run(self, rank: int = _RANK) -> Report:
        self._try("settings", self._settings)
        record = self._try("edge half", self._edge_record)
        if self.settings.llm_half is not None:
            self._try("LLM half", self._llm_half)
        examples = self._try("data", self._examples)
        self._try("disk", self._disk)
        tokens = self._try("coordinator, token, TLS", self._login)
        edge = self._try("LLM, fingerprint", lambda: self._edge(tokens)) if tokens else None
        if record and examples and edge:
            self._try("features", lambda: self._measure(edge, examples, rank))
        return self.report

    def _try(self, name: str, look: Callable[[], Any]) -> Any:
        """What `look` found; None and a finding that says why where it fails."""
        try:
            found = look()
        except (FedNanoError, OSError, ValueError) as error:
            self.report.findings.append(Finding(name, False, str(error)))
            return None
        detail = found if isinstance(found, str) else getattr(found, "detail", "ok")
        self.report.findings.append(Finding(name, True, detail))
        return found

    def _settings(self) -> str:
        self.settings.check()
        return "addresses and TLS settings fit together"

    def _edge_record(self) -> Found:
        record = read_record(self.settings.edge, "edge")
        return Found(f"{record.name}, {record.parameters:,} parameters", record)

    def _llm_half(self) -> str:
        weights = trainable(self.settings.edge, self.settings.llm_half)
        layers = len(trained_by("lora", weights))
        return f"{self.settings.llm_half}: {layers} layers for LoRA in runs with placement lora"

    def _examples(self) -> Found:
        if self.settings.data is None:
            asked = [e for d in digits.load_split("train") for e in digits.examples_of(d)]
            return Found(f"built-in digits: {len(asked):,} questions, dealt out by the run", asked)
        chosen = JsonlDataset.read(self.settings.data).everything()
        return Found(f"{len(chosen):,} examples in {self.settings.data}", chosen)

    def _disk(self) -> str:
        folder = self.settings.cache_dir
        if folder is None:
            return "features are kept in memory only (no --cache-dir)"
        existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(existing).free
        if free < 1 << 28:
            raise InvalidRequest.of("--cache-dir", "256 MiB free", f"{free >> 20} MiB")
        return f"{free >> 20:,} MiB free at {existing}"

    def _login(self) -> Found:
        s = self.settings
        coordinator = CoordinatorClient(
            s.coordinator, s.token.get_secret_value(), s.id, s.client_tls(), retry_seconds=5
        )
        try:
            token = coordinator.login()
        finally:
            coordinator.close()
        return Found(f"{s.coordinator} answers and accepts the token", (coordinator, token))

    def _edge(self, login: Found) -> Found:
        coordinator, token = login.value
        replicas = Replicas(self.settings.llm, self.settings.client_tls())
        caller = Caller(coordinator.header, lambda: token)
        llm = RemoteLanguageModel(replicas, caller, Meter(), retry_seconds=5)
        record = read_record(self.settings.edge, "edge")
        if unquantised(llm.fingerprint) != record.fingerprint:
            raise WrongModel(f"fingerprint: expected {record.fingerprint}, got {llm.fingerprint}")
        detail = f"{self.settings.llm} serves {llm.card.name} with the same fingerprint"
        if (weights := quantisation(llm.fingerprint)) != "auto":
            detail += f", its weights quantised to {weights}"
        return Found(detail, EdgeHalf(self.settings.edge, llm, device=self.settings.device))

    def _measure(self, edge: Found, examples: Found, rank: int) -> str:
        half: EdgeHalf = edge.value
        chosen: Sequence[Example] = examples.value
        looked: list[Prepared] = [half.prepare(e) for e in chosen[:_LOOKED_AT]]
        batch = Batch.of(looked)
        tokens, hidden = len(batch.base) / len(batch), half.record.hidden_size
        vectors = int(tokens * hidden * 4)
        control = announced(batch.sequences(batch.base), FP32).ByteSize() * _BATCH // len(batch)
        answers = float(batch.label_counts.mean())
        logits = int(answers * half.record.vocabulary * 4)
        adapters = 2 * 2 * rank * hidden * 4
        self.report.outflow = [
            Outflow(
                "embeddings",
                vectors * _BATCH,
                f"step of {_BATCH} samples",
                "one vector per token of image and text, fp32; the LLM's operator can read the text"
                " back from them, and keeps none of it",
            ),
            Outflow(
                "bases",
                vectors,
                "sample, once at most",
                "only in runs by the factored wire: vectors before any adapter, which the LLM service"
                " keeps while the run lasts, those of an image or text that comes again once;"
                " embeddings are far smaller then",
            ),
            Outflow("control", control, f"step of {_BATCH} samples", "where which tokens are"),
            Outflow(
                "logits",
                logits * _BATCH,
                f"step of {_BATCH} samples",
                "only in runs with the loss on the client: the gradient of the logits",
            ),
            Outflow("labels", int(tokens * 4 * _BATCH), f"step of {_BATCH} samples", "answers"),
            Outflow("adapters", adapters, "round", f"two adapters of rank {rank}, fp32"),
            Outflow(
                "adapters", adapters, "round", "their Fisher estimate, where the run merges by it"
            ),
            Outflow("images", 0, "ever", "pixels stay here"),
        ]
        return f"{tokens:.0f} tokens per example, {hidden} wide"


@dataclass(frozen=True)
class Found:
    detail: str
    value: Any


def human_bytes(size: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")
