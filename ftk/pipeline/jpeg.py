"""JPEG files decoded by libjpeg-turbo, as strictly as it allows.

libjpeg fills what is missing of a JPEG with grey, and only remarks on it. Pillow and libvips do not pass on every remark: half
a JPEG with an end marker behind it looks whole, and so may one of which a block was overwritten. Pixels are Pillow's, bit by
bit.
"""

import contextlib
import re

import numpy as np
import simplejpeg

from ftk.pipeline import light_vips

_END = b"\xff\xd9"
# Remarks on headers. libjpeg decodes everything after them, and cameras write such files.
_BAD_SCAN = "Invalid SOS parameters"
_HARMLESS = (
    *(_BAD_SCAN, "Unknown Adobe color transform", "unknown JFIF revision", "Inconsistent progression sequence"),
    "bad ICC marker",
)
_EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker 0x([0-9a-f]{2})")
# APP0 to APP15, COM, DQT and DRI: what stands before these is no part of the pixels.
_HEADER_MARKERS = frozenset({*range(0xE0, 0xF0), 0xFE, 0xDB, 0xDD})
_END_MARKER = 0xD9
# Some cameras pad the pixels. Much more than that is left where damage has put the decoder out of step.
_PADDING_BYTES = 16


class DamagedJpegError(Exception):
    """A JPEG of which pixels are missing or wrong; the text is libjpeg's."""


def decode(data: bytes, shrink: int = 1) -> np.ndarray | None:
    """The pixels [H,W,C] in uint8: 1 (gray), 3 (RGB) or 4 (CMYK) channels. None of a kind of JPEG that is not decoded here.

    A file that lacks only its end marker is whole.

    Args:
        shrink: divides the sides, rounded up: 1, 2, 4 or 8.

    Raises:
        DamagedJpegError: the file is cut or damaged.
    """
    whole = _ended(data)
    # TurboJPEG finds more damage, and does not know every way to subsample colours.
    for decoder in (_by_turbojpeg, _by_libvips):
        try:
            return decoder(whole, shrink, strict=True)
        except ValueError as error:
            remark = str(error)
        if _BAD_SCAN in remark and (mended := _with_usual_scan(whole)) != whole:
            return decode(mended, shrink)
        with contextlib.suppress(ValueError):
            pixels = decoder(whole, shrink, strict=False)
            if not _is_harmless(remark):
                raise DamagedJpegError(remark)
            return pixels
    return None


def _ended(data: bytes) -> bytes:
    return data if data.endswith(_END) else data + _END


def _with_usual_scan(data: bytes) -> bytes:
    """The file with the parameters that the scan of a sequential JPEG has.

    Some telephones write others, which decoders ignore. libjpeg gives its first remark alone: this one would hide the next.
    """
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if data[position + 1] == 0xDA:
            return _ended(data[: end - 3] + b"\0\x3f\0" + data[end:])
        position = end
    return data


def _by_turbojpeg(data: bytes, shrink: int, *, strict: bool) -> np.ndarray:
    try:
        height, width, stored_as, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except LookupError:
        raise ValueError("a header or subsampling that TurboJPEG does not know") from None
    colours = {"Gray": "GRAY", "CMYK": "CMYK", "YCCK": "CMYK"}.get(stored_as, "RGB")
    least = (-(-height // shrink), -(-width // shrink)) if shrink > 1 else (0, 0)
    pixels: np.ndarray = simplejpeg.decode_jpeg(
        data, colours, min_height=least[0], min_width=least[1], min_factor=1, strict=strict
    )
    # Adobe's programs store CMYK inverted, and all others do as they do.
    return 255 - pixels if colours == "CMYK" else pixels


def _by_libvips(data: bytes, shrink: int, *, strict: bool) -> np.ndarray:
    vips = light_vips.load()
    # Remarks on earlier images, which nobody asked for, would be part of this one's.
    vips.vips_lib.vips_error_clear()
    options = {"shrink": shrink} if shrink > 1 else {}
    try:
        image = vips.Image.jpegload_buffer(data, fail_on="warning" if strict else "error", access="sequential", **options)
        return np.frombuffer(image.write_to_memory(), np.uint8).reshape(image.height, image.width, image.bands)
    except vips.Error as error:
        raise ValueError(str(error).strip().rpartition("VipsJpeg:")[2].strip()) from None


def _is_harmless(remark: str) -> bool:
    extraneous = _EXTRANEOUS.search(remark)
    if extraneous is None:
        return any(harmless in remark for harmless in _HARMLESS)
    num_bytes, marker = int(extraneous[1]), int(extraneous[2], 16)
    return marker in _HEADER_MARKERS or (marker == _END_MARKER and num_bytes <= _PADDING_BYTES)
