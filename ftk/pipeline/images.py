"""From the bytes of an image file to the encoded pixels of its buckets. Runs in worker processes; never imports torch."""

import hashlib
import io
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from ftk import storage
from ftk.contracts import RejectReason
from ftk.pipeline.buckets import Placement, place

IMAGES_VERSION = 1
"""Raised whenever equal inputs and recipe would give other pixels; part of every fingerprint."""

_ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "png": ("PNG", {"compress_level": 1}),
    "jpeg": ("JPEG", {"quality": 95, "subsampling": "4:4:4"}),
    "webp": ("WEBP", {"lossless": True, "method": 2}),
}
SUFFIXES = {"png": "png", "jpeg": "jpg", "webp": "webp"}
_SWAPPING_ORIENTATIONS = frozenset({5, 6, 7, 8})
_RGB_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"})


# The pixel format that an embedded profile describes, where the image's own has alpha or a palette on top of it.
_PROFILED_AS = {"RGB": "RGB", "RGBA": "RGB", "P": "RGB", "CMYK": "CMYK", "L": "L", "LA": "L"}
# Pillow's decoders raise all of these on damaged files.
_DECODER_FAULTS: tuple[type[Exception], ...] = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, MemoryError),
    *(RuntimeError, TypeError, AttributeError, ArithmeticError, AssertionError, struct.error),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecipe:
    """What decides the pixels, apart from the image: the part of the configuration that workers need."""

    sizes: tuple[tuple[tuple[int, int], ...], ...]
    image_format: str
    background: tuple[int, int, int]
    max_pixels: int
    max_input_aspect: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One size of one image, encoded."""

    placement: Placement
    image_id: str
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedImage:
    """All variants of one image, one a resolution; `width` and `height` are the original's after its EXIF orientation."""

    width: int
    height: int
    variants: tuple[Variant, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageProblem:
    """Why an image gave no sample."""

    reason: RejectReason
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTask:
    """One image for a worker; `content_sha256` is what the plan was made with."""

    path: Path
    content_sha256: str
    recipe: ImageRecipe


def prepare_image(task: ImageTask) -> PreparedImage | ImageProblem:
    """Read, check the header, decode, orient, convert to sRGB, resize, crop and encode; any fault becomes a reason."""
    try:
        data = task.path.read_bytes()
    except OSError as error:
        return ImageProblem(reason=RejectReason.UNREADABLE, detail=error.strerror or str(error))
    if hashlib.sha256(data).hexdigest() != task.content_sha256:
        return ImageProblem(
            reason=RejectReason.CHANGED_WHILE_READING, detail="the file changed while prepare was running: run it again"
        )
    # Pillow's own bomb check warns from 89 megapixels on; `max_pixels` decides here, and it is a reject.
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _prepare(data, task)
    except UnidentifiedImageError:
        return ImageProblem(reason=RejectReason.UNREADABLE, detail=_not_an_image(data))
    except _DECODER_FAULTS as error:
        text = str(error) or type(error).__name__
        truncated = "truncated" in text.lower() or isinstance(error, EOFError)
        reason = RejectReason.TRUNCATED if truncated else RejectReason.UNREADABLE
        return ImageProblem(reason=reason, detail=text)


def _prepare(data: bytes, task: ImageTask) -> PreparedImage | ImageProblem:
    recipe = task.recipe
    with Image.open(io.BytesIO(data)) as image:
        problem = _check_header(image, recipe)
        if problem is not None:
            return problem
        image.load()
        pixels = to_srgb(ImageOps.exif_transpose(image), recipe.background)
    variants: list[Variant] = []
    # Two resolutions close to each other can share a bucket: one sample, not two equal ones.
    for placement in dict.fromkeys(place(pixels.width, pixels.height, list(sizes)) for sizes in recipe.sizes):
        variants.append(
            Variant(
                placement=placement,
                image_id=image_id(task.content_sha256, placement, recipe),
                data=encode(render(pixels, placement), recipe.image_format),
            )
        )
    return PreparedImage(width=pixels.width, height=pixels.height, variants=tuple(variants))


def _check_header(image: Image.Image, recipe: ImageRecipe) -> ImageProblem | None:
    width, height = image.size
    if width * height > recipe.max_pixels:
        return ImageProblem(
            reason=RejectReason.TOO_MANY_PIXELS,
            detail=f"{width} x {height} is more than data.max_pixels {recipe.max_pixels:,}",
        )
    if max(width, height) > recipe.max_input_aspect * min(width, height):
        return ImageProblem(
            reason=RejectReason.TOO_EXTREME_ASPECT,
            detail=f"{width} x {height} is longer than data.max_input_aspect {recipe.max_input_aspect:g}",
        )
    if image.mode not in _RGB_MODES:
        return ImageProblem(
            reason=RejectReason.UNSUPPORTED_MODE,
            detail=f"pixel format {image.mode} has no defined 8-bit RGB: convert the image",
        )
    return None


def header_size(path: Path) -> tuple[int, int] | None:
    """(width, height) after the EXIF orientation, from the header alone; None when there is no readable header."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.MAX_IMAGE_PIXELS = None
            with Image.open(path) as image:
                width, height = image.size
                is_upright = image.format == "TIFF"  # Pillow gives a TIFF's size, alone of all, as it will be turned
                # Not image.getexif(): for a PNG that decodes all of it, to look for an EXIF chunk behind the pixels.
                swapped = Image.Image.getexif(image).get(ExifTags.Base.Orientation) in _SWAPPING_ORIENTATIONS
    except _DECODER_FAULTS:
        return None
    return (height, width) if swapped and not is_upright else (width, height)


def to_srgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """8-bit sRGB: the embedded ICC profile is applied, transparency is laid over `background`; of animations, frame one."""
    profile = image.info.get("icc_profile")
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if profile and image.mode in _PROFILED_AS:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            plain = image.convert(_PROFILED_AS[image.mode])
            converted = ImageCms.profileToProfile(plain, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            converted = None  # a damaged profile: the pixels are read as sRGB, as every viewer does
        image = converted if converted is not None else image
    if alpha is None:
        return image.convert("RGB")
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image.convert("RGB"), mask=alpha)
    return canvas


def render(pixels: Image.Image, placement: Placement) -> Image.Image:
    """Resize with the antialiased Lanczos filter, in gamma space as viewers do, then crop."""
    size = (placement.resize_width, placement.resize_height)
    resized = pixels if size == pixels.size else pixels.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    left, top = placement.crop_x, placement.crop_y
    return resized.crop((left, top, left + placement.bucket_width, top + placement.bucket_height))


def encode(pixels: Image.Image, image_format: str) -> bytes:
    """The bytes of an image file; equal pixels give equal bytes."""
    pillow_format, options = _ENCODERS[image_format]
    buffer = io.BytesIO()
    Image.frombytes("RGB", pixels.size, pixels.tobytes()).save(buffer, pillow_format, **options)
    return buffer.getvalue()


def image_id(content_sha256: str, placement: Placement, recipe: ImageRecipe) -> str:
    """Names pixels: the file's content and everything that was done to it."""
    geometry = [getattr(placement, name) for name in Placement.__slots__]
    background = list(recipe.background)
    return storage.digest([IMAGES_VERSION, content_sha256, geometry, recipe.image_format, background])


def _not_an_image(data: bytes) -> str:
    return "the file is empty" if not data else f"no known image format (starts with {data[:8]!r})"
