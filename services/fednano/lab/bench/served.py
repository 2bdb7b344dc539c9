"""A model as it is measured: whole in this process, and behind a real LLM service over loopback."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig

from fednano.client.adapters import NanoAdapters
from fednano.client.cache import FeatureCache
from fednano.client.edge import EdgeHalf
from fednano.client.examples import Example
from fednano.client.meter import Meter
from fednano.client.remote import Caller, RemoteLanguageModel
from fednano.client.replicas import Replicas
from fednano.coordinator.strategies import initial_adapter
from fednano.lab.bench.checkpoints import Model
from fednano.lab.bench.rows import Surroundings
from fednano.lab.federation import Federation
from fednano.models.devices import DeviceName
from fednano.models.frozen import DTypeName, FrozenLLM
from fednano.models.llava import LlavaFront
from fednano.wire.headers import make_header
from fednano.wire.sessions import Identity, SessionSigner, write_keys
from fednano.wire.tensor_pb2 import FP32, DType

RANK, SCALE = 16, 2.0
_START_SECONDS = 600
"""A service that ends is noticed at once; one with a large model may take its time."""


@dataclass(frozen=True)
class Place:
    """Where an LLM computes, and how; `threads` are those of a CPU's part in it, on each side."""

    device: DeviceName = "cpu"
    dtype: DTypeName = "fp32"
    threads: int = 1

    @property
    def name(self) -> str:
        there = self.device == "cuda" and torch.cuda.is_available()
        return torch.cuda.get_device_name() if there else self.device


ON_CPU = Place()


@dataclass(frozen=True)
class Service:
    """One LLM service, and callers of it."""

    address: str
    private_key: bytes

    @contextmanager
    def caller(self, client: str, wire_dtype: DType = FP32) -> Iterator[RemoteLanguageModel]:
        token = self.token(client)
        replicas = Replicas(self.address)
        caller = Caller(lambda: make_header(client), lambda: token)
        try:
            yield RemoteLanguageModel(replicas, caller, wire_dtype=wire_dtype)
        finally:
            replicas.close()

    def token(self, client: str) -> str:
        """What a client shows to the service."""
        token, _ = SessionSigner(self.private_key).issue(Identity(client, "site"))
        return token


@contextmanager
def serve(around: Surroundings, model: Model, place: Place = ON_CPU) -> Iterator[Service]:
    """A process that serves the LLM half."""
    folder = around.directory / f"{model.halves.name}-served"
    folder.mkdir()
    federation = Federation(folder, around.processes)
    federation.halves = model.halves
    private, _ = write_keys(folder / "keys")
    federation.start_llm(
        log_level="warning", device=place.device, dtype=place.dtype, threads=str(place.threads)
    )
    ready = folder / "llm.ready"
    around.processes.wait_until(ready.exists, "the start of the LLM service", _START_SECONDS)
    try:
        yield Service(federation.addresses.llm, private.read_bytes())
    finally:
        around.processes.kill("llm")


def whole(model: Model, place: Place = ON_CPU) -> FrozenLLM:
    """The same half in this process."""
    torch.set_num_threads(place.threads)
    return FrozenLLM.load(model.halves / "llm", device=place.device, dtype=place.dtype)


def new_adapters(hidden: int, rank: int = RANK, scale: float = SCALE) -> NanoAdapters:
    tensors = initial_adapter(("image", "text"), rank, hidden, seed=0)
    rng = np.random.default_rng(1)
    for name in ("image.up", "text.up"):  # as after some training: not zero
        tensors[name] = rng.normal(0, 0.02, tensors[name].shape).astype(np.float32)
    return NanoAdapters.from_tensors(tensors, scale)


def make_examples(count: int, side: int) -> list[Example]:
    """One image and one short question each."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return [
        Example(str(index), (Image.fromarray(picture),), "What digit is this?", "seven")
        for index, picture in enumerate(pictures)
    ]


def make_long_examples(edge: EdgeHalf, count: int, side: int, tokens: int) -> list[Example]:
    """The same with questions that make `tokens` of each, image and answer included: no two of the
    first 256 alike, as what is alike is uploaded once."""
    examples = make_examples(count, side)
    question = examples[0].question
    missing = tokens - len(edge.prepare(examples[0]).base)
    assert missing >= 0, "the image alone has more tokens"
    return [
        replace(example, question=question + "".join(_words(number, missing)))
        for number, example in enumerate(examples)
    ]


def _words(number: int, count: int) -> list[str]:
    """A token each."""
    return [" this" if place < 8 and number >> place & 1 else " digit" for place in range(count)]


def taken_bytes(meter: Meter) -> tuple[int, int]:
    """Of messages sent and received since the last time, without their estimated framing."""
    costs = meter.take()
    return _unframed(costs.sent_bytes), _unframed(costs.received_bytes)


def _unframed(amounts: Mapping[str, int]) -> int:
    return sum(amount for kind, amount in amounts.items() if kind != "framing")


class EncodedNow(FeatureCache):
    """Keeps nothing: what a whole-model step does, which encodes its batch every time, at once."""

    def __init__(self, edge_directory: Path) -> None:
        super().__init__("")
        config = AutoConfig.from_pretrained(edge_directory, local_files_only=True)
        self._front = LlavaFront.load(edge_directory, config, torch.float32)
        self._now: dict[int, torch.Tensor] = {}
        self.edge: EdgeHalf | None = None

    def encode(self, examples: Sequence[Example]) -> None:
        assert self.edge is not None
        images = [image for example in examples for image in example.images]
        prepare = self.edge.processor.image_processor
        pixels = prepare(images, return_tensors="pt")["pixel_values"]
        features = self._front.encode(pixels)
        self._now = {id(i): f.float() for i, f in zip(images, features, strict=True)}

    def get(self, image: Image.Image, encode: object) -> torch.Tensor:
        return self._now[id(image)]
