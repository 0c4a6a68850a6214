"""Which files hold an image, by their first bytes."""

import io
from typing import Any

import pytest
from PIL import Image

from ftk.pipeline import signatures

OF_PILLOW: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(("JPEG", "PNG", "GIF", "TIFF", "BMP", "AVIF", "DDS", "QOI", "ICO", "ICNS"), ("", {})),
    "MPO": ("JPEG", {}),
    "WEBP": ("WebP", {}),
    "PPM": ("PNM", {}),
    "JPEG2000": ("JPEG 2000", {}),
}


@pytest.mark.parametrize("image_format", OF_PILLOW)
def test_what_pillow_writes_is_known(image_format: str) -> None:
    buffer = io.BytesIO()
    name, options = OF_PILLOW[image_format]
    Image.effect_noise((64, 64), 90).convert("RGB").save(buffer, image_format, **options)
    assert signatures.name(buffer.getvalue()[: signatures.HEAD_BYTES]) == (name or image_format)


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "camera raw"),
        (b"\xff\x0a\xfa\x1f\x01", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl ", "JPEG XL"),
        (b"8BPS\0\x01\0\0\0\0\0\0\0\3", "Photoshop"),
        (b"v/1\x01\x02\0\0\0", "OpenEXR"),
        (b"FUJIFILMCCD-RAW 0201", "camera raw"),
        (b"IIU\0\x18\0\0\0", "camera raw"),
    ],
)
def test_other_images_are_known(head: bytes, name: str) -> None:
    assert signatures.name(head) == name


@pytest.mark.parametrize(
    "head",
    [
        *(b"", b"\xff", b"\xff\xd8", b"a cat on a wall", "Ein Hündchen".encode(), "a cat".encode("utf-16"), b"P5 is a console"),
        *(b"BMW, parked", b"BM\n2024", b"RIFF\x24\0\0\0WAVEfmt ", b"\0\0\0\x18ftypmp42", b"\0\0\0\x14ftypqt  ", b"PK\3\4"),
        *(b"%PDF-1.7", b"{}", b"\x1f\x8b\x08", b"\x93NUMPY\1\0", b"\0" * 32, b"PAR1", b"SQLite format 3\0"),
    ],
)
def test_what_is_no_image_is_none(head: bytes) -> None:
    assert signatures.name(head[: signatures.HEAD_BYTES]) is None


def test_suffixes_of_other_files_are_in_small_letters_and_none_is_an_images() -> None:
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in signatures.OTHER_SUFFIXES)
    assert not {suffix.lower() for suffix in Image.registered_extensions()} & signatures.OTHER_SUFFIXES - {".pdf"}
