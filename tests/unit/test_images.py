"""Images: upright, sRGB, antialiased pixels, or a reason why not."""

import hashlib
import io
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from ftk.contracts import RejectReason
from ftk.pipeline import images
from ftk.pipeline.buckets import place
from ftk.pipeline.images import ImageProblem, ImageRecipe, PreparedImage, header_size, prepare_image, to_srgb

SIZES = ((64, 64), (48, 80), (80, 48))
RECIPE = ImageRecipe(sizes=(SIZES,), image_format="png", background=(255, 255, 255), max_pixels=1_000_000, max_input_aspect=8.0)
# What each EXIF orientation says was done to the upright picture, so that undoing it gives the picture back.
STORED_AS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}

Encoded = Callable[..., bytes]
Noise = Callable[..., Image.Image]


def _prepare(tmp_path: Path, data: bytes, recipe: ImageRecipe = RECIPE, name: str = "image") -> Any:
    path = tmp_path / name
    path.write_bytes(data)
    return prepare_image(images.ImageTask(path=path, content_sha256=hashlib.sha256(data).hexdigest(), recipe=recipe))


def _good(tmp_path: Path, data: bytes, recipe: ImageRecipe = RECIPE) -> PreparedImage:
    result = _prepare(tmp_path, data, recipe)
    assert isinstance(result, PreparedImage), result
    return result


def _bad(tmp_path: Path, data: bytes, recipe: ImageRecipe = RECIPE) -> ImageProblem:
    result = _prepare(tmp_path, data, recipe)
    assert isinstance(result, ImageProblem)
    assert result.detail
    return result


def _pixels(prepared: PreparedImage, variant: int = 0) -> np.ndarray:
    with Image.open(io.BytesIO(prepared.variants[variant].data)) as image:
        assert image.mode == "RGB"
        return np.asarray(image).astype(int)


def _oriented(image: Image.Image, orientation: int, encoded: Encoded, image_format: str) -> bytes:
    stored = image if STORED_AS[orientation] is None else image.transpose(STORED_AS[orientation])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(stored, image_format, exif=exif)


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, rows: bytes = b"\0" * 100, bits: int = 8, colour: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = _png_chunk(b"IHDR", header) + _png_chunk(b"IDAT", zlib.compress(rows)) + _png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _display_p3() -> bytes:
    """A small ICC profile with the primaries of Display P3 (adapted to D50) and a gamma of 2.2."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) + b"\0\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 3) + b"P3\0" + b"\0" * 78 + b"\0\0\0",
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1.0, 0.8249),
        b"rXYZ": b"XYZ \0\0\0\0" + fixed(0.5151, 0.2412, -0.0011),
        b"gXYZ": b"XYZ \0\0\0\0" + fixed(0.2920, 0.6922, 0.0419),
        b"bXYZ": b"XYZ \0\0\0\0" + fixed(0.1571, 0.0666, 0.7841),
        b"rTRC": curve, b"gTRC": curve, b"bTRC": curve,
    }  # fmt: skip
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        padded = data + b"\0" * (-len(data) % 4)
        table += name + struct.pack(">II", start + len(body), len(data))
        body += padded
    size = start + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"\0" * 4, 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    header += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + fixed(0.9642, 1.0, 0.8249)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "WEBP"])
def test_every_exif_orientation_gives_the_same_upright_picture(
    tmp_path: Path, noise_image: Noise, encoded: Encoded, orientation: int, image_format: str
) -> None:
    upright = noise_image(96, 64)
    options = {"lossless": True, "exact": True} if image_format == "WEBP" else {}
    expected = _good(tmp_path, encoded(upright, image_format, **options))
    if image_format == "WEBP":
        data = _oriented(upright, orientation, lambda *args, **more: encoded(*args, **options, **more), image_format)
    else:
        data = _oriented(upright, orientation, encoded, image_format)
    prepared = _good(tmp_path, data)
    assert (prepared.width, prepared.height) == (96, 64)
    assert prepared.variants[0].placement == expected.variants[0].placement
    assert np.array_equal(_pixels(prepared), _pixels(expected))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_header_size_equals_the_prepared_size(
    tmp_path: Path, noise_image: Noise, encoded: Encoded, orientation: int, image_format: str
) -> None:
    prepared = _good(tmp_path, _oriented(noise_image(96, 64), orientation, encoded, image_format))
    assert header_size(tmp_path / "image") == (prepared.width, prepared.height) == (96, 64)


def test_header_size_reads_no_pixels(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(_png(50_000, 50_000))
    assert header_size(tmp_path / "bomb.png") == (50_000, 50_000)


def test_header_size_of_no_image_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"not an image")
    assert header_size(tmp_path / "a.jpg") is None
    assert header_size(tmp_path / "missing.jpg") is None


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF"])
def test_a_cut_file_is_truncated(tmp_path: Path, noise_image: Noise, encoded: Encoded, image_format: str) -> None:
    data = encoded(noise_image(96, 64), image_format)
    assert _bad(tmp_path, data[: len(data) // 2]).reason == RejectReason.TRUNCATED


@pytest.mark.parametrize(
    ("data", "detail"),
    [(b"", "the file is empty"), (b"This is text, renamed.", "no known image format (starts with b'This is ')")],
    ids=["zero-byte", "text"],
)
def test_what_is_no_image_is_unreadable(tmp_path: Path, data: bytes, detail: str) -> None:
    problem = _bad(tmp_path, data)
    assert problem.reason == RejectReason.UNREADABLE
    assert problem.detail == detail


def test_a_missing_file_is_unreadable(tmp_path: Path) -> None:
    problem = prepare_image(images.ImageTask(path=tmp_path / "gone.png", content_sha256="", recipe=RECIPE))
    assert isinstance(problem, ImageProblem)
    assert problem.reason == RejectReason.UNREADABLE


def test_a_file_that_changed_since_the_plan_is_a_problem(tmp_path: Path, noise_image: Noise, encoded: Encoded) -> None:
    (tmp_path / "a.png").write_bytes(encoded(noise_image(64, 64), "PNG"))
    problem = prepare_image(images.ImageTask(path=tmp_path / "a.png", content_sha256="0" * 64, recipe=RECIPE))
    assert isinstance(problem, ImageProblem)
    assert problem.reason == RejectReason.CHANGED_WHILE_READING


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "AVIF"])
def test_a_damaged_file_never_raises(tmp_path: Path, noise_image: Noise, encoded: Encoded, image_format: str) -> None:
    whole = encoded(noise_image(60, 48), image_format)
    outcomes = set()
    for seed in range(40):
        draw = np.random.default_rng(seed)
        damaged = bytearray(whole)
        for position in draw.integers(0, min(len(whole), 400), size=6):
            damaged[position] = draw.integers(0, 256)
        result = _prepare(tmp_path, bytes(damaged))
        header_size(tmp_path / "image")
        outcomes.add(type(result))
    assert outcomes <= {PreparedImage, ImageProblem}
    assert ImageProblem in outcomes


def test_transparency_shows_the_background(tmp_path: Path, encoded: Encoded) -> None:
    image = Image.new("RGBA", (64, 64), (10, 20, 30, 255))
    image.paste((200, 0, 0, 0), (0, 0, 32, 64))
    image.paste((0, 0, 0, 128), (0, 0, 64, 8))
    pixels = _pixels(_good(tmp_path, encoded(image, "PNG"), replace(RECIPE, background=(0, 255, 100))))
    assert pixels[40, 10].tolist() == [0, 255, 100]
    assert pixels[40, 50].tolist() == [10, 20, 30]
    assert np.abs(pixels[4, 10] - [0, 127, 50]).max() <= 1


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_shows_the_background(tmp_path: Path, encoded: Encoded, mode: str) -> None:
    image = Image.new("L", (64, 64), 0)
    image.paste(255, (32, 0, 64, 64))
    transparent: Any = (0, 0, 0) if mode == "RGB" else 0
    data = encoded(image.convert(mode), "PNG", transparency=transparent)
    pixels = _pixels(_good(tmp_path, data, replace(RECIPE, background=(9, 99, 199))))
    assert pixels[32, 10].tolist() == [9, 99, 199]
    assert pixels[32, 50].tolist() == [255, 255, 255]


def test_cmyk_becomes_rgb(tmp_path: Path, encoded: Encoded) -> None:
    data = encoded(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG", quality=100)
    assert np.abs(_pixels(_good(tmp_path, data)) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_gray_and_palette_become_rgb(tmp_path: Path, encoded: Encoded, mode: str) -> None:
    image = Image.new("L", (64, 64), 0)
    image.paste(255, (0, 0, 32, 64))
    pixels = _pixels(_good(tmp_path, encoded(image.convert(mode), "PNG")))
    assert pixels[:, 10].min() == 255
    assert pixels[:, 50].max() == 0


def test_a_coloured_palette_keeps_its_colours(tmp_path: Path, encoded: Encoded) -> None:
    image = Image.new("P", (64, 64), 1)
    image.putpalette([0, 0, 0, 12, 34, 56])
    assert (_pixels(_good(tmp_path, encoded(image, "PNG"))) == [12, 34, 56]).all()


def test_the_first_frame_of_an_animation_counts(tmp_path: Path, encoded: Encoded) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("#ff0000", "#00ff00", "#0000ff")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (_pixels(_good(tmp_path, data)) == [255, 0, 0]).all()


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_pixel_formats_are_rejected(tmp_path: Path, encoded: Encoded, mode: str) -> None:
    problem = _bad(tmp_path, encoded(Image.new(mode, (64, 64)), "TIFF"))
    assert problem.reason == RejectReason.UNSUPPORTED_MODE
    assert "8-bit" in problem.detail


def test_a_16_bit_gray_png_is_rejected(tmp_path: Path) -> None:
    rows = (b"\0" + b"\x12\x34" * 64) * 64
    assert _bad(tmp_path, _png(64, 64, rows, bits=16, colour=0)).reason == RejectReason.UNSUPPORTED_MODE


def test_a_bomb_is_rejected_on_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: Any) -> None:
        raise AssertionError("the bomb was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    started = time.monotonic()
    problem = _bad(tmp_path, _png(50_000, 50_000), replace(RECIPE, max_pixels=200_000_000))
    assert problem.reason == RejectReason.TOO_MANY_PIXELS
    assert "50000 x 50000" in problem.detail
    assert time.monotonic() - started < 5


def test_max_pixels_is_inclusive(tmp_path: Path, noise_image: Noise, encoded: Encoded) -> None:
    data = encoded(noise_image(64, 64), "PNG")
    _good(tmp_path, data, replace(RECIPE, max_pixels=64 * 64))
    assert _bad(tmp_path, data, replace(RECIPE, max_pixels=64 * 64 - 1)).reason == RejectReason.TOO_MANY_PIXELS


@pytest.mark.parametrize("size", [(161, 20), (20, 161)])
def test_a_sliver_is_rejected(tmp_path: Path, noise_image: Noise, encoded: Encoded, size: tuple[int, int]) -> None:
    assert _bad(tmp_path, encoded(noise_image(*size), "PNG")).reason == RejectReason.TOO_EXTREME_ASPECT
    _good(tmp_path, encoded(noise_image(160, 20), "PNG"))


def test_display_p3_is_converted_to_srgb(tmp_path: Path, encoded: Encoded) -> None:
    image = Image.new("RGB", (64, 64), (200, 100, 100))
    plain = _pixels(_good(tmp_path, encoded(image, "PNG")))[32, 32]
    converted = _pixels(_good(tmp_path, encoded(image, "PNG", icc_profile=_display_p3())))[32, 32]
    assert plain.tolist() == [200, 100, 100]
    # The same coordinates mean a more saturated red in P3 than in sRGB.
    assert converted[0] > 210
    assert converted[1] < 95
    assert abs(converted[1] - converted[2]) < 12


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_the_profile_is_applied_with_transparency_and_palettes_too(encoded: Encoded, mode: str) -> None:
    image = Image.new("RGB", (8, 8), (200, 100, 100))
    same = image.quantize(4) if mode == "P" else image.convert(mode)
    with Image.open(io.BytesIO(encoded(image, "PNG", icc_profile=_display_p3()))) as opened:
        expected = to_srgb(opened, (255, 255, 255)).getpixel((4, 4))
    with Image.open(io.BytesIO(encoded(same, "PNG", icc_profile=_display_p3()))) as opened:
        assert opened.mode == mode
        assert to_srgb(opened, (255, 255, 255)).getpixel((4, 4)) == expected


@pytest.mark.parametrize("orientation", [1, 6])
def test_the_profile_outlives_the_rotation(tmp_path: Path, encoded: Encoded, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(Image.new("RGB", (64, 64), (200, 100, 100)), "PNG", icc_profile=_display_p3(), exif=exif)
    assert _pixels(_good(tmp_path, data))[32, 32][0] > 210


def test_an_srgb_profile_changes_nothing(tmp_path: Path, noise_image: Noise, encoded: Encoded) -> None:
    image = noise_image(64, 64)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tagged = _pixels(_good(tmp_path, encoded(image, "PNG", icc_profile=profile)))
    assert np.abs(tagged - _pixels(_good(tmp_path, encoded(image, "PNG")))).max() <= 1


@pytest.mark.parametrize("kind", ["garbage", "of another colour space"])
def test_a_useless_profile_is_ignored(tmp_path: Path, noise_image: Noise, encoded: Encoded, kind: str) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    profile = b"garbage" * 40 if kind == "garbage" else lab
    image = noise_image(64, 64)
    tagged = _good(tmp_path, encoded(image, "PNG", icc_profile=profile))
    assert np.array_equal(_pixels(tagged), np.asarray(image))


def test_downsizing_is_antialiased(tmp_path: Path, encoded: Encoded) -> None:
    checkers = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    pixels = _pixels(_good(tmp_path, encoded(Image.fromarray(checkers), "PNG")))
    assert pixels.shape == (64, 64, 3)
    assert np.abs(pixels - 127.5).max() <= 4


def test_an_image_of_the_buckets_size_is_unchanged(tmp_path: Path, noise_image: Noise, encoded: Encoded) -> None:
    image = noise_image(80, 48)
    assert np.array_equal(_pixels(_good(tmp_path, encoded(image, "PNG"))), np.asarray(image))


def test_the_crop_keeps_the_middle(tmp_path: Path, encoded: Encoded) -> None:
    image = Image.new("RGB", (160, 64), "#ff0000")
    image.paste((0, 255, 0), (60, 0, 100, 64))
    pixels = _pixels(_good(tmp_path, encoded(image, "PNG"), replace(RECIPE, sizes=(((64, 64),),))))
    assert (pixels[32, 14:50] == [0, 255, 0]).all()
    assert (pixels[32, :8] == [255, 0, 0]).all()
    assert (pixels[32, -8:] == [255, 0, 0]).all()


def test_one_variant_a_resolution(tmp_path: Path, noise_image: Noise, encoded: Encoded) -> None:
    prepared = _good(tmp_path, encoded(noise_image(96, 64), "PNG"), replace(RECIPE, sizes=(SIZES, ((32, 32),))))
    assert [_pixels(prepared, index).shape for index in (0, 1)] == [(48, 80, 3), (32, 32, 3)]
    assert prepared.variants[0].placement == place(96, 64, list(SIZES))
    assert len({variant.image_id for variant in prepared.variants}) == 2


@pytest.mark.parametrize(("image_format", "magic"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8"), ("webp", b"RIFF")])
def test_equal_inputs_give_equal_bytes_in_every_format(
    tmp_path: Path, noise_image: Noise, encoded: Encoded, image_format: str, magic: bytes
) -> None:
    data = encoded(noise_image(96, 64), "PNG")
    recipe = replace(RECIPE, image_format=image_format)
    one, two = _good(tmp_path, data, recipe), _good(tmp_path, data, recipe)
    assert one == two
    assert one.variants[0].data.startswith(magic)


def test_lossless_formats_keep_every_pixel(tmp_path: Path, noise_image: Noise, encoded: Encoded) -> None:
    data = encoded(noise_image(64, 64), "PNG")
    for image_format in ("png", "webp"):
        prepared = _good(tmp_path, data, replace(RECIPE, image_format=image_format))
        assert np.array_equal(_pixels(prepared), np.asarray(noise_image(64, 64)))


def test_nothing_of_the_originals_metadata_is_kept(tmp_path: Path, noise_image: Noise, encoded: Encoded) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "somebody"
    prepared = _good(tmp_path, encoded(noise_image(64, 64), "PNG", exif=exif, icc_profile=_display_p3()))
    with Image.open(io.BytesIO(prepared.variants[0].data)) as image:
        assert not dict(image.getexif())
        assert "icc_profile" not in image.info


def test_the_image_id_names_content_and_everything_done_to_it(tmp_path: Path, noise_image: Noise, encoded: Encoded) -> None:
    data = encoded(noise_image(96, 64), "PNG")
    recipes = [
        RECIPE,
        replace(RECIPE, image_format="jpeg"),
        replace(RECIPE, background=(0, 0, 0)),
        replace(RECIPE, sizes=(((32, 32),),)),
    ]
    ids = [_good(tmp_path, data, recipe).variants[0].image_id for recipe in recipes]
    ids.append(_good(tmp_path, encoded(noise_image(96, 64, seed=1), "PNG")).variants[0].image_id)
    assert len(set(ids)) == len(ids)
    assert _good(tmp_path, data, replace(RECIPE, max_pixels=999_999)).variants[0].image_id == ids[0]
