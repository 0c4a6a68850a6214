"""From the bytes of an image file to 8-bit pixels: reading the header, decoding, and what the stored numbers mean.

Everything that Pillow decodes is taken, HEIC and JPEG XL where their packages are installed. What has no defined 8-bit
picture is refused by name. Runs in worker processes; never imports torch.
"""

import contextlib
import functools
import importlib.util
import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL
from PIL import AvifImagePlugin, ExifTags, Image, ImageCms, UnidentifiedImageError

from ftk.contracts import RejectReason
from ftk.pipeline import jpeg, jxl, png, signatures

# One core a worker: the stage runs as many workers as there are cores.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1

SWAPPING_ORIENTATIONS = frozenset({5, 6, 7, 8})
_UPRIGHT_BY = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"mif2", b"msf1"})
_CAMERA_RAW = "camera raw data, which has to be developed: convert it to JPEG, PNG or TIFF"
_NEW_SUBFILE_TYPE, _SUB_IFDS, _DNG_VERSION = 254, 330, 50706
# Formats whose further frames are no animation: previews and views, layers, alternatives to the one main picture.
_STILL_FORMATS = frozenset({"MPO", "PSD", "HEIF"})
# The pixel format that an embedded profile describes, where the image's own has alpha or a palette on top of it.
_PROFILED_AS = {
    **{"L": "L", "LA": "L", "La": "L", "1": "L", "CMYK": "CMYK"},
    **dict.fromkeys(("RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "YCbCr"), "RGB"),
}
_MODES = frozenset({*_PROFILED_AS, "HSV", "LAB", "I", "I;16", "I;16L", "I;16B", "I;16N", "F"})
_WITHOUT_PREMULTIPLICATION = {"RGBa": "RGBA", "La": "LA"}
_STRIP_PIXELS = 1 << 22
# Levels of 255 by which a lossy format may change a single colour.
_FLAT_COLOUR = 8
# Pillow's decoders raise all of these on damaged files.
_DECODER_FAULTS: tuple[type[Exception], ...] = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, BufferError, struct.error, zlib.error),
    *(RuntimeError, TypeError, AttributeError, ArithmeticError, AssertionError),
)


class Unfit(Exception):
    """An image that gives no sample, and why; caught where an image's work begins, so that it never stops a stage."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """An image file whose header was read.

    `width` and `height` are those of the upright picture; `orientation` (1 to 8, as in EXIF) is what the decoded pixels
    still need to become it. `tagged_orientation` is what the file itself says: some decoders turn their pixels.
    """

    data: bytes
    image: Image.Image
    orientation: int
    width: int
    height: int
    tagged_orientation: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Pixels:
    """Decoded pixels, as stored (not yet upright): uint8 of 1 (gray), 3 (RGB) or 4 (CMYK) channels.

    `profile` is an ICC profile that they still need to become sRGB.
    """

    array_HWC: np.ndarray
    profile: bytes | None


def open_image(data: bytes, max_pixels: int | None = None) -> Opened:
    """Read the header of an image file, decoding no pixel, but for JPEG XL of at most `max_pixels`.

    Raises:
        Unfit: the bytes are no image file, or one whose pixels are not to be had: camera raw, EPS.
    """
    try:
        with _decoder_faults():
            # `max_pixels` decides, once the size is known; Pillow's own limits would not name it.
            Image.MAX_IMAGE_PIXELS = None
            image = _open_jxl(data, max_pixels) if jxl.is_jxl(data) else _open(data)
            _mend_transparency(image, data)
            tagged_orientation = _tagged_orientation(image, data)
    except Unfit:
        size = 8 + int.from_bytes(data[4:8], "little")
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) < size:
            # The decoder of WebP says of a cut file no more than that it will not have it.
            raise Unfit(RejectReason.TRUNCATED, f"truncated: {len(data)} of {size} bytes") from None
        raise
    # Pillow turns a TIFF while it loads, alone of all, and gives its turned size from the start.
    orientation = 1 if image.format == "TIFF" else tagged_orientation
    width, height = swapped(image.size) if orientation in SWAPPING_ORIENTATIONS else image.size
    return Opened(
        data=data,
        image=image,
        orientation=orientation,
        width=width,
        height=height,
        tagged_orientation=tagged_orientation,
    )


def swapped(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of a picture turned by a quarter."""
    return size[1], size[0]


def is_animated(opened: Opened) -> bool:
    """Whether the file holds several frames to be shown one after the other."""
    with _decoder_faults():
        return opened.image.format not in _STILL_FORMATS and bool(getattr(opened.image, "is_animated", False))


def is_plain_png(opened: Opened) -> bool:
    """Whether the file is an 8-bit gray or RGB PNG without transparency or animation."""
    image = opened.image
    # Byte 24 of a PNG is its bit depth: Pillow's mode does not tell 16 bits from 8.
    is_8_bit = image.format == "PNG" and len(opened.data) > 24 and opened.data[24] == 8
    return is_8_bit and image.mode in ("L", "RGB") and "transparency" not in image.info and not is_animated(opened)


def decode(opened: Opened, background: tuple[int, int, int], *, max_pixels: int, to_srgb: bool) -> Pixels:
    """All pixels of the first frame; transparency is laid over `background`, in sRGB.

    An opaque image keeps its own encoding, so that its profile can be applied after a resize, to fewer pixels; with
    `to_srgb` it is applied now. 16-bit values keep their high byte; 32-bit integers are read as 16-bit ones and floats as
    0 to 1, and refused outside that.

    Raises:
        Unfit: the file is damaged or cut, or its values have no defined 8-bit meaning.
    """
    plain_HWC, profile = _decoded_plainly(opened), opened.image.info.get("icc_profile")
    if plain_HWC is not None:
        pixels = Pixels(array_HWC=plain_HWC, profile=profile)
        return _in_srgb(pixels) if to_srgb else pixels
    image = _loaded(opened, max_pixels)
    if image.mode.startswith(("I", "F")):
        gray = _deep_gray(image)
        pixels = _over_background(gray, _deep_opacity(image), background, profile)
    elif _is_transparent(image):
        transform = icc_transform(profile, _PROFILED_AS.get(image.mode))
        pixels = Pixels(array_HWC=_by_strips(image, 3, _composite(transform, background)), profile=None)
    elif image.mode in ("1", "L", "LA"):
        pixels = Pixels(array_HWC=_by_strips(image, 1, lambda strip: strip.convert("L")), profile=profile)
    elif image.mode == "CMYK":
        pixels = Pixels(array_HWC=_by_strips(image, 4, lambda strip: strip), profile=profile)
    else:
        array = _by_strips(image, 3, _plain_rgb)
        pixels = Pixels(array_HWC=array, profile=profile if image.mode in _PROFILED_AS else None)
    image.close()
    return _in_srgb(pixels) if to_srgb else pixels


def decode_mask(opened: Opened, *, max_pixels: int) -> tuple[Pixels, bool]:
    """The first frame as a mask, and whether that is its alpha channel. Profiles are ignored: a mask's values are data.

    The mask is the alpha channel where that alone has a shape: everything visible has one colour. Otherwise it is the luma,
    and alpha is ignored.
    """
    plain_HWC = _decoded_plainly(opened)
    image = _loaded(opened, max_pixels) if plain_HWC is None else as_image(plain_HWC)
    alpha = _drawn_in_alpha(image)
    if alpha is not None:
        array = alpha
    elif image.mode.startswith(("I", "F")):
        array = _deep_gray(image)
    elif image.mode in ("1", "L"):
        array = _by_strips(image, 1, lambda strip: strip.convert("L"))
    else:
        array = _by_strips(image, 1, lambda strip: _plain_rgb(strip).convert("L"))
    image.close()
    return Pixels(array_HWC=array, profile=None), alpha is not None


def _drawn_in_alpha(image: Image.Image) -> np.ndarray | None:
    """The alpha channel of a picture whose visible pixels all have one colour; None of any other, or if alpha is constant."""
    if image.mode.startswith(("I", "F")):
        opaque = _deep_opacity(image)
        if opaque is None or opaque.all() or not opaque.any() or np.ptp(_deep_gray(image)[opaque]) > _FLAT_COLOUR:
            return None
        return np.where(opaque, 255, 0).astype(np.uint8)[:, :, None]
    if not _is_transparent(image):
        return None
    lowest, highest = np.full(3, 255, np.uint8), np.zeros(3, np.uint8)

    def alpha_of(strip: Image.Image) -> Image.Image:
        rgba = np.asarray(strip.convert(_WITHOUT_PREMULTIPLICATION.get(strip.mode, strip.mode)).convert("RGBA"))
        visible = rgba[rgba[..., 3] > 0, :3]
        if len(visible):
            np.minimum(lowest, visible.min(axis=0), out=lowest)
            np.maximum(highest, visible.max(axis=0), out=highest)
        return Image.fromarray(np.ascontiguousarray(rgba[..., 3]))

    alpha = _by_strips(image, 1, alpha_of)
    is_flat = (highest.astype(int) - lowest <= _FLAT_COLOUR).all()
    return alpha if is_flat and alpha.min() < alpha.max() else None


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """The picture turned as its EXIF orientation asks."""
    return image.transpose(_UPRIGHT_BY[orientation]) if orientation in _UPRIGHT_BY else image


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """8-bit sRGB of a gray, RGB or CMYK picture; a damaged or unfitting profile is passed over, as every viewer does."""
    transform = icc_transform(profile, image.mode)
    if transform is None:
        return image.convert("RGB")
    return ImageCms.applyTransform(image, transform)  # type: ignore[return-value]


# A camera writes one profile into all its files, and building a transform takes milliseconds.
@functools.lru_cache(maxsize=16)
def icc_transform(profile: bytes | None, mode: str | None) -> ImageCms.ImageCmsTransform | None:
    """From an embedded profile to sRGB; None where there is no profile, or none that describes this pixel format."""
    if not profile or mode is None:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), _PROFILED_AS[mode], "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None


def as_image(array_HWC: np.ndarray) -> Image.Image:
    """A Pillow image of one, three or four channels."""
    height, width, channels = array_HWC.shape
    mode = {1: "L", 3: "RGB", 4: "CMYK"}[channels]
    return Image.frombytes(mode, (width, height), np.ascontiguousarray(array_HWC).data)


@contextlib.contextmanager
def _decoder_faults() -> Iterator[None]:
    """Turn whatever Pillow raises on a damaged file into a reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Image.DecompressionBombError as error:
        raise Unfit(RejectReason.TOO_MANY_PIXELS, f"more than data.max_pixels inside: {error}") from None
    except MemoryError:
        raise Unfit(RejectReason.WORKER_OUT_OF_MEMORY, "decoding it took more memory than a worker has") from None
    except _DECODER_FAULTS as error:
        text = str(error) or type(error).__name__
        truncated = "truncated" in text.lower() or isinstance(error, EOFError)
        raise Unfit(RejectReason.TRUNCATED if truncated else RejectReason.UNREADABLE, text) from None


def _open(data: bytes) -> Image.Image:
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
            return _open_heif(data)
        raise Unfit(RejectReason.UNREADABLE, _unknown(data)) from None
    if image.format == "EPS":
        raise Unfit(RejectReason.UNREADABLE, "EPS is a program that draws, not pixels: convert it to PNG")
    if image.format == "TIFF" and _is_camera_raw(image, data):
        raise Unfit(RejectReason.UNREADABLE, _CAMERA_RAW)
    return image


def _unknown(data: bytes) -> str:
    if not data:
        return "the file is empty"
    kind = signatures.name(data[: signatures.HEAD_BYTES])
    if kind == "camera raw":
        return _CAMERA_RAW
    start = f"no image header that can be read (starts with {data[:8]!r})"
    return f"{start}: by its first bytes a {kind} file, cut, damaged or of a kind that is not read" if kind else start


def _is_camera_raw(image: Image.Image, data: bytes) -> bool:
    """Whether what Pillow would read of a TIFF is the preview of a camera's raw data."""
    tags: Any = getattr(image, "tag_v2", {})
    is_preview = bool(tags.get(_NEW_SUBFILE_TYPE, 0) & 1) and _SUB_IFDS in tags
    return is_preview or _DNG_VERSION in tags or data[8:10] == b"CR"


def _open_jxl(data: bytes, max_pixels: int | None) -> Image.Image:
    """A JPEG XL image, which is decoded only if its header says that it is not too large."""
    size = jxl.size(data)
    if size is not None and max_pixels is not None and size[0] * size[1] > max_pixels:
        raise Unfit(RejectReason.TOO_MANY_PIXELS, f"{size[0]} x {size[1]} is more than data.max_pixels {max_pixels:,}")
    try:
        return jxl.open_image(data)
    except ImportError:
        raise Unfit(RejectReason.UNREADABLE, 'JPEG XL needs a package that is not installed: pip install "ftk[jxl]"') from None
    except RuntimeError:
        # libjxl's own words do not reach its callers.
        raise Unfit(RejectReason.UNREADABLE, "a JPEG XL file that is cut or damaged") from None


def decoders() -> list[str]:
    """What decides which files can be decoded: an image that was rejected without one of these may be readable with it."""
    return [PIL.__version__, *(name for name in ("pillow_heif", "pillow_jxl") if importlib.util.find_spec(name))]


def _open_heif(data: bytes) -> Image.Image:
    try:
        import pillow_heif
    except ImportError:
        raise Unfit(RejectReason.UNREADABLE, "HEIC needs a package that is not installed: pip install pillow-heif") from None
    pillow_heif.options.DECODE_THREADS = 1
    image: Image.Image = pillow_heif.HeifImageFile(io.BytesIO(data))
    return image


def _mend_transparency(image: Image.Image, data: bytes) -> None:
    # A PNG's transparent colour is in units of its own bit depth; Pillow compares it with pixels stretched to 8 bits.
    transparent = image.info.get("transparency")
    if image.format != "PNG" or len(data) < 25 or transparent is None:
        return
    bits = data[24]
    if image.mode == "RGB" and bits == 16:
        image.info["transparency"] = tuple(channel >> 8 for channel in transparent)
    elif image.mode == "L" and bits in (2, 4):
        image.info["transparency"] = transparent * (255 // ((1 << bits) - 1))


def _tagged_orientation(image: Image.Image, data: bytes) -> int:
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        return 1  # its decoder has turned it already; only a JPEG inside comes as it is stored
    header = png.without_pixels(data) if image.format == "PNG" else None
    try:
        described = Image.open(io.BytesIO(header)) if header else image
        # Not image.getexif(): for a PNG that decodes all of it, to look for an EXIF chunk behind the pixels.
        value = Image.Image.getexif(described).get(ExifTags.Base.Orientation)
    except _DECODER_FAULTS:
        return 1  # damaged metadata around a sound picture: shown as stored, as every viewer does
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _decoded_plainly(opened: Opened) -> np.ndarray | None:
    """The pixels of a JPEG or plain PNG; None of another format, or of a file that only Pillow may decode."""
    is_png = is_plain_png(opened)
    if not is_png and opened.image.format not in ("JPEG", "MPO"):
        return None
    try:
        array_HWC = png.decode(opened.data) if is_png else jpeg.decode(opened.data)
    except jpeg.DamagedJpegError as error:
        reason = RejectReason.TRUNCATED if "premature end" in str(error).lower() else RejectReason.UNREADABLE
        raise Unfit(reason, f"pixels are missing or damaged: {error}") from None
    expected = (opened.image.height, opened.image.width, len(opened.image.getbands()))
    return array_HWC if array_HWC is not None and array_HWC.shape == expected else None


def _loaded(opened: Opened, max_pixels: int) -> Image.Image:
    image = opened.image
    size = image.size
    with _decoder_faults():
        # A container (ICO, ICNS) can hold a larger image than its header says: Pillow raises at twice this many pixels.
        Image.MAX_IMAGE_PIXELS = (max_pixels + 1) // 2
        try:
            image.load()
        finally:
            Image.MAX_IMAGE_PIXELS = None
    if image.size != size:
        raise Unfit(
            RejectReason.UNREADABLE,
            f"its header says {size[0]} x {size[1]}, its pixels are {image.size[0]} x {image.size[1]}",
        )
    if image.format == "PNG" and _lacks_rows(image, opened.data):
        raise Unfit(RejectReason.TRUNCATED, "its compressed pixels end before its last row")
    if image.mode not in _MODES:
        raise Unfit(RejectReason.UNREADABLE, f"pixel format {image.mode} has no defined 8-bit RGB: convert the image")
    return image


def _lacks_rows(image: Image.Image, data: bytes) -> bool:
    """Whether a PNG that Pillow decoded holds fewer pixels than its header says.

    Pillow leaves the rows that are missing at zero, without a word. So the stream is measured only where the last row is
    zero, or rows are interlaced.
    """
    width, height = image.size
    extremes: Any = image.crop((0, height - 1, width, height)).getextrema()
    highest = [channel[1] for channel in extremes] if isinstance(extremes[0], tuple) else [extremes[1]]
    # Apple has PNGs of its own, which begin with another chunk than their header.
    if data[12:16] != b"IHDR" or (any(highest) and not png.is_interlaced(data)):
        return False
    with _decoder_faults():
        return not png.has_all_rows(data)


def _is_transparent(image: Image.Image) -> bool:
    # An alpha channel that hides nothing is common, and costs a full-size composition.
    if image.mode in ("RGBA", "LA", "PA"):
        return bool(image.getchannel("A").getextrema()[0] != 255)
    return image.has_transparency_data


def _deep_gray(image: Image.Image) -> np.ndarray:
    values: np.ndarray = np.asarray(image)[:, :, None]
    low, high = float(values.min()), float(values.max())
    is_float = image.mode == "F"
    # Written so that it refuses NaN too.
    if not (low >= 0 and high <= (1 if is_float else 65535)):
        taken = "floats are read from 0 to 1" if is_float else "integers are read from 0 to 65535"
        raise Unfit(
            RejectReason.UNREADABLE,
            f"pixel values from {low:g} to {high:g}: {taken}. Convert the image to 8 or 16 bits",
        )
    return (np.rint(values * 255) if is_float else values >> 8).astype(np.uint8)


def _deep_opacity(image: Image.Image) -> np.ndarray | None:
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return None
    opaque: np.ndarray = np.asarray(image) != transparent
    return opaque


def _over_background(
    gray: np.ndarray, opaque: np.ndarray | None, background: tuple[int, int, int], profile: bytes | None
) -> Pixels:
    if opaque is None or opaque.all():
        return Pixels(array_HWC=gray, profile=profile)
    rgb = np.array(to_srgb(as_image(gray), profile))
    rgb[~opaque] = background
    return Pixels(array_HWC=rgb, profile=None)


def _plain_rgb(image: Image.Image) -> Image.Image:
    """RGB without alpha: what the colour channels hold, transparent or not."""
    image = image.convert(_WITHOUT_PREMULTIPLICATION.get(image.mode, image.mode))
    # A palette with alpha goes to RGB by way of RGBA: Pillow may change colours to keep one of them transparent.
    return image.convert("RGBA").convert("RGB") if "transparency" in image.info else image.convert("RGB")


def _composite(
    transform: ImageCms.ImageCmsTransform | None, background: tuple[int, int, int]
) -> Callable[[Image.Image], Image.Image]:
    def over_background(strip: Image.Image) -> Image.Image:
        strip = strip.convert(_WITHOUT_PREMULTIPLICATION.get(strip.mode, strip.mode))
        rgba = strip.convert("RGBA")
        colours = rgba.convert("RGB")
        if transform is not None:
            plain = rgba.getchannel("R") if transform.input_mode == "L" else colours
            colours = ImageCms.applyTransform(plain, transform)  # type: ignore[assignment]
        canvas = Image.new("RGB", strip.size, background)
        canvas.paste(colours, mask=rgba.getchannel("A"))
        return canvas

    return over_background


def _in_srgb(pixels: Pixels) -> Pixels:
    image = as_image(pixels.array_HWC)
    transform = icc_transform(pixels.profile, image.mode)
    if transform is None and image.mode != "CMYK":
        return Pixels(array_HWC=pixels.array_HWC, profile=None)
    array = _by_strips(image, 3, lambda strip: to_srgb(strip, pixels.profile))
    return Pixels(array_HWC=array, profile=None)


def _by_strips(image: Image.Image, channels: int, convert: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Convert an image a few rows at a time: at no time is there a second Pillow image of its size."""
    width, height = image.size
    array = np.empty((height, width, channels), np.uint8)
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        strip = convert(image.crop((0, top, width, bottom)))
        array[top:bottom] = np.asarray(strip).reshape(bottom - top, width, channels)
    return array
