"""The shipped tiny LLaVA, whole and cut in two, and adapters large enough to matter."""

from __future__ import annotations

from pathlib import Path

import fednano.models
import numpy as np
import pytest
import torch
from fednano.client.adapters import NanoAdapters, Tensors
from fednano.client.edge import EdgeHalf
from fednano.client.examples import Example
from fednano.client.trainer import Trainer
from fednano.models.frozen import FrozenLLM
from fednano.models.split import split
from PIL import Image
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

TINY = Path(fednano.models.__file__).parent / "tiny_llava"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("halves")
    split(TINY, out)
    return out


@pytest.fixture(scope="session")
def frozen(halves: Path) -> FrozenLLM:
    return FrozenLLM.load(halves / "llm", device="cpu", dtype="fp32")


@pytest.fixture(scope="session")
def edge(halves: Path, frozen: FrozenLLM) -> EdgeHalf:
    return EdgeHalf(halves / "edge", frozen)


@pytest.fixture(scope="session")
def trainer(edge: EdgeHalf, frozen: FrozenLLM) -> Trainer:
    return Trainer(edge, frozen)


@pytest.fixture
def stock() -> LlavaForConditionalGeneration:
    """The whole model as anybody would load it."""
    return AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32).eval()


def large_tensors(rank: int = 4, hidden: int = 128, seed: int = 0) -> Tensors:
    rng = np.random.default_rng(seed)
    shapes = {"down": (rank, hidden), "up": (hidden, rank)}
    return {
        f"{modality}.{part}": rng.normal(0, 0.25, shape).astype(np.float32)
        for modality in ("image", "text")
        for part, shape in shapes.items()
    }


@pytest.fixture
def adapters() -> NanoAdapters:
    return NanoAdapters.from_tensors(large_tensors(), scale=0.7)


def no_adapters() -> NanoAdapters:
    tensors = large_tensors()
    for name in ("image.up", "text.up"):
        tensors[name] = np.zeros_like(tensors[name])
    return NanoAdapters.from_tensors(tensors, scale=0.7)


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture
def examples() -> list[Example]:
    """One image, several images, none; short and long answers, so that there is padding."""
    return [
        Example("one", (picture(0),), "What digit is this?", "seven"),
        Example("two", (picture(1), picture(2)), "Describe the picture.", "a red circle"),
        Example("none", (), "Is the digit even?", "yes"),
    ]
