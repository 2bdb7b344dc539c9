"""`fednano split`: cuts a checkpoint into the client's half and the LLM."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from fednano.models import llava
from fednano.models.checkpoint import HalfRecord, fingerprint
from fednano.wire.errors import InvalidRequest

FAMILIES = {llava.FAMILY: llava}
EMBEDDINGS = "embeddings.safetensors"


@dataclass(frozen=True)
class SplitReport:
    """Both halves of a checkpoint."""

    edge: HalfRecord
    llm: HalfRecord


def split(model_dir: Path, out: Path, with_embeddings: bool = False) -> SplitReport:
    """Writes `out`/edge and `out`/llm.

    The edge half holds vision tower, connector, processor, tokenizer and, with `with_embeddings`,
    the LLM's embedding table. Raises InvalidRequest for a family that is not known, a directory
    that is no checkpoint, or an `out` that holds something else.
    """
    disable_progress_bar()
    digest = fingerprint(model_dir)
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    if config.model_type not in FAMILIES:
        raise InvalidRequest.of(
            f"{model_dir}/config.json: model_type",
            f"one of {', '.join(FAMILIES)}",
            config.model_type,
        )
    edge_dir, llm_dir = _empty(out / "edge"), _empty(out / "llm")
    model = AutoModelForImageTextToText.from_pretrained(
        model_dir, dtype="auto", local_files_only=True
    )
    whole = _Whole(model, config.model_type, model_dir.resolve().name, digest)
    return SplitReport(
        whole.write_edge(edge_dir, model_dir, with_embeddings), whole.write_llm(llm_dir)
    )


def _empty(directory: Path) -> Path:
    if directory.exists() and any(directory.iterdir()):
        if not (directory / "fednano.json").is_file():
            raise InvalidRequest.of(
                "--out", "an empty directory or an earlier split", str(directory)
            )
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@dataclass(frozen=True)
class _Whole:
    model: PreTrainedModel
    family: str
    name: str
    fingerprint: str

    def write_edge(self, out: Path, source: Path, with_embeddings: bool) -> HalfRecord:
        weights = FAMILIES[self.family].edge_weights(self.model)
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
        self.model.config.save_pretrained(out)
        _copy_processor(source, out)
        tensors = list(weights.values())
        if with_embeddings:
            layer: Any = self.model.get_input_embeddings()
            table = layer.weight.detach().contiguous()
            save_file({"embeddings": table}, out / EMBEDDINGS)
            tensors.append(table)
        loader = "fednano.client.edge.EdgeHalf"
        return self._record("edge", loader, tensors, out, with_embeddings)

    def write_llm(self, out: Path) -> HalfRecord:
        causal = FAMILIES[self.family].causal_lm(self.model)
        causal.save_pretrained(out)
        unique = {t.data_ptr(): t for t in causal.parameters()}
        loader = "transformers.AutoModelForCausalLM"
        return self._record("llm", loader, list(unique.values()), out, False)

    def _record(
        self, half: str, loader: str, tensors: list[torch.Tensor], out: Path, embeddings: bool
    ) -> HalfRecord:
        text = self.model.config.get_text_config()
        record = HalfRecord(
            half="edge" if half == "edge" else "llm",
            name=self.name,
            family=self.family,
            fingerprint=self.fingerprint,
            hidden_size=text.hidden_size,
            vocabulary=text.vocab_size,
            dtype=str(self.model.dtype).removeprefix("torch."),
            loader=loader,
            parameters=sum(t.numel() for t in tensors),
            bytes=sum(path.stat().st_size for path in out.iterdir()),
            embeddings=embeddings,
        )
        record.write(out)
        for (
            path
        ) in out.iterdir():  # weights are written for their owner alone; others may serve them
            path.chmod(path.stat().st_mode | 0o044)
        return record


def _copy_processor(source: Path, out: Path) -> None:
    """Processor, tokenizer and chat template, by way of their classes: whatever files they need."""
    AutoProcessor.from_pretrained(source, local_files_only=True).save_pretrained(out)
    AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(out)
