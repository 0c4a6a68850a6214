"""Fixtures that several test files share: one tiny model of each family, built once a run, and pictures to prepare."""

import io
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ftk.models import base as families

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny tensors: on a busy machine OpenMP threads wait for each other a thousand times longer than they work.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny model, by the family's name; written on first use and only read afterwards."""
    built: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in built:
            directory = tmp_path_factory.mktemp("tiny") / name
            families.get(name).tiny(directory)
            built[name] = directory
        return built[name]

    return build


@pytest.fixture(scope="session")
def tiny_model(tiny_models: Callable[[str], Path]) -> Path:
    """The tiny Qwen-Image."""
    return tiny_models("qwen-image")


@pytest.fixture
def noise_image() -> Callable[..., Image.Image]:
    """A seeded random RGB picture of the given size."""

    def make(width: int, height: int, seed: int = 0) -> Image.Image:
        return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(width * height * 3))

    return make


@pytest.fixture
def encoded() -> Callable[..., bytes]:
    """The bytes of an image file."""

    def encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, image_format, **options)
        return buffer.getvalue()

    return encode
