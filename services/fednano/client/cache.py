"""The frozen-feature cache: encoder and connector never change, so an image is encoded once.

In memory always; on disk, below a directory that only its owner can read, where one is given.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

_MARK = "fednano-feature-cache"


class FeatureCache:
    """Features of images by content; the key holds the model's fingerprint and every encoder input."""

    def __init__(self, fingerprint: str, directory: Path | None = None) -> None:
        self._fingerprint = fingerprint
        self._memory: dict[str, torch.Tensor] = {}
        self._directory = directory
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(0o700)
            (directory / _MARK).touch()

    def get(
        self, image: Image.Image, encode: Callable[[Image.Image], torch.Tensor]
    ) -> torch.Tensor:
        """The features of `image`, encoded if they are not known."""
        key = self._key(image)
        if key not in self._memory:
            self._memory[key] = self._from_disk(key, image, encode)
        return self._memory[key]

    def _key(self, image: Image.Image) -> str:
        digest = hashlib.sha256(f"{self._fingerprint} {image.mode} {image.size} ".encode())
        digest.update(image.tobytes())
        return digest.hexdigest()

    def _from_disk(
        self, key: str, image: Image.Image, encode: Callable[[Image.Image], torch.Tensor]
    ) -> torch.Tensor:
        if self._directory is None:
            return encode(image)
        path = self._directory / f"{key}.safetensors"
        try:
            return load_file(path)["features"]
        except (FileNotFoundError, SafetensorError, KeyError):
            features = encode(image)  # also where a file was cut short by a crash
        unfinished = path.with_suffix(f".{os.getpid()}")
        save_file({"features": features.contiguous()}, unfinished)
        unfinished.replace(path)
        return features


def purge(directory: Path) -> int:
    """Removes a cache from disk and returns the bytes it took; other directories are left alone.

    Raises FileNotFoundError where `directory` is no feature cache.
    """
    if not (directory / _MARK).is_file():
        raise FileNotFoundError(f"{directory} is no feature cache of fednano")
    size = sum(path.stat().st_size for path in directory.iterdir())
    shutil.rmtree(directory)
    return size
