"""Decoding: every pixel format has one defined 8-bit sRGB picture, upright, or a reason why not."""

import io
import struct
import sys
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin

from ftk.contracts import RejectReason
from ftk.pipeline import decode, png
from ftk.pipeline.decode import Unfit, is_animated, open_image
from ftk.pipeline.render import Rendering

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
WHITE = (255, 255, 255)

Encoded = Callable[..., bytes]
Noise = Callable[..., Image.Image]


def _pixels(data: bytes, background: tuple[int, int, int] = WHITE, *, is_mask: bool = False, **options: Any) -> np.ndarray:
    """The pixels at the image's own size."""
    opened = open_image(data)
    picture = Rendering(opened, is_mask=is_mask, background=background, **{"max_pixels": 1_000_000, **options})
    image = picture.at(opened.width, opened.height)
    assert image.mode == ("L" if is_mask else "RGB")
    return np.asarray(image).astype(int)


def _refused(data: bytes) -> Unfit:
    with pytest.raises(Unfit) as caught:
        _pixels(data)
    assert caught.value.detail
    return caught.value


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def _oriented(image: Image.Image, orientation: int, encoded: Encoded, image_format: str) -> bytes:
    how = STORED_AS[orientation]
    lossless = {"lossless": True, "exact": True} if image_format == "WEBP" else {}
    quality = {"quality": 100, "subsampling": 0} if image_format == "JPEG" else {}
    stored = image if how is None else image.transpose(how)
    return encoded(stored, image_format, exif=_exif(orientation), **lossless, **quality)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, row: bytes, bits: int = 8, colour: int = 2, transparent: bytes | None = None) -> bytes:
    """A PNG of equal rows, in any bit depth."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    extra = _chunk(b"tRNS", transparent) if transparent is not None else b""
    rows = _chunk(b"IDAT", zlib.compress((b"\0" + row) * height))
    return png.SIGNATURE + header + extra + rows + _chunk(b"IEND", b"")


def _display_p3() -> bytes:
    """A small ICC profile with the primaries of Display P3 (adapted to D50) and a gamma of 2.2."""
    tags = {
        b"rXYZ": _xyz(0.5151, 0.2412, -0.0011),
        b"gXYZ": _xyz(0.2920, 0.6922, 0.0419),
        b"bXYZ": _xyz(0.1571, 0.0666, 0.7841),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _gamma(2.2)),
    }
    return _profile(b"RGB ", tags)


def _gray_gamma(gamma: float) -> bytes:
    return _profile(b"GRAY", {b"kTRC": _gamma(gamma)})


def _fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(*values)


def _gamma(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def _profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + b"\0" * 78 + b"\0\0\0",
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"wtpt": _xyz(0.9642, 1.0, 0.8249),
        **tags,
    }
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"\0" * 4, 0x02400000, b"mntr", space, b"XYZ ")
    header += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + _fixed(0.9642, 1.0, 0.8249)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


# --- Orientation ---


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_every_exif_orientation_gives_the_same_upright_picture(
    noise_image: Noise, encoded: Encoded, orientation: int, image_format: str
) -> None:
    upright = noise_image(48, 32).resize((96, 64), Image.Resampling.BICUBIC)
    data = _oriented(upright, orientation, encoded, image_format)
    opened = open_image(data)
    assert (opened.width, opened.height) == (96, 64)
    tolerance = 12 if image_format == "JPEG" else 0
    assert np.abs(_pixels(data) - np.asarray(upright)).max() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_a_resized_picture_is_upright_too(noise_image: Noise, encoded: Encoded, orientation: int, image_format: str) -> None:
    upright = noise_image(30, 20).resize((300, 200), Image.Resampling.BICUBIC)
    opened = open_image(_oriented(upright, orientation, encoded, image_format))
    small = Rendering(opened, max_pixels=1_000_000).at(60, 40)
    expected = upright.resize((60, 40), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(small).astype(int) - np.asarray(expected)).max() <= 6


@pytest.mark.parametrize("kind", ["eXIf", "iTXt"])
def test_an_orientation_behind_the_pixels_of_a_png_counts_and_decodes_nothing(
    noise_image: Noise, encoded: Encoded, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upright = noise_image(40, 20)
    plain = encoded(upright.transpose(Image.Transpose.ROTATE_90), "PNG")
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0" + b'<x tiff:Orientation="6"/>'
    late = _chunk(b"eXIf", _exif(6).tobytes()[6:]) if kind == "eXIf" else _chunk(b"iTXt", xmp)
    data = plain[:-12] + late + plain[-12:]
    assert np.array_equal(_pixels(data), np.asarray(upright))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("the pixels were decoded"))
    assert (open_image(data).width, open_image(data).height) == (40, 20)


@pytest.mark.parametrize("orientation", [0, 9, 4711])
def test_an_orientation_that_means_nothing_turns_nothing(noise_image: Noise, encoded: Encoded, orientation: int) -> None:
    image = noise_image(40, 20)
    assert np.array_equal(_pixels(encoded(image, "PNG", exif=_exif(orientation))), np.asarray(image))


def test_damaged_exif_does_not_cost_the_picture(noise_image: Noise, encoded: Encoded) -> None:
    image = noise_image(40, 20)
    for exif in (b"Exif\0\0garbage", b"Exif\0\0MM\0*\xff\xff\xff\xff"):
        assert np.array_equal(_pixels(encoded(image, "PNG", exif=exif)), np.asarray(image))


# --- Pixel formats ---


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_gray_and_palette_become_rgb(encoded: Encoded, mode: str) -> None:
    image = Image.new("L", (64, 64), 0)
    image.paste(255, (0, 0, 32, 64))
    pixels = _pixels(encoded(image.convert(mode), "PNG"))
    assert pixels[:, 10].min() == 255
    assert pixels[:, 50].max() == 0


def test_a_coloured_palette_keeps_its_colours(encoded: Encoded) -> None:
    image = Image.new("P", (64, 64), 1)
    image.putpalette([0, 0, 0, 12, 34, 56])
    assert (_pixels(encoded(image, "PNG")) == [12, 34, 56]).all()


@pytest.mark.parametrize(
    ("mode", "colour", "image_format", "expected"),
    [
        ("CMYK", (0, 255, 255, 0), "JPEG", (255, 0, 0)),
        ("CMYK", (0, 255, 255, 0), "TIFF", (255, 0, 0)),
        ("CMYK", (0, 0, 0, 128), "TIFF", (127, 127, 127)),
        ("YCbCr", (76, 85, 255), "TIFF", (254, 0, 0)),
        ("LAB", (255, 128, 128), "TIFF", (255, 255, 255)),
        ("LAB", (137, 128, 128), "TIFF", (128, 128, 128)),
        ("RGBX", (10, 20, 30, 0), "TIFF", (10, 20, 30)),
    ],
)
def test_other_colour_spaces_become_rgb(
    encoded: Encoded, mode: str, colour: tuple[int, ...], image_format: str, expected: tuple[int, ...]
) -> None:
    options = {"quality": 100} if image_format == "JPEG" else {}
    pixels = _pixels(encoded(Image.new(mode, (64, 64), colour), image_format, **options))
    assert np.abs(pixels - expected).max() <= 3


def test_16_bit_values_keep_their_high_byte(encoded: Encoded) -> None:
    values = np.array([[0x0000, 0x00FF, 0x0100, 0x12FF, 0xFFFF]] * 8, np.uint16)
    for stored in (
        _png(5, 8, values[0].astype(">u2").tobytes(), bits=16, colour=0),
        encoded(Image.fromarray(values), "TIFF"),
    ):
        assert _pixels(stored)[3, :, 0].tolist() == [0, 0, 1, 0x12, 0xFF]
    rgb = _png(2, 8, bytes.fromhex("12ff 3400 56ab") * 2, bits=16, colour=2)
    assert (_pixels(rgb) == [0x12, 0x34, 0x56]).all()
    gray_alpha = _png(2, 8, bytes.fromhex("12ff ffff") * 2, bits=16, colour=4)
    assert (_pixels(gray_alpha) == 0x12).all()
    rgba = _png(2, 8, bytes.fromhex("12ff 3400 56ab 0000") * 2, bits=16, colour=6)
    assert (_pixels(rgba, (9, 8, 7)) == [9, 8, 7]).all()


def test_integers_are_read_as_16_bits_and_floats_as_0_to_1(encoded: Encoded) -> None:
    integers = Image.fromarray(np.array([[0, 255, 256, 65535]], np.int32).repeat(4, 0))
    floats = Image.fromarray(np.array([[0, 0.25, 0.5, 1]], np.float32).repeat(4, 0))
    assert _pixels(encoded(integers, "TIFF"))[0, :, 0].tolist() == [0, 0, 1, 255]
    assert _pixels(encoded(floats, "TIFF"))[0, :, 0].tolist() == [0, 64, 128, 255]


@pytest.mark.parametrize(
    ("values", "detail"),
    [
        (np.array([[-1, 5]], np.int32), "from -1 to 5: integers are read from 0 to 65535"),
        (np.array([[0, 65536]], np.int32), "from 0 to 65536"),
        (np.array([[0, 255]], np.float32), "from 0 to 255: floats are read from 0 to 1"),
        (np.array([[0, np.nan]], np.float32), "nan"),
    ],
)
def test_values_without_a_defined_8_bit_meaning_are_refused(encoded: Encoded, values: np.ndarray, detail: str) -> None:
    refused = _refused(encoded(Image.fromarray(values.repeat(4, 0)), "TIFF"))
    assert refused.reason == RejectReason.UNREADABLE
    assert detail in refused.detail


@pytest.mark.parametrize("image_format", ["AVIF", "WEBP", "JPEG", "JPEG2000", "GIF", "BMP", "TGA", "PPM", "ICO", "DDS"])
def test_a_picture_survives_each_format(encoded: Encoded, image_format: str) -> None:
    image = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    image.paste((200, 30, 30), (0, 0, 16, 16))
    assert np.abs(_pixels(encoded(image, image_format)) - np.asarray(image)).mean() < 4


def test_heic_is_decoded_where_its_package_is_installed(encoded: Encoded) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    image = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image.transpose(Image.Transpose.ROTATE_90)).save(buffer, quality=95)
    assert open_image(buffer.getvalue()).image.format == "HEIF"
    assert np.abs(_pixels(buffer.getvalue()) - np.asarray(image.transpose(Image.Transpose.ROTATE_90))).mean() < 3


def test_heic_without_its_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    refused = _refused(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 64)
    assert refused.reason == RejectReason.UNREADABLE
    assert "pip install pillow-heif" in refused.detail


@pytest.mark.parametrize("kind", ["DNG", "CR2", "preview"])
def test_the_preview_of_camera_raw_data_is_no_picture(encoded: Encoded, kind: str) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    if kind == "DNG":
        tags[50706] = b"\1\4\0\0"
    elif kind == "preview":
        # As in Nikon's and Sony's files: the first picture is a small copy of one that tag 330 names.
        tags[254], tags[330] = 1, 8
    # Compressed, the directory lies at the end, and Canon's mark has its place at the front.
    compression = "tiff_lzw" if kind == "CR2" else None
    data = encoded(Image.new("RGB", (64, 64)), "TIFF", tiffinfo=tags, compression=compression)
    data = data[:8] + b"CR" + data[10:] if kind == "CR2" else data
    refused = _refused(data)
    assert refused.reason == RejectReason.UNREADABLE
    assert "camera raw" in refused.detail


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"v/1\x01\x02\0\0\0" + b"\0" * 99, "OpenEXR"),
        (b"FUJIFILMCCD-RAW 0201" + b"\0" * 99, "camera raw"),
        (b"II\xbc\x01" + b"\0" * 99, "JPEG XR"),
    ],
)
def test_an_image_that_is_not_read_is_named(data: bytes, kind: str) -> None:
    refused = _refused(data)
    assert refused.reason == RejectReason.UNREADABLE
    assert kind in refused.detail


def test_eps_is_refused_and_no_program_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was run"))
    refused = _refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n")
    assert refused.reason == RejectReason.UNREADABLE
    assert "EPS" in refused.detail


# --- Transparency ---


def test_transparency_shows_the_background(encoded: Encoded) -> None:
    image = Image.new("RGBA", (64, 64), (10, 20, 30, 255))
    image.paste((200, 0, 0, 0), (0, 0, 32, 64))
    image.paste((0, 0, 0, 128), (0, 0, 64, 8))
    pixels = _pixels(encoded(image, "PNG"), (0, 255, 100))
    assert pixels[40, 10].tolist() == [0, 255, 100]
    assert pixels[40, 50].tolist() == [10, 20, 30]
    assert np.abs(pixels[4, 10] - [0, 127, 50]).max() <= 1


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_shows_the_background(encoded: Encoded, mode: str) -> None:
    image = Image.new("L", (64, 64), 0)
    image.paste(255, (32, 0, 64, 64))
    transparent: Any = (0, 0, 0) if mode == "RGB" else 0
    pixels = _pixels(encoded(image.convert(mode), "PNG", transparency=transparent), (9, 99, 199))
    assert pixels[32, 10].tolist() == [9, 99, 199]
    assert pixels[32, 50].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("bits", "row", "transparent"),
    [
        (1, b"\x0f", b"\0\1"),
        (2, b"\x00\x00\xaa\xaa", b"\0\2"),
        (4, b"\x00\x00\x55\x55", b"\0\5"),
        (16, b"\0\0" * 4 + b"\1\2" * 4, b"\1\2"),
    ],
)
def test_the_transparent_gray_of_every_bit_depth_shows_the_background(bits: int, row: bytes, transparent: bytes) -> None:
    width = 8 if bits != 2 else 16
    pixels = _pixels(_png(width, 8, row, bits=bits, colour=0, transparent=transparent), (9, 99, 199))
    assert (pixels[:, : width // 2] == 0).all()
    assert (pixels[:, width // 2 :] == [9, 99, 199]).all()


def test_16_bit_gray_beside_the_transparent_one_stays(encoded: Encoded) -> None:
    pixels = _pixels(_png(2, 8, b"\x50\2\x50\3", bits=16, colour=0, transparent=b"\x50\2"), (9, 99, 199))
    assert pixels[0].tolist() == [[9, 99, 199], [0x50, 0x50, 0x50]]


def test_the_transparent_colour_of_a_16_bit_png_shows_the_background() -> None:
    row = bytes.fromhex("1234 5678 9abc") + bytes.fromhex("ffff ffff ffff")
    pixels = _pixels(_png(2, 8, row, bits=16, colour=2, transparent=row[:6]), (1, 2, 3))
    assert pixels[0].tolist() == [[1, 2, 3], [255, 255, 255]]


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBa", "La"])
def test_rarer_kinds_of_alpha_show_the_background(mode: str) -> None:
    image = Image.new("LA", (8, 8), (100, 255))
    image.paste((100, 0), (0, 0, 4, 8))
    if mode in ("La", "RGBa"):
        image = image.convert(mode) if mode == "La" else image.convert("RGBA").convert(mode)
    elif mode == "PA":
        image = image.convert("RGBA").convert("PA")
    assert image.mode == mode
    pixels = _flat(image, (9, 99, 199))
    assert pixels[0, 1].tolist() == [9, 99, 199]
    assert np.abs(pixels[0, 6] - 100).max() <= 1


def _flat(image: Image.Image, background: tuple[int, int, int]) -> np.ndarray:
    opened = decode.Opened(data=b"", image=image, orientation=1, width=image.width, height=image.height)
    pixels = decode.decode(opened, background, max_pixels=1_000_000, to_srgb=False)
    return np.asarray(decode.to_srgb(decode.as_image(pixels.array_HWC), pixels.profile)).astype(int)


def test_an_alpha_channel_that_hides_nothing_changes_nothing(noise_image: Noise, encoded: Encoded) -> None:
    image = noise_image(64, 64)
    data = encoded(image.convert("RGBA"), "PNG", icc_profile=_display_p3())
    assert np.array_equal(_pixels(data), _pixels(encoded(image, "PNG", icc_profile=_display_p3())))


def test_the_last_rows_of_a_large_picture_are_converted_too(encoded: Encoded, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.linear_gradient("L").convert("RGBA")
    image.putalpha(Image.linear_gradient("L").rotate(90))
    whole = _pixels(encoded(image, "PNG"))
    monkeypatch.setattr(decode, "_STRIP_PIXELS", 7 * 256)
    assert np.array_equal(_pixels(encoded(image, "PNG")), whole)


# --- Colour profiles ---


def test_display_p3_is_converted_to_srgb(encoded: Encoded) -> None:
    image = Image.new("RGB", (64, 64), (200, 100, 100))
    assert _pixels(encoded(image, "PNG"))[32, 32].tolist() == [200, 100, 100]
    # The same coordinates mean a more saturated red in P3 than in sRGB.
    assert _pixels(encoded(image, "PNG", icc_profile=_display_p3()))[32, 32].tolist() == [216, 93, 97]


@pytest.mark.parametrize("mode", ["RGBA", "P", "P with transparency"])
def test_the_profile_is_applied_with_transparency_and_palettes_too(encoded: Encoded, mode: str) -> None:
    image = Image.new("RGB", (8, 8), (200, 100, 100))
    image.putpixel((0, 0), (0, 0, 0))
    expected = _pixels(encoded(image, "PNG", icc_profile=_display_p3()))[4, 4].tolist()
    same = image.quantize(4) if mode.startswith("P") else image.convert(mode)
    options = {"transparency": same.getpixel((0, 0))} if "with" in mode else {}
    if mode == "RGBA":
        same.putpixel((0, 0), (0, 0, 0, 0))
    pixels = _pixels(encoded(same, "PNG", icc_profile=_display_p3(), **options), (1, 2, 3))
    assert pixels[4, 4].tolist() == expected
    assert pixels[0, 0].tolist() == ([0, 0, 0] if mode == "P" else [1, 2, 3]), "the background is in sRGB already"


@pytest.mark.parametrize(("mode", "image_format"), [("L", "PNG"), ("L", "JPEG"), ("LA", "PNG"), ("1", "PNG")])
def test_a_gray_profile_is_applied(encoded: Encoded, mode: str, image_format: str) -> None:
    image = Image.new("L", (16, 16), 255 if mode == "1" else 128).convert(mode)
    pixels = _pixels(encoded(image, image_format, icc_profile=_gray_gamma(1.0)))
    # Half the light is 188 in sRGB.
    assert np.abs(pixels - (255 if mode == "1" else 188)).max() <= 1


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_the_profile_outlives_resize_and_rotation(encoded: Encoded, orientation: int, image_format: str) -> None:
    image = Image.new("RGB", (300, 200), (200, 100, 100))
    data = encoded(image, image_format, icc_profile=_display_p3(), exif=_exif(orientation))
    opened = open_image(data)
    small = Rendering(opened, max_pixels=1_000_000).at(opened.width // 5, opened.height // 5)
    assert np.abs(np.asarray(small).astype(int) - [216, 93, 97]).max() <= 2


def test_an_srgb_profile_changes_nothing(noise_image: Noise, encoded: Encoded) -> None:
    image = noise_image(64, 64)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.abs(_pixels(encoded(image, "PNG", icc_profile=profile)) - np.asarray(image)).max() <= 1


@pytest.mark.parametrize("kind", ["garbage", "of another colour space"])
def test_a_useless_profile_is_ignored(noise_image: Noise, encoded: Encoded, kind: str) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    profile = b"garbage" * 40 if kind == "garbage" else lab
    image = noise_image(64, 64)
    assert np.array_equal(_pixels(encoded(image, "PNG", icc_profile=profile)), np.asarray(image))


# --- Several frames, masks, bombs ---


@pytest.mark.parametrize("image_format", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_first_frame_of_several_counts(encoded: Encoded, image_format: str) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("#ff0000", "#00ff00", "#0000ff")]
    data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:])
    assert is_animated(open_image(data))
    assert np.abs(_pixels(data) - [255, 0, 0]).max() <= 3
    assert not is_animated(open_image(encoded(frames[0], image_format)))


def test_a_stereo_photograph_is_a_still(encoded: Encoded) -> None:
    views = [Image.new("RGB", (64, 64), colour) for colour in ("#ff0000", "#00ff00")]
    opened = open_image(encoded(views[0], "MPO", save_all=True, append_images=views[1:]))
    assert opened.image.format == "MPO"
    assert not is_animated(opened)


def test_a_masks_values_are_data(encoded: Encoded) -> None:
    mask = Image.linear_gradient("L")
    values = np.asarray(mask).astype(int)
    profile = {"icc_profile": _gray_gamma(1.0)}
    assert np.array_equal(_pixels(encoded(mask, "PNG", **profile), is_mask=True), values)
    transparent = Image.merge("LA", (mask, Image.new("L", mask.size, 0)))
    assert np.array_equal(_pixels(encoded(transparent, "PNG"), is_mask=True), values)
    assert np.array_equal(_pixels(encoded(mask.convert("RGB"), "PNG"), is_mask=True), values)
    assert np.array_equal(_pixels(encoded(mask.convert("P"), "PNG", transparency=0), is_mask=True), values)
    deep = Image.fromarray((values * 256 + 77).astype(np.uint16))
    assert np.array_equal(_pixels(encoded(deep, "PNG"), is_mask=True), values)
    hard = mask.point(lambda value: 255 * (value > 99)).convert("1")
    assert np.array_equal(_pixels(encoded(hard, "PNG"), is_mask=True), 255 * (values > 99))


def _shape() -> Image.Image:
    return Image.linear_gradient("L").resize((64, 64))


@pytest.mark.parametrize("colour", ["white", "black", (200, 30, 30)])
@pytest.mark.parametrize(
    ("mode", "image_format", "options"),
    [
        ("RGBA", "PNG", {}),
        ("RGBA", "TIFF", {}),
        ("RGBA", "WEBP", {"lossless": True, "exact": True}),
        ("LA", "PNG", {}),
        ("P", "PNG", {"transparency": bytes(range(256))}),
    ],
)
def test_a_mask_whose_shape_is_in_its_alpha_channel_alone_is_that(
    encoded: Encoded, colour: Any, mode: str, image_format: str, options: dict[str, Any]
) -> None:
    image = Image.new("RGBA", (64, 64), colour)
    flat = image.getpixel((0, 0))
    image.putalpha(_shape())
    image = image if mode == "P" else image.convert(mode)
    if mode == "P":
        # A palette of one colour, in 256 opacities.
        image = _shape().copy()
        image.putpalette([*flat[:3]] * 256)
    assert np.array_equal(_pixels(encoded(image, image_format, **options), is_mask=True), np.asarray(_shape()))


def test_what_is_invisible_has_no_colour(encoded: Encoded) -> None:
    # A soft white brush on an empty canvas, as painting programs store it: black where nothing was painted.
    alpha = np.asarray(_shape())
    pixels = np.where(alpha[..., None] > 0, [255, 255, 255, 0], [0, 0, 0, 0]).astype(np.uint8)
    pixels[..., 3] = alpha
    assert np.array_equal(_pixels(encoded(Image.fromarray(pixels), "PNG"), is_mask=True), alpha)
    lossy = _pixels(encoded(Image.fromarray(pixels), "WEBP", quality=60), is_mask=True)
    assert np.abs(lossy - alpha.astype(int)).mean() < 4


def test_a_mask_that_is_drawn_in_its_colours_ignores_alpha(encoded: Encoded) -> None:
    halves = Image.new("L", (64, 64))
    halves.paste(255, (0, 0, 32, 64))
    for alpha in (_shape(), Image.new("L", (64, 64), 0), Image.new("L", (64, 64), 90), Image.new("L", (64, 64), 255)):
        data = encoded(Image.merge("LA", (halves, alpha)), "PNG")
        assert np.array_equal(_pixels(data, is_mask=True), np.asarray(halves))
    # Neither has a shape: an opaque colour is what it is.
    for level in (0, 255):
        flat = Image.new("LA", (64, 64), (level, 255))
        assert (_pixels(encoded(flat, "PNG"), is_mask=True) == level).all()


def test_a_transparent_colour_can_draw_a_mask_too(encoded: Encoded) -> None:
    halves = Image.new("L", (64, 64))
    halves.paste(1, (0, 0, 32, 64))
    expected = np.asarray(halves) * 255
    assert np.array_equal(_pixels(encoded(halves, "PNG", transparency=0), is_mask=True), expected)
    deep = np.asarray(halves).astype(">u2")
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in deep))
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 16, 0, 0, 0, 0))
    data = png.SIGNATURE + header + _chunk(b"tRNS", b"\0\0") + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")
    assert np.array_equal(_pixels(data, is_mask=True), expected)


def test_a_larger_image_inside_a_container_is_a_bomb() -> None:
    inside = _png(3000, 3000, b"\0" * 9000)
    icon = b"icns" + struct.pack(">I", len(inside) + 16) + b"ic07" + struct.pack(">I", len(inside) + 8) + inside
    assert (open_image(icon).width, open_image(icon).height) == (128, 128)
    assert _refused(icon).reason == RejectReason.TOO_MANY_PIXELS
