"""The frozen-feature cache: encoded once, private on disk, gone when asked."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch
from fednano.client.cache import FeatureCache, purge
from PIL import Image

from tests.tiny import picture


class Encoder:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, image: Image.Image) -> torch.Tensor:
        self.calls += 1
        return torch.full((2, 4), float(self.calls))


def test_an_image_is_encoded_once() -> None:
    cache, encode = FeatureCache("model"), Encoder()
    first, again, other = (cache.get(picture(seed), encode) for seed in (0, 0, 1))
    assert encode.calls == 2
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_another_process_finds_it_on_disk(tmp_path: Path) -> None:
    encode = Encoder()
    first = FeatureCache("model", tmp_path / "cache").get(picture(0), encode)
    again = FeatureCache("model", tmp_path / "cache").get(picture(0), encode)
    assert encode.calls == 1
    assert torch.equal(first, again)


def test_another_model_does_not(tmp_path: Path) -> None:
    encode = Encoder()
    for model in ("one", "other"):
        FeatureCache(model, tmp_path / "cache").get(picture(0), encode)
    assert encode.calls == 2


def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    FeatureCache("model", tmp_path / "cache").get(picture(0), Encoder())
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700


def test_a_file_that_was_cut_short_is_encoded_again(tmp_path: Path) -> None:
    FeatureCache("model", tmp_path).get(picture(0), Encoder())
    next(tmp_path.glob("*.safetensors")).write_bytes(b"half")
    encode = Encoder()
    FeatureCache("model", tmp_path).get(picture(0), encode)
    assert encode.calls == 1


def test_purge_removes_a_cache_and_nothing_else(tmp_path: Path) -> None:
    FeatureCache("model", tmp_path / "cache").get(picture(0), Encoder())
    assert purge(tmp_path / "cache") > 0
    assert not (tmp_path / "cache").exists()
    with pytest.raises(FileNotFoundError, match="no feature cache"):
        purge(tmp_path)
