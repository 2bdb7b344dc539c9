"""`fednano ask`: a question to the tuned model, through the same split as training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from fednano.client.adapters import Tensors
from fednano.client.coordination import Adapter, CoordinatorClient
from fednano.client.datasets import open_image
from fednano.client.edge import EdgeHalf
from fednano.client.examples import Example
from fednano.client.meter import Meter
from fednano.client.personal import Kept, kept_at
from fednano.client.placements import NanoPlacement, Placement
from fednano.client.placements_connector import ConnectorEdge, ConnectorPlacement, cache_of
from fednano.client.placements_lora import LoraPlacement
from fednano.client.remote import Caller, RemoteLanguageModel
from fednano.client.replicas import Replicas
from fednano.client.settings import ClientSettings
from fednano.client.trainer import Trainer
from fednano.models.checkpoint import HalfRecord, read_record
from fednano.models.language_model import Sampling
from fednano.wire import coordinator_pb2 as pb
from fednano.wire.errors import InvalidRequest, NotFound
from fednano.wire.low_rank import DOWN
from fednano.wire.placements import placement_of


@dataclass(frozen=True)
class Which:
    """The adapters to answer with: none without a run; of a run the best, those of a round, or what
    this client kept for itself."""

    run: str = ""
    round: int | None = None
    personal: bool = False

    def check(self) -> None:
        """Raises InvalidRequest for what contradicts itself."""
        if self.personal and not self.run:
            raise InvalidRequest.of("--run", "the run that --personal was kept of", "nothing")
        if self.personal and self.round is not None:
            raise InvalidRequest.of("--round", "nothing beside --personal", self.round)


@dataclass(frozen=True)
class Question:
    text: str
    images: tuple[Path, ...] = ()


def answer(
    settings: ClientSettings, question: Question, which: Which, sampling: Sampling
) -> Iterator[str]:
    """Pieces of the answer as the LLM produces them."""
    settings.check()
    which.check()
    kept = _kept(settings, which.run) if which.personal else None
    tls = settings.client_tls()
    coordinator = CoordinatorClient(
        settings.coordinator,
        settings.token.get_secret_value(),
        settings.id,
        tls,
        retry_seconds=settings.retry_seconds,
    )
    replicas = Replicas(settings.llm, tls)
    try:
        token = coordinator.login()
        caller = Caller(coordinator.header, lambda: token)
        llm = RemoteLanguageModel(replicas, caller, Meter(), retry_seconds=settings.retry_seconds)
        if kept is not None:
            tensors, scale = kept.own, kept.scale
        else:
            tensors, scale = _tuned(coordinator, which, read_record(settings.edge, "edge"))
        placement = _placement(settings, llm, tensors, scale)
        images = tuple(open_image(path) for path in question.images)
        example = Example("question", images, question.text, "")
        if kept is not None:
            tensors = kept.tensors(placement.edge, example)
        yield from _pieces(placement, tensors, example, sampling)
    finally:
        replicas.close()
        coordinator.close()


def _kept(settings: ClientSettings, run: str) -> Kept:
    """Raises InvalidRequest where this client kept nothing of the run."""
    if settings.cache_dir is None:
        raise InvalidRequest.of("--cache-dir", "where the client kept its own adapter", "nothing")
    return Kept.load(kept_at(settings.cache_dir, run, settings.id))


def _tuned(
    coordinator: CoordinatorClient, which: Which, record: HalfRecord
) -> tuple[Tensors, float]:
    """The tensors to answer with, and their scale."""
    if not which.run:
        nothing = np.zeros((1, record.hidden_size), np.float32)
        return {"text.down": nothing, "text.up": nothing.T.copy()}, 1.0
    found = _found(coordinator, which)
    return found.tensors, found.scale


def _placement(
    settings: ClientSettings, llm: RemoteLanguageModel, tensors: Tensors, scale: float
) -> Placement:
    """Where such tensors go. Raises InvalidRequest where they go into an LLM that isn't here."""
    where = placement_of(tensors)
    if where == "lora":
        if settings.llm_half is None:
            expected = "the LLM half, as the run trained LoRA inside the LLM (placement lora)"
            raise InvalidRequest.of("--llm-half", expected, "nothing")
        rank = next(len(tensor) for name, tensor in tensors.items() if name.endswith(DOWN))
        return LoraPlacement.load(settings.llm_half, rank, scale, partial(EdgeHalf, settings.edge))
    if where == "connector":
        edge = ConnectorEdge(settings.edge, llm, cache_of(llm.fingerprint))
        return ConnectorPlacement(edge, llm)
    half = EdgeHalf(settings.edge, llm, device=settings.device)
    return NanoPlacement(Trainer(half, llm), scale)


def _found(coordinator: CoordinatorClient, which: Which) -> Adapter:
    """The round that was named; else the best one or, where nobody evaluated, the last."""
    request = pb.GetAdapterRequest(header=coordinator.header(), run=which.run)
    if which.round is not None:
        request.round = which.round
        return coordinator.adapter(request)
    try:
        request.best = True
        return coordinator.adapter(request)
    except NotFound:
        request.last = True
        return coordinator.adapter(request)


def _pieces(
    placement: Placement, tensors: Tensors, example: Example, sampling: Sampling
) -> Iterator[str]:
    """What each new token adds to the text; decoded from the start, as tokens are not whole words."""
    ids: list[int] = []
    shown = ""
    for _, token in placement.stream(tensors, [example], sampling):
        ids.append(token)
        text = placement.edge.answer_text(ids)
        if text.startswith(shown) and not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
