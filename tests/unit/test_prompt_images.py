"""Images of prompts: what is wrong with one is said before anything is encoded."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ftk.errors import ConfigError
from ftk.pipeline import prompt_images


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    Image.fromarray(pixels).save(path, quality=95)
    return path


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("size", [(64, 64), lambda width, height: (width, height)])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_file_that_is_cut_is_refused_with_its_setting(photo: Path, tmp_path: Path, share, size, suffix) -> None:
    with Image.open(photo) as image:
        image.save(tmp_path / f"whole.{suffix}")
    data = (tmp_path / f"whole.{suffix}").read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ConfigError, match=r"sample\.prompts\.0\.references\.1: .*cut.* cannot be read as an image"):
        prompt_images.find(str(cut), size, "sample.prompts.0.references.1")


@pytest.mark.parametrize("entry", [str, lambda path: {"make": "grayscale", "from": path}])
def test_a_control_image_that_is_cut_is_refused(photo: Path, entry) -> None:
    photo.write_bytes(photo.read_bytes()[:2000])
    with pytest.raises(ConfigError, match=r"sample\.prompts\.2\.controls\.0.*photo\.jpg cannot be read as an image"):
        prompt_images.find_control(entry(str(photo)), (64, 64), "sample.prompts.2.controls.0")


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:2000])])
def test_a_file_that_changes_before_it_is_encoded_is_refused_in_words(photo: Path, change) -> None:
    image = prompt_images.find(str(photo), (64, 64), "sample.prompts.0.references.0")
    change(photo)
    with pytest.raises(ConfigError, match=r"photo\.jpg cannot be read as an image"):
        prompt_images.load(image.path, image.width, image.height)
