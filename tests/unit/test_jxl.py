"""JPEG XL: read where its package is installed, and never decoded if its header says too much."""

import io
import sys
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from ftk.contracts import RejectReason
from ftk.pipeline import jxl
from ftk.pipeline.decode import Unfit, open_image
from ftk.pipeline.image_encoding import is_lossy
from ftk.pipeline.render import Rendering


def _jxl(image: Image.Image, **options: Any) -> bytes:
    pytest.importorskip("pillow_jxl")
    buffer = io.BytesIO()
    image.save(buffer, "JXL", **options)
    return buffer.getvalue()


def _picture(mode: str = "RGB", size: tuple[int, int] = (80, 60)) -> Image.Image:
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    image = coarse.resize(size, Image.Resampling.BICUBIC).convert(mode)
    if mode.endswith("A"):
        image.putalpha(Image.linear_gradient("L").resize(size))
    return image


@pytest.mark.parametrize("mode", ["L", "RGB", "LA", "RGBA"])
def test_jpeg_xl_is_read(mode: str) -> None:
    image = _picture(mode)
    opened = open_image(_jxl(image, lossless=True), 1_000_000)
    assert (opened.width, opened.height, opened.image.format) == (80, 60, "JXL")
    pixels = np.asarray(Rendering(opened, background=(9, 8, 7), max_pixels=1_000_000).at(80, 60)).astype(int)
    canvas = Image.new("RGB", image.size, (9, 8, 7))
    canvas.paste(image.convert("RGB"), mask=image.getchannel("A") if mode.endswith("A") else None)
    assert np.abs(pixels - np.asarray(canvas)).max() <= 2


def test_a_jpeg_inside_keeps_its_orientation_and_counts_as_lossy(tmp_path: Any) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    _picture().save(tmp_path / "a.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "a.jpg") as photo:
        data = _jxl(photo, lossless_jpeg=True)
    opened = open_image(data)
    assert (opened.width, opened.height) == (60, 80)
    assert is_lossy(opened)
    assert not is_lossy(open_image(_jxl(_picture())))
    # Outside of a JPEG the decoder itself turns the pixels, and EXIF says nothing about them.
    assert open_image(_jxl(_picture(), exif=exif.tobytes())).orientation == 1


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_a_cut_jpeg_xl_is_refused(share: float) -> None:
    for options in ({}, {"use_container": True}, {"lossless": True}):
        data = _jxl(_picture(), **options)
        with pytest.raises(Unfit) as caught:
            open_image(data[: int(len(data) * share)])
        assert caught.value.reason == RejectReason.UNREADABLE
        assert "JPEG XL" in caught.value.detail


@pytest.mark.parametrize(
    "size", [(8, 8), (256, 256), (1, 1), (13, 7), (300, 200), (1920, 1080), (120, 100), (640, 320), (9000, 20)]
)
@pytest.mark.parametrize("container", [False, True])
def test_the_size_is_read_from_the_header(size: tuple[int, int], container: bool) -> None:
    assert jxl.size(_jxl(Image.new("L", size), use_container=container, effort=1)) == size


def test_a_jpeg_xl_of_too_many_pixels_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _jxl(Image.new("L", (300, 200)))
    monkeypatch.setattr(jxl, "open_image", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(Unfit) as caught:
        open_image(data, 59_999)
    assert caught.value.reason == RejectReason.TOO_MANY_PIXELS
    assert "300 x 200" in caught.value.detail


def test_jpeg_xl_without_its_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    with pytest.raises(Unfit) as caught:
        open_image(b"\xff\x0a" + b"\0" * 64)
    assert caught.value.reason == RejectReason.UNREADABLE
    assert 'pip install "ftk[jxl]"' in caught.value.detail
