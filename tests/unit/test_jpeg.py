"""JPEG: Pillow's pixels, and no file of which some are missing or wrong passes as whole."""

import io
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ftk.contracts import RejectReason
from ftk.pipeline import jpeg
from ftk.pipeline.images import ImageProblem, ImageRecipe, ImageTask, PreparedImage, prepare_image
from ftk.pipeline.sources.base import Blob

SIZE = (256, 192)
BLOCK = 4096
END = b"\xff\xd9"

Encoded = Callable[..., bytes]


def _picture(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    """A picture with as much detail as a photograph."""
    coarse = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)).astype(int)
    noise = np.random.default_rng(1).normal(0, 12, smooth.shape)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)).convert(mode)


def _recipe(size: tuple[int, int], **changes: Any) -> ImageRecipe:
    settings: dict[str, Any] = {
        "upscale": "always", "upscale_limit": 1.5, "min_size": 1, "crop": "center", "crops": 1, "flip": False,
        "resize": "gamma", "image_format": "auto", "quality": None, "background": (255, 255, 255), "animated": "first",
        "max_pixels": 1_000_000, "max_input_aspect": 8.0,
    }  # fmt: skip
    return ImageRecipe(sizes=((size,),), **{**settings, **changes})


def _results(data: bytes, **changes: Any) -> list[PreparedImage | ImageProblem]:
    """What becomes of a file that is copied, enlarged, shrunk, or shrunk on its blocks."""
    sizes = [SIZE, (384, 288), (128, 96), (32, 24)]
    blob = Blob(location="image", data=data)
    tasks = [ImageTask(image=blob, mask=None, controls=(), recipe=_recipe(size, **changes)) for size in sizes]
    return [prepare_image(task) for task in tasks]


def _is_sample(data: bytes, **changes: Any) -> bool:
    results = _results(data, **changes)
    whole = {isinstance(result, PreparedImage) for result in results}
    assert len(whole) == 1, "it depends on the size"
    reasons = {RejectReason.TRUNCATED, RejectReason.UNREADABLE}
    assert all(result.reason in reasons for result in results if isinstance(result, ImageProblem))
    return whole.pop()


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "4:2:0": ("RGB", {}),
    "4:2:2": ("RGB", {"subsampling": "4:2:2"}),
    "4:4:4": ("RGB", {"subsampling": "4:4:4", "quality": 95}),
    "RGB": ("RGB", {"keep_rgb": True}),
    "gray": ("L", {}),
    "CMYK": ("CMYK", {"subsampling": "4:4:4"}),
    "CMYK of few colours": ("CMYK", {"subsampling": "4:2:0"}),
    "progressive": ("RGB", {"progressive": True}),
    "with restarts": ("RGB", {"restart_marker_rows": 1}),
}


def _file(kind: str, encoded: Encoded, size: tuple[int, int] = SIZE) -> bytes:
    mode, options = KINDS[kind]
    return encoded(_picture(mode, size), "JPEG", **{"quality": 90, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_pillows(kind: str, encoded: Encoded) -> None:
    for size in (SIZE, (131, 77), (1, 1)):
        data = _file(kind, encoded, size)
        with Image.open(io.BytesIO(data)) as image:
            expected = np.asarray(image).reshape(size[1], size[0], -1)
        decoded = jpeg.decode(data)
        assert decoded is not None
        assert np.array_equal(decoded, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_jpeg_that_was_cut_and_closed_is_no_sample(kind: str, encoded: Encoded) -> None:
    data = _file(kind, encoded)
    assert _is_sample(data)
    scan = data.index(b"\xff\xda")
    for length in (scan, scan + 14, scan + 60, len(data) // 2, len(data) - 300):
        assert not _is_sample(data[:length] + END)
    assert not _is_sample(data[: len(data) // 2])
    (problem,) = {result.reason for result in _results(data[: len(data) // 2] + END) if isinstance(result, ImageProblem)}
    assert problem == RejectReason.TRUNCATED


@pytest.mark.parametrize("resize", ["gamma", "linear"])
@pytest.mark.parametrize("fill", [b"\0" * BLOCK, b"\xff" * BLOCK, b"text" * 1024, random.Random(0).randbytes(BLOCK)])
def test_a_jpeg_with_an_overwritten_block_is_no_sample(fill: bytes, resize: str, encoded: Encoded) -> None:
    data = _file("4:2:0", encoded)
    assert len(data) > 4 * BLOCK
    start = len(data) // 2
    assert not _is_sample(data[:start] + fill + data[start + BLOCK :], resize=resize)


def test_a_damaged_mask_or_control_image_is_no_part_of_a_sample(encoded: Encoded) -> None:
    image, whole = Blob(location="image", data=_file("4:4:4", encoded)), _file("gray", encoded)
    cut = Blob(location="part", data=whole[: len(whole) // 2] + END)
    for mask, controls, reason in (
        (cut, (), RejectReason.MASK_UNREADABLE),
        (None, (cut,), RejectReason.CONTROL_UNREADABLE),
    ):
        result = prepare_image(ImageTask(image=image, mask=mask, controls=controls, recipe=_recipe((128, 96))))
        assert isinstance(result, ImageProblem)
        assert result.reason == reason


@pytest.mark.parametrize("kind", ["4:2:0", "gray", "CMYK of few colours", "progressive"])
def test_a_jpeg_that_lacks_only_its_end_marker_is_a_sample(kind: str, encoded: Encoded) -> None:
    data = _file(kind, encoded)
    assert data.endswith(END)
    whole = _results(data, image_format="png")
    for odd in (data[:-2], data[:-1], data + b"a film that a telephone put here", data[:-2] + b"\0\0\0" + END):
        assert _is_sample(odd)
        for result, expected in zip(_results(odd, image_format="png"), whole, strict=True):
            assert isinstance(result, PreparedImage)
            assert isinstance(expected, PreparedImage)
            assert not result.variants[0].copied
            assert result.variants[0].data == expected.variants[0].data


def test_what_is_no_jpeg_is_left_to_others() -> None:
    for data in (b"", b"\xff\xd8", b"\xff\xd8garbage", b"\x89PNG\r\n\x1a\n"):
        assert jpeg.decode(data) is None
        assert jpeg.decode(data, shrink=2) is None


def test_odd_headers_do_not_cost_the_picture(encoded: Encoded) -> None:
    data = _file("4:2:0", encoded)
    scan, tables = data.index(b"\xff\xda"), data.index(b"\xff\xdb")
    adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\7"
    whole = jpeg.decode(data)
    telephone = data[: scan + 12] + b"\0" + data[scan + 13 :]
    assert not _is_sample(telephone[: len(data) // 2] + END)
    for odd in (
        # As some telephones write it, an unknown version of JFIF, another program's colours, and garbage between segments.
        telephone,
        data.replace(b"JFIF\0\1", b"JFIF\0\7"),
        data[:2] + adobe + data[2:],
        data[:tables] + b"\1" * 500 + data[tables:],
    ):
        assert odd != data
        assert _is_sample(odd)
        decoded = jpeg.decode(odd)
        assert decoded is not None
        assert np.array_equal(decoded, whole)
