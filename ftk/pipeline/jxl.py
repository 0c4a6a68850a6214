"""JPEG XL, where `pillow-jxl-plugin` is installed: under the GPL, it is an extra."""

import io

from PIL import Image

CONTAINER = b"\0\0\0\x0cJXL \r\n\x87\n"
CODESTREAM = b"\xff\x0a"
# Width to height, by the header's number for it (ISO/IEC 18181-1, SizeHeader).
_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def is_jxl(data: bytes) -> bool:
    """Whether a file begins as JPEG XL does."""
    return data.startswith((CONTAINER, CODESTREAM))


def open_image(data: bytes) -> Image.Image:
    """The image, decoded at once: `ImportError` without the plugin, `RuntimeError` for a cut or damaged file."""
    from pillow_jxl import JpegXLImagePlugin

    JpegXLImagePlugin.DECODE_THREADS = 0  # one core a worker
    image: Image.Image = JpegXLImagePlugin.JXLImageFile(io.BytesIO(data))
    return image


def size(data: bytes) -> tuple[int, int] | None:
    """(width, height) by the header, before any turn by a quarter; None when there is none to read."""
    start = _codestream(data)
    if start is None or data[start : start + 2] != CODESTREAM or len(data) < start + 12:
        return None
    bits = _Bits(int.from_bytes(data[start + 2 : start + 14], "little"))
    is_small = bool(bits.take(1))
    height = _side(bits, is_small)
    ratio = bits.take(3)
    if ratio == 0:
        return _side(bits, is_small), height
    across, down = _RATIOS[ratio - 1]
    return height * across // down, height


class _Bits:
    """Numbers of so many bits each, the lowest first."""

    def __init__(self, value: int) -> None:
        self._value = value

    def take(self, count: int) -> int:
        taken = self._value & ((1 << count) - 1)
        self._value >>= count
        return taken


def _side(bits: _Bits, is_small: bool) -> int:
    if is_small:
        return 8 * (1 + bits.take(5))
    return 1 + bits.take((9, 13, 18, 30)[bits.take(2)])


def _codestream(data: bytes) -> int | None:
    """Where the codestream begins: at the front, or in the first box that holds some of it."""
    if not data.startswith(CONTAINER):
        return 0
    position = 0
    while position + 8 <= len(data):
        length, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        header = 8
        if length == 1:
            length, header = int.from_bytes(data[position + 8 : position + 16], "big"), 16
        if kind in (b"jxlc", b"jxlp"):
            return position + header + (4 if kind == b"jxlp" else 0)
        if length < header:
            return None
        position += length
    return None
