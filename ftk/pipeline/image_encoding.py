"""The bytes that a sample's pixels are stored as, and when the source's own bytes will do."""

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ftk.pipeline import png, resize
from ftk.pipeline.decode import Opened

_SUFFIXES = {"png": "png", "jpeg": "jpg", "webp": "webp"}
_JPEG_QUALITY = 95
# A PNG of these chunks alone is pixels and remarks on how to show them: no text, profile, orientation or animation.
_BARE_PNG_CHUNKS = frozenset({b"IHDR", b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"sBIT", b"bKGD"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """An image format (png, jpeg, webp) with its quality, 1 to 100; a quality of None is lossless."""

    image_format: str
    quality: int | None

    @property
    def suffix(self) -> str:
        """The suffix of such a file, without its dot."""
        return _SUFFIXES[self.image_format]


PNG = Encoding(image_format="png", quality=None)


def encoding_of(opened: Opened, image_format: str, quality: int | None) -> Encoding:
    """How this image's samples are stored; under `auto`, as JPEG where it had been lossy, else as PNG."""
    if image_format == "auto":
        image_format = "jpeg" if is_lossy(opened) else "png"
    if image_format == "jpeg":
        return Encoding(image_format="jpeg", quality=quality or _JPEG_QUALITY)
    return Encoding(image_format="webp", quality=quality) if image_format == "webp" else PNG


def is_lossy(opened: Opened) -> bool:
    """Whether the file's format had thrown detail away already.

    A WebP's header tells which kind it is. Of JPEG XL only those are known that were JPEG files.
    """
    if opened.image.format == "WEBP":
        return any(kind == b"VP8 " for kind in _webp_chunks(opened.data))
    if opened.image.format == "JXL":
        return bool(getattr(opened.image, "jpeg", False))
    return opened.image.format in ("JPEG", "MPO", "AVIF", "HEIF")


def encode(image: Image.Image, encoding: Encoding) -> bytes:
    """The bytes of an image file without metadata; equal pixels give equal bytes.

    JPEG keeps its colours at full resolution (4:4:4). PNG and lossless WebP are at levels that take 30 to 40 ms a megapixel.
    """
    if encoding.image_format == "png":
        array = np.asarray(image)
        return resize.png(array.reshape(image.height, image.width, -1))
    buffer = io.BytesIO()
    # What the picture remembers of its source (a profile) is written too by some of Pillow's encoders.
    image.info.clear()
    if encoding.image_format == "jpeg":
        image.save(buffer, "JPEG", quality=encoding.quality, subsampling="4:4:4")
    elif encoding.quality is None:
        image.save(buffer, "WEBP", lossless=True, quality=0, method=0)
    else:
        image.save(buffer, "WEBP", quality=encoding.quality, method=2)
    return buffer.getvalue()


def copied_suffix(opened: Opened, image_format: str) -> str | None:
    """The suffix under which the file's own bytes can stand for its pixels in a dataset of this `image_format`, or None.

    They can where the format is the one that is asked for (any of JPEG, PNG and WebP under `auto`) and the file is nothing
    but 8-bit RGB pixels. One with EXIF, XMP, a comment, a profile or bytes behind its end is encoded anew: a dataset that
    is passed on must not tell where its photographs were taken.
    """
    found = (opened.image.format or "").lower()
    if opened.image.mode != "RGB" or found not in _SUFFIXES or image_format not in ("auto", found):
        return None
    is_bare = {"jpeg": _is_bare_jpeg, "png": _is_bare_png, "webp": _is_bare_webp}[found]
    return _SUFFIXES[found] if is_bare(opened) else None


def _is_bare_jpeg(opened: Opened) -> bool:
    segments = getattr(opened.image, "applist", [("", b"")])
    is_plain = all(
        (name == "APP0" and data.startswith(b"JFIF\0")) or (name == "APP14" and data.startswith(b"Adobe"))
        for name, data in segments
    )
    return is_plain and "comment" not in opened.image.info and opened.data.endswith(b"\xff\xd9")


def _is_bare_webp(opened: Opened) -> bool:
    return list(_webp_chunks(opened.data)) in ([b"VP8 "], [b"VP8L"])


def _is_bare_png(opened: Opened) -> bool:
    data = opened.data
    chunks = list(png.chunks(data))
    bits, colour_type = data[24], data[25]
    is_bare = {kind for kind, _, _ in chunks} <= _BARE_PNG_CHUNKS and (bits, colour_type) == (8, 2)
    return is_bare and chunks[-1][2] + 4 == len(data)


def _webp_chunks(data: bytes) -> Iterator[bytes]:
    """The kinds of a WebP file's chunks, those of its frames among them; `TAIL` for bytes that belong to none."""
    position = 12
    while position + 8 <= len(data):
        kind, length = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], "little")
        yield kind
        # A frame of an animation has 16 bytes of its own, then chunks.
        position += 8 + (16 if kind == b"ANMF" else length + length % 2)
    if position != len(data):
        yield b"TAIL"
