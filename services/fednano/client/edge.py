"""NanoEdge: the client's half. Frozen encoder and connector, then the trainable adapters."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import pad
from transformers import AutoConfig, AutoProcessor
from transformers.utils.logging import disable_progress_bar

from fednano.client.adapters import NanoAdapters
from fednano.client.batches import Batch, Prepared
from fednano.client.cache import FeatureCache
from fednano.client.examples import Example
from fednano.models.checkpoint import HalfRecord, read_record
from fednano.models.compute import unquantised
from fednano.models.devices import DeviceName, pick_device
from fednano.models.factored import Factored
from fednano.models.language_model import IGNORED, LanguageModel, Modality, Segment
from fednano.models.llava import LlavaFront
from fednano.models.split import EMBEDDINGS
from fednano.wire.errors import InvalidRequest

_REMEMBERED = 1 << 16


class EmbeddingRows:
    """Rows of the LLM's embedding table: from the edge half, or asked for once each."""

    def __init__(self, llm: LanguageModel, table: torch.Tensor | None = None) -> None:
        self._llm = llm
        self._table = table
        self._known: dict[int, torch.Tensor] = {}

    def __call__(self, ids: Sequence[int]) -> torch.Tensor:
        """[tokens, hidden] float32."""
        if self._table is not None:
            return self._table[torch.tensor(ids)].float()
        missing = sorted(set(ids) - self._known.keys())
        if missing:
            rows = self._llm.embed(torch.tensor(missing)).float()
            self._known.update(zip(missing, rows, strict=True))
        return torch.stack([self._known[i] for i in ids])


class EdgeHalf:
    """The frozen half of a checkpoint: from pixels and text to vectors before the adapters."""

    def __init__(
        self,
        directory: Path,
        llm: LanguageModel,
        cache: FeatureCache | None = None,
        device: DeviceName = "cpu",
    ) -> None:
        """`device` encodes, and is where the trainer has adapters. Raises InvalidRequest where there is
        none such, or `directory` is no edge half, or not of the LLM's model."""
        self.device = pick_device(device)
        disable_progress_bar()
        self.record: HalfRecord = read_record(directory, "edge")
        if unquantised(llm.fingerprint) != self.record.fingerprint:
            raise InvalidRequest.of("model fingerprint", llm.fingerprint, self.record.fingerprint)
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        self.processor: Any = AutoProcessor.from_pretrained(directory, local_files_only=True)
        self._front = LlavaFront.load(directory, config, torch.float32).to(self.device)
        self._image_token: int = config.image_token_id
        self._cache = cache if cache is not None else FeatureCache(self.record.fingerprint)
        table = load_file(directory / EMBEDDINGS)["embeddings"] if self.record.embeddings else None
        self._rows = EmbeddingRows(llm, table)
        # While a batch is answered the next one is prepared: what one encodes, the other need not.
        self._one_at_a_time = threading.Lock()
        # Private data repeats its questions and answers: each is tokenised once.
        self._prompt_ids = lru_cache(_REMEMBERED)(self._tokenised_prompt)
        self._answer_ids = lru_cache(_REMEMBERED)(self._tokenised_answer)

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def features(self, image: Image.Image) -> torch.Tensor:
        """What encoder and connector make of an image: [image tokens, hidden] float32."""
        return self._cache.get(image, self._encode)

    def _encode(self, image: Image.Image) -> torch.Tensor:
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        return self._front.encode(pixels)[0].float().cpu()

    def prepare(self, example: Example, with_answer: bool = True) -> Prepared:
        """Prompt and, for training and scoring, the answer and its end token, which are labelled.

        The prompt is the checkpoint's chat template with a turn for the assistant opened.
        """
        with self._one_at_a_time:
            return self._prepared(example, with_answer)

    def _prepared(self, example: Example, with_answer: bool) -> Prepared:
        prompt = self._prompt_ids(example.question, len(example.images))
        answer = self._answer_ids(example.answer) if with_answer else []
        features = [self.features(image) for image in example.images]
        parts: list[torch.Tensor] = []
        segments: list[Segment] = []
        for piece in self._pieces([*prompt, *answer], features):
            length = sum(s.length for s in segments)
            segments.append(Segment(piece[0], length, len(piece[1])))
            parts.append(piece[1])
        base = torch.cat(parts)
        labels = [IGNORED] * (len(base) - len(answer)) + answer
        return Prepared(base, tuple(segments), torch.tensor(labels))

    def _tokenised_prompt(self, question: str, images: int) -> list[int]:
        content = [{"type": "image"} for _ in range(images)]
        content.append({"type": "text", "text": question})
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        ids: list[int] = self.tokenizer(text)["input_ids"]
        found = ids.count(self._image_token)
        if found != images:
            # A question that spells the image token out would claim an image of its own.
            raise InvalidRequest.of(f"question {question!r}", f"{images} image tokens", found)
        return ids

    def _tokenised_answer(self, answer: str) -> list[int]:
        ids: list[int] = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id]

    def _pieces(
        self, ids: list[int], features: list[torch.Tensor]
    ) -> list[tuple[Modality, torch.Tensor]]:
        """Runs of text tokens and images, in order."""
        pieces: list[tuple[Modality, torch.Tensor]] = []
        images = iter(features)
        run: list[int] = []
        for token in [*ids, None]:
            if token is not None and token != self._image_token:
                run.append(token)
                continue
            if run:
                pieces.append((Modality.TEXT, self._rows(run)))
                run = []
            if token is not None:
                pieces.append((Modality.IMAGE, next(images)))
        return pieces

    def answer_text(self, ids: Sequence[int]) -> str:
        """Generated tokens as text, without special tokens."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.strip()


class NanoEdge(nn.Module):
    """The adapters, applied to a batch of vectors that the frozen half made."""

    def __init__(self, adapters: NanoAdapters) -> None:
        super().__init__()
        self.adapters = adapters

    def forward(self, batch: Batch) -> torch.Tensor:
        """[tokens, hidden]: image tokens through a_image, text tokens through a_text."""
        hidden = batch.base.clone()
        for modality, adapter in self.adapters.items():
            rows = batch.rows(modality).to(hidden.device)
            if len(rows):
                hidden.index_add_(0, rows, adapter(batch.base[rows]))
        return hidden

    def factored(self, batch: Batch) -> Factored:
        """The same as x + U W, with U = A x and W = s B^T: the graph ends in those two. Ranks that
        differ are filled up with zeros."""
        present = {modality for modality, _ in batch.stretches}
        used = {modality: a for modality, a in self.adapters.items() if modality in present}
        rank = max((len(adapter.down) for adapter in used.values()), default=1)
        down = {modality: _filled(adapter.down, rank).T for modality, adapter in used.items()}
        # Not of rows picked out of x: they would be a copy of it, which is kept for the way back.
        left = [
            x @ down[modality] if modality in down else x.new_zeros(len(x), rank)
            for modality, x in batch.stretches
        ]
        right = {modality: _filled(a.scale * a.up.T, rank) for modality, a in used.items()}
        return Factored(batch.base, torch.cat(left), right, batch.segments)


def _filled(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """[own rank, hidden] to [rank, hidden]; what is missing is 0."""
    return pad(tensor, (0, 0, 0, rank - len(tensor)))
