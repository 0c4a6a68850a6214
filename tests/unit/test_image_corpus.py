"""A corpus of odd image files: each ends as samples or as one named reject, and nothing raises."""

import functools
import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from ftk.contracts import RejectReason
from ftk.pipeline.decode import Unfit, open_image
from ftk.pipeline.images import ImageProblem, ImageRecipe, ImageTask, PreparedImage, Probe, prepare_image, probe_image
from ftk.pipeline.sources.base import Blob

RECIPE = ImageRecipe(
    sizes=(((48, 48), (32, 64), (64, 32)),),
    upscale="always",
    upscale_limit=1.5,
    min_size=1,
    crop="center",
    crops=1,
    flip=True,
    resize="gamma",
    image_format="auto",
    quality=None,
    background=(255, 255, 255),
    animated="first",
    max_pixels=10_000_000,
    max_input_aspect=8.0,
)

GOOD = "samples"
BAD = "a reject of whatever reason"
EITHER = "samples or a reject: what a tolerant decoder makes of it"

Case = tuple[Callable[[], bytes], str]


def _picture(mode: str = "RGB", width: int = 80, height: int = 60) -> Image.Image:
    draw = np.random.default_rng(0)
    coarse = Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    rgb = coarse.resize((width, height), Image.Resampling.BICUBIC)
    if mode == "I;16":
        return Image.fromarray((np.asarray(rgb.convert("L")).astype(np.uint16) << 8) + 5)
    if mode == "F":
        return Image.fromarray(np.asarray(rgb.convert("L")).astype(np.float32) / 255)
    if mode in ("LA", "PA", "RGBA"):
        rgb.putalpha(Image.linear_gradient("L").resize(rgb.size))
    if mode == "LAB":
        return Image.merge("LAB", rgb.split())
    return rgb.convert(mode)


def _file(image_format: str, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    _picture(mode).save(buffer, image_format, **options)
    return buffer.getvalue()


def _heic() -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(_picture()).save(buffer, quality=80)
    return buffer.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, bits: int, colour: int, *, interlaced: bool = False, rows: bytes | None = None) -> bytes:
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = b"\0" + np.random.default_rng(bits).bytes(-(-width * bits * channels // 8))
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, int(interlaced)))
    palette = _chunk(b"PLTE", bytes(range(3)) * (1 << bits)) if colour == 3 else b""
    pixels = _chunk(b"IDAT", zlib.compress(row * height if rows is None else rows))
    return b"\x89PNG\r\n\x1a\n" + header + palette + pixels + _chunk(b"IEND", b"")


def _oriented(image_format: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return _file(image_format, exif=exif)


def _frames(image_format: str, count: int = 3, **options: Any) -> bytes:
    buffer = io.BytesIO()
    frames = [_picture().rotate(30 * index) for index in range(count)]
    frames[0].save(buffer, image_format, save_all=True, append_images=frames[1:], **options)
    return buffer.getvalue()


def _cut(whole: Callable[[], bytes], fraction: float) -> bytes:
    data = whole()
    return data[: max(1, int(len(data) * fraction))]


def _flipped_bits(image_format: str, seed: int) -> bytes:
    data = bytearray(_file(image_format))
    draw = np.random.default_rng(seed)
    for position in draw.integers(0, len(data), size=5):
        data[position] ^= 1 << int(draw.integers(0, 8))
    return bytes(data)


def _gif_of_size(width: int, height: int) -> bytes:
    return (
        b"GIF89a"
        + struct.pack("<HH", width, height)
        + b"\x80\0\0\0\0\0\xff\xff\xff"
        + b",\0\0\0\0"
        + (struct.pack("<HH", width, height) + b"\0\x02\x02\x44\x01\0;")
    )


def _bmp_of_size(width: int, height: int) -> bytes:
    return (
        b"BM"
        + struct.pack("<IHHI", 100, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
        + b"\0" * 46
    )


def _jpeg_of_size(width: int, height: int) -> bytes:
    data = _file("JPEG")
    frame = data.index(b"\xff\xc0") + 5
    return data[:frame] + struct.pack(">HH", height, width) + data[frame + 4 :]


def _late_exif() -> bytes:
    data = _file("PNG")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 8
    return data[:-12] + _chunk(b"eXIf", exif.tobytes()[6:]) + data[-12:]


SAVED: dict[str, str] = {
    "PNG": "1 L LA I;16 P RGB RGBA",
    "JPEG": "1 L RGB RGBX CMYK YCbCr",
    "TIFF": "1 L LA I;16 F P PA RGB RGBA RGBX CMYK YCbCr LAB",
    "WEBP": "L LA P RGB RGBA RGBX CMYK",
    "AVIF": "L LA RGB RGBA P",
    "GIF": "1 L P RGB RGBA",
    "BMP": "1 L P RGB RGBA",
    "DIB": "1 L P RGB RGBA",
    "TGA": "1 L LA P RGB RGBA",
    "PPM": "1 L I;16 RGB RGBA F",
    "JPEG2000": "L LA I;16 RGB RGBA YCbCr CMYK",
    "DDS": "L LA RGB RGBA",
    "SGI": "L RGB RGBA",
    "PCX": "1 L P RGB",
    "IM": "1 L LA P RGB RGBA RGBX CMYK YCbCr I;16 F",
    "ICO": "L LA P RGB RGBA",
    "ICNS": "RGB RGBA",
    "QOI": "RGB RGBA",
    "MSP": "1",
    "XBM": "1",
    "SPIDER": "F",
    "BLP": "P",
}
COMPRESSIONS = ["tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4", "lzma", "zstd"]
CUT_FORMATS = ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000", "TGA", "PPM"]
ICC = {"empty": b"", "garbage": b"garbage" * 99, "cut": b"\0\0\x0c\x48Lino\2\x10\0\0mntrRGB XYZ "}

GIVEN: dict[str, Case] = {
    **{
        f"{image_format} {mode}": (partial(_file, image_format, mode), GOOD)
        for image_format, modes in SAVED.items()
        for mode in modes.split()
    },
    "TIFF I": (partial(_file, "TIFF", "I"), GOOD),
    "HEIC": (_heic, GOOD),
    **{
        f"PNG of {bits} bits, colour type {colour}": (partial(_png, 40, 30, bits, colour), GOOD)
        for colour, depths in {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}.items()
        for bits in depths
    },
    "PNG of 3 bits": (partial(_png, 40, 30, 3, 0), RejectReason.UNREADABLE),
    **{
        f"TIFF compressed by {name}": (partial(_file, "TIFF", "1" if name == "group4" else "RGB", compression=name), GOOD)
        for name in COMPRESSIONS
    },
    **{
        f"{image_format} with orientation {orientation}": (partial(_oriented, image_format, orientation), GOOD)
        for image_format in ("JPEG", "PNG", "WEBP", "TIFF")
        for orientation in range(1, 9)
    },
    "PNG with its orientation behind the pixels": (_late_exif, GOOD),
    "JPEG, progressive": (partial(_file, "JPEG", progressive=True), GOOD),
    **{f"JPEG {name}": (partial(_file, "JPEG", subsampling=name), GOOD) for name in ("4:4:4", "4:2:2", "4:2:0")},
    "JPEG with a restart interval": (partial(_file, "JPEG", restart_marker_blocks=2), GOOD),
    "JPEG with a film behind it": (lambda: _file("JPEG") + b"\0\0\0\x18ftypmp42" * 50, GOOD),
    **{
        f"{image_format} with {name} profile": (partial(_file, image_format, icc_profile=profile), GOOD)
        for image_format in ("JPEG", "PNG", "WEBP", "TIFF")
        for name, profile in ICC.items()
    },
    "PNG with a transparent colour": (partial(_file, "PNG", transparency=(1, 2, 3)), GOOD),
    "PNG with a transparent gray": (partial(_file, "PNG", "L", transparency=7), GOOD),
    "PNG with a palette's alphas": (partial(_file, "PNG", "P", transparency=bytes(range(256))), GOOD),
    "GIF with a transparent entry": (partial(_file, "GIF", "P", transparency=3), GOOD),
    **{
        f"animated {image_format}": (partial(_frames, image_format), GOOD)
        for image_format in ("GIF", "PNG", "WEBP", "TIFF", "AVIF")
    },
    "APNG with a default image": (partial(_frames, "PNG", default_image=True), GOOD),
    "stereo MPO": (partial(_frames, "MPO", 2), GOOD),
    **{
        f"{fraction:.0%} of a {image_format}": (partial(_cut, partial(_file, image_format), fraction), BAD)
        for image_format in CUT_FORMATS
        for fraction in (0.01, 0.1, 0.5, 0.9)
    },
    "half of a HEIC": (partial(_cut, _heic, 0.5), BAD),
    "half of a progressive JPEG": (partial(_cut, partial(_file, "JPEG", progressive=True), 0.5), RejectReason.TRUNCATED),
    "half of an LZW TIFF": (partial(_cut, partial(_file, "TIFF", compression="tiff_lzw"), 0.5), BAD),
    **{f"PNG with flipped bits {seed}": (partial(_flipped_bits, "PNG", seed), BAD) for seed in range(6)},
    **{
        f"{image_format} with flipped bits {seed}": (partial(_flipped_bits, image_format, seed), EITHER)
        for image_format in ("JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "JPEG2000")
        for seed in range(6)
    },
    "PNG bomb": (partial(_png, 50_000, 50_000, 8, 2, rows=b"\0" * 1000), RejectReason.TOO_MANY_PIXELS),
    "GIF bomb": (partial(_gif_of_size, 65_000, 65_000), RejectReason.TOO_MANY_PIXELS),
    "BMP bomb": (partial(_bmp_of_size, 60_000, 60_000), RejectReason.TOO_MANY_PIXELS),
    "JPEG bomb": (partial(_jpeg_of_size, 65_000, 65_000), RejectReason.TOO_MANY_PIXELS),
    "1 x 65000": (partial(_png, 1, 65_000, 8, 0), RejectReason.TOO_EXTREME_ASPECT),
    "9000 x 10": (partial(_png, 9_000, 10, 8, 0), RejectReason.TOO_EXTREME_ASPECT),
    "PNG with too few rows": (partial(_png, 64, 64, 8, 2, rows=b"\0" * 193), EITHER),
    "PNG whose rows do not fit its width": (partial(_png, 64, 64, 8, 2, rows=b"\7" * 64 * 193), BAD),
    "PNG of no width": (partial(_png, 0, 10, 8, 2), BAD),
    "1 x 1": (partial(_png, 1, 1, 8, 2), GOOD),
    "2 x 1": (partial(_png, 2, 1, 16, 6), GOOD),
    "JPEG that says it is larger": (partial(_jpeg_of_size, 300, 300), EITHER),
    "nothing": (lambda: b"", RejectReason.UNREADABLE),
    "one byte": (lambda: b"\xff", RejectReason.UNREADABLE),
    "zeros": (lambda: b"\0" * 5000, RejectReason.UNREADABLE),
    "text": (lambda: b"a photograph of a dog", RejectReason.UNREADABLE),
    "UTF-16 text": (lambda: "a photograph".encode("utf-16"), RejectReason.UNREADABLE),
    "HTML": (lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>", RejectReason.UNREADABLE),
    "JSON": (lambda: b'{"error": "access denied"}', RejectReason.UNREADABLE),
    "SVG": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', RejectReason.UNREADABLE),
    "PDF": (lambda: b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n", RejectReason.UNREADABLE),
    "EPS": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", RejectReason.UNREADABLE),
    "ZIP": (lambda: b"PK\3\4" + b"\0" * 60, RejectReason.UNREADABLE),
    "MP4": (lambda: b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + b"\0" * 99, RejectReason.UNREADABLE),
    "PNG signature alone": (lambda: b"\x89PNG\r\n\x1a\n", RejectReason.UNREADABLE),
    "JPEG signature alone": (lambda: b"\xff\xd8\xff\xe0", RejectReason.UNREADABLE),
    "WEBP signature alone": (lambda: b"RIFF\x10\0\0\0WEBPVP8 ", RejectReason.TRUNCATED),
    **{f"garbage {seed}": (partial(np.random.default_rng(seed).bytes, 3000), RejectReason.UNREADABLE) for seed in range(5)},
    **{
        f"garbage behind a {name} signature": (partial(lambda start: start + np.random.default_rng(9).bytes(2000), start), BAD)
        for name, start in {
            "PNG": b"\x89PNG\r\n\x1a\n",
            "JPEG": b"\xff\xd8\xff\xe0\0\x10JFIF\0",
            "GIF": b"GIF89a\x10\0\x10\0",
            "TIFF": b"II*\0\x08\0\0\0",
            "WEBP": b"RIFF\xc8\7\0\0WEBPVP8 ",
            "AVIF": b"\0\0\0\x1cftypavif",
            "HEIC": b"\0\0\0\x18ftypheic",
            "BMP": b"BM\0\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0",
            "JPEG2000": b"\0\0\0\x0cjP  \r\n\x87\n",
        }.items()
    },
}


# Several tests read each file.
GIVEN = {name: (functools.cache(build), expected) for name, (build, expected) in GIVEN.items()}


def test_the_corpus_is_large() -> None:
    assert len(GIVEN) >= 150


@pytest.mark.parametrize("name", GIVEN)
def test_every_file_ends_as_samples_or_as_one_reject(name: str) -> None:
    build, expected = GIVEN[name]
    # Nothing may depend on what a file is called.
    task = ImageTask(image=Blob(location="image.jpg", data=build()), mask=None, controls=(), recipe=RECIPE)
    probe, result = probe_image(task), prepare_image(task)
    if isinstance(result, ImageProblem):
        assert result.detail
        assert expected in (BAD, EITHER) or result.reason == expected, result
    else:
        assert isinstance(probe, Probe)
        assert expected in (GOOD, EITHER), "a damaged file gave samples"
        _check(result, probe)


def _check(prepared: PreparedImage, probe: Probe) -> None:
    assert (probe.width, probe.height) == (prepared.width, prepared.height)
    assert list(probe.placements) == [variant.placement for variant in prepared.variants]
    assert len(prepared.variants) == 2
    assert len(prepared.perceptual_hash) == 16
    for variant in prepared.variants:
        with Image.open(io.BytesIO(variant.data)) as image:
            assert image.size == (variant.placement.bucket_width, variant.placement.bucket_height)
            assert image.mode == "RGB"
            image.load()


def _image_for(part: bytes) -> bytes:
    """An image of the shape that a mask or control image has by its header."""
    try:
        width, height = open_image(part).image.size
    except Unfit:
        width, height = 80, 60
    buffer = io.BytesIO()
    _picture(width=min(width, 8 * height, 500), height=min(height, 8 * width, 500)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("role", ["mask", "control"])
@pytest.mark.parametrize("name", [name for name in GIVEN if "flipped" not in name and "orientation" not in name])
def test_every_file_ends_so_as_a_mask_or_control_too(name: str, role: str) -> None:
    build, expected = GIVEN[name]
    part = Blob(location="part", data=build())
    image = Blob(location="image", data=_image_for(build()))
    mask, controls = (part, ()) if role == "mask" else (None, (part,))
    result = prepare_image(ImageTask(image=image, mask=mask, controls=controls, recipe=RECIPE))
    if isinstance(result, ImageProblem):
        assert expected != GOOD, result
        assert result.reason == (RejectReason.MASK_UNREADABLE if role == "mask" else RejectReason.CONTROL_UNREADABLE)
    else:
        assert expected in (GOOD, EITHER)
        data = result.variants[0].mask if role == "mask" else result.variants[0].controls[0]
        assert data is not None
        with Image.open(io.BytesIO(data)) as stored:
            assert (stored.format, stored.mode) == ("PNG", "L" if role == "mask" else "RGB")


@pytest.mark.parametrize("name", [name for name in GIVEN if name.startswith("animated")])
def test_every_animation_can_be_rejected(name: str) -> None:
    recipe = ImageRecipe(**{**{field: getattr(RECIPE, field) for field in RECIPE.__slots__}, "animated": "reject"})
    task = ImageTask(image=Blob(location="x", data=GIVEN[name][0]()), mask=None, controls=(), recipe=recipe)
    for result in (probe_image(task), prepare_image(task)):
        assert isinstance(result, ImageProblem)
        assert result.reason == RejectReason.ANIMATED


@pytest.mark.parametrize("name", [name for name in GIVEN if "bomb" in name or "65000" in name])
def test_a_bomb_takes_no_memory(name: str) -> None:
    task = ImageTask(image=Blob(location="x", data=GIVEN[name][0]()), mask=None, controls=(), recipe=RECIPE)
    tracemalloc.start()
    try:
        prepare_image(task)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
