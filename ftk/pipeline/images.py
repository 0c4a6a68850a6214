"""From an image file, with its mask, controls and references, to the encoded samples of its buckets. Runs in workers.

    read → header checks → placements → decode, orient, sRGB, resize → crop, flip → encode

Whatever is wrong with a file becomes an `ImageProblem`. Equal files and recipes give equal bytes in whatever process.
Never imports torch.
"""

import contextlib
import hashlib
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageOps

from ftk import locations, storage
from ftk.configs.aspects import ORIGINAL, ratio
from ftk.contracts import RejectReason
from ftk.models.components.geometry import ReferenceRule
from ftk.pipeline import decode, resize
from ftk.pipeline.buckets import Placement, cover, follow, largest_part, place, place_exactly, random_crops, share_out
from ftk.pipeline.conditions.base import MadeControl
from ftk.pipeline.decode import Opened, Unfit
from ftk.pipeline.image_encoding import PNG, copied_suffix, encode, encoding_of
from ftk.pipeline.perceptual import perceptual_hash
from ftk.pipeline.render import Rendering
from ftk.pipeline.sources.base import Blob

IMAGES_VERSION = 2
"""Raised whenever equal inputs and recipe would give other pixels; part of every fingerprint."""
CHECKS_VERSION = 3
"""Raised whenever an input that was a sample would be a reject, or the reverse: part of each shard's fingerprint, but of no
image's name, so that samples which stay the same need not be encoded again."""
_FAINT = 8
"""A mask whose levels, of 255, all lie below this is black: lossy formats and filters leave so much of a shape elsewhere."""
_SHAPE_TOLERANCE = 0.01
"""By how much the aspect ratio of a mask or control image may differ from its image's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecipe:
    """What decides the pixels, apart from the image: the part of the configuration that workers need.

    `sizes` are the buckets (width, height) of each edge, `exact_sizes` those that are named one by one, of which an image goes
    to one; `made` are the control images that are made from each image; the rest is as in `DataConfig`.
    """

    sizes: tuple[tuple[tuple[int, int], ...], ...]
    upscale: str
    upscale_limit: float
    min_size: int
    crop: str
    crops: int
    flip: bool
    resize: str
    image_format: str
    quality: int | None
    background: tuple[int, int, int]
    animated: str
    max_pixels: int
    max_input_aspect: float
    exact_sizes: tuple[tuple[int, int], ...] = ()
    aspects: tuple[str, ...] = ()
    references: ReferenceRule | None = None
    made: tuple[MadeControl, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTask:
    """One image for a worker, with the mask, controls and references that belong to it.

    `made_at`: see `Record`. `fetch_seconds`: how long reading them all may take, where that takes a network.
    """

    image: Blob
    mask: Blob | None
    controls: tuple[Blob, ...]
    recipe: ImageRecipe
    references: tuple[Blob, ...] = ()
    made_at: tuple[int, ...] | None = None
    fetch_seconds: float = locations.FETCH_SECONDS

    @property
    def held_bytes(self) -> int:
        """What its files take in memory, as far as the source has read them."""
        blobs = (self.image, self.mask, *self.controls, *self.references)
        return sum(len(blob.data) for blob in blobs if blob is not None and blob.data is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One sample of an image, encoded: `data` is a file of the kind that `suffix` (png, jpg, webp) says.

    `flipped`: mirrored after the crop. `copied`: the source's own bytes. Mask (8-bit gray) and controls (RGB) have the same
    size and are PNG files; `mask_id` is empty when there is no mask, and `has_empty_mask` says that it is black all over.
    References (RGB, PNG) have sizes of their own; `seen` are the same images at the size at which the text encoder sees them,
    where that is another one.
    """

    placement: Placement
    flipped: bool
    image_id: str
    suffix: str
    data: bytes
    copied: bool
    mask: bytes | None
    mask_id: str
    has_empty_mask: bool
    controls: tuple[bytes, ...]
    control_ids: tuple[str, ...]
    references: tuple[bytes, ...]
    reference_ids: tuple[str, ...]
    reference_sizes: tuple[tuple[int, int], ...]
    seen: tuple[bytes, ...] = ()
    seen_ids: tuple[str, ...] = ()
    seen_sizes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedImage:
    """All samples of one image; `width` and `height` are the original's after its EXIF orientation.

    `contents` are the SHA-256 of the image's file, of its mask's where there is one, of each control's and each reference's.
    """

    width: int
    height: int
    contents: tuple[str, ...]
    perceptual_hash: str
    variants: tuple[Variant, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageProblem:
    """Why an image gave no sample; `contents` as in `PreparedImage`, empty for a file that could not be read."""

    reason: RejectReason
    detail: str
    contents: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a header tells: the upright size, and a placement for each sample that the image would give."""

    width: int
    height: int
    placements: tuple[Placement, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """A file of a task, whose bytes were read or not. `kind` is image, mask, control or reference; `name` names no place."""

    kind: str
    name: str
    data: bytes
    sha256: str
    problem: Unfit | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _ResizedFile:
    """A file's image at the size that one placement asks for, before the crop; `width` and `height` as opened.

    `reading` says what of its pixels does not follow from its own bytes and kind alone; empty as a rule.
    """

    file: _File
    width: int
    height: int
    resized: Image.Image
    reading: tuple[str | int, ...]


_MISSING = {
    "image": RejectReason.FILE_MISSING,
    "mask": RejectReason.MASK_MISSING,
    "control": RejectReason.CONTROL_MISSING,
    "reference": RejectReason.CONTROL_MISSING,
    "seen": RejectReason.CONTROL_MISSING,
}
_UNREADABLE = {
    "mask": RejectReason.MASK_UNREADABLE,
    "control": RejectReason.CONTROL_UNREADABLE,
    "reference": RejectReason.CONTROL_UNREADABLE,
    "seen": RejectReason.CONTROL_UNREADABLE,
}
_MISMATCHED = {"mask": RejectReason.MASK_MISMATCHED, "control": RejectReason.CONTROL_MISMATCHED}


def prepare_image(task: ImageTask) -> PreparedImage | ImageProblem:
    """All samples of an image, or the reason why there are none.

    Raises:
        EnvironmentFault: the disk failed; nothing was wrong with the image.
    """
    files = _read(task)
    contents = tuple(file.sha256 for file in files)
    try:
        return _prepare(files, contents, task)
    except Unfit as unfit:
        return ImageProblem(reason=unfit.reason, detail=unfit.detail, contents=contents)


def probe_image(task: ImageTask) -> Probe | ImageProblem:
    """What `prepare_image` would give as far as headers tell: the files are read, and no pixel is decoded.

    Where a focus crop will lie only the pixels tell: it is given as central.
    """
    files = _read(task)
    contents = tuple(file.sha256 for file in files)
    try:
        opened = _open_all(files, task.recipe)[0]
        placements: list[Placement] = []
        for placement, numbers in _placements(opened, contents[0], task.recipe).items():
            placements += _crops(placement, numbers, None, contents[0], task.recipe)
    except Unfit as unfit:
        return ImageProblem(reason=unfit.reason, detail=unfit.detail, contents=contents)
    copies = 2 if task.recipe.flip else 1
    return Probe(
        width=opened.width,
        height=opened.height,
        placements=tuple(placement for placement in placements for _ in range(copies)),
    )


def _read(task: ImageTask) -> list[_File]:
    files = [("image", task.image)]
    if task.mask is not None:
        files.append(("mask", task.mask))
    files += [("control", control) for control in task.controls]
    files += [("reference", reference) for reference in task.references]
    end = time.monotonic() + task.fetch_seconds
    read: list[_File] = []
    for kind, blob in files:
        read.append(_read_file(kind, blob, max(1.0, end - time.monotonic())))
        if read[-1].problem is not None and read[-1].problem.reason == RejectReason.UNREACHABLE:
            break  # the others are asked for when this one can be had
    return read


def _read_file(kind: str, blob: Blob, seconds: float) -> _File:
    try:
        data = blob.read(seconds) if blob.is_remote else blob.read()
    except (locations.UnreachableError, locations.RefusedError) as error:
        unfit = Unfit(RejectReason.UNREACHABLE, error.detail)
    except FileNotFoundError as error:
        unfit = Unfit(_MISSING[kind], error.strerror or "the file is missing")
    except locations.NotAFileError as error:
        unfit = Unfit(RejectReason.NOT_A_FILE, error.strerror or str(error))
    except OSError as error:
        unfit = Unfit(RejectReason.UNREADABLE, error.strerror or str(error) or type(error).__name__)
    else:
        sha256 = hashlib.sha256(data).hexdigest()
        return _File(kind=kind, name=blob.name, data=data, sha256=sha256, problem=None)
    return _File(kind=kind, name=blob.name, data=b"", sha256="", problem=unfit)


def _open_all(files: list[_File], recipe: ImageRecipe) -> list[Opened]:
    """The headers of all files of a task, checked; the image comes first."""
    _check_number(sum(file.kind == "reference" for file in files), recipe)
    opened: list[Opened] = []
    for file in files:
        with _blaming(file):
            if file.problem is not None:
                raise file.problem
            opened.append(decode.open_image(file.data, recipe.max_pixels))
            _check_header(opened[-1], recipe)
            if file.kind in _MISMATCHED:
                opened[-1] = _aligned(opened[0], opened[-1], file.kind)
    shortest = min(opened[0].width, opened[0].height)
    if shortest < recipe.min_size:
        raise Unfit(RejectReason.TOO_SMALL, f"its shorter side, {shortest} px, is below data.min_size {recipe.min_size}")
    return opened


def _check_number(num_references: int, recipe: ImageRecipe) -> None:
    most = recipe.references.most if recipe.references else None
    if most is not None and num_references > most:
        raise Unfit(RejectReason.TOO_MANY_REFERENCES, f"it has {num_references} references, and the model takes {most} at most")


@contextlib.contextmanager
def _blaming(file: _File) -> Iterator[None]:
    """Let a fault of a mask or control say whose it is: the row of rejects names the image."""
    try:
        yield
    except Unfit as unfit:
        if file.kind == "image":
            raise
        named = (_MISSING[file.kind], _MISMATCHED.get(file.kind), RejectReason.UNREACHABLE)
        reason = unfit.reason if unfit.reason in named else _UNREADABLE[file.kind]
        raise Unfit(reason, f"{file.kind} {file.name}: {unfit.detail}") from None


def _aligned(image: Opened, companion: Opened, kind: str) -> Opened:
    """A mask or control image as it lies on its image, pixel on pixel.

    It has the upright image's shape, whatever its size. One that has the shape of the image as it is stored was drawn on
    that, by a program that ignores EXIF: it is turned like the image. Where both fit, as on an almost square image, the
    nearer one counts, and the upright one if they are equally near.
    """
    upright, size = (image.width, image.height), (companion.width, companion.height)
    stored = decode.swapped(upright)
    can_turn = image.tagged_orientation in decode.SWAPPING_ORIENTATIONS and companion.tagged_orientation == 1
    if can_turn and _mismatch(size, stored) < _mismatch(size, upright) and _has_shape(size, stored):
        width, height = decode.swapped(size)
        return replace(companion, orientation=image.tagged_orientation, width=width, height=height)
    if _has_shape(size, upright):
        return companion
    as_stored = f" ({stored[0]} x {stored[1]} as stored, turned by its EXIF orientation)" if can_turn else ""
    references = ". An input image of an edit model may have another shape: name it under `references`"
    raise Unfit(
        _MISMATCHED[kind],
        f"it has {size[0]} x {size[1]} px, and its image {upright[0]} x {upright[1]}{as_stored}: another shape does not lie on "
        f"the image{references if kind == 'control' else ''}",
    )


def _mismatch(one: tuple[int, int], other: tuple[int, int]) -> int:
    """0 for two sizes of exactly the same aspect ratio."""
    return abs(one[0] * other[1] - one[1] * other[0])


def _has_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes have one aspect ratio, but for a pixel of rounding in the smaller, or for `_SHAPE_TOLERANCE`."""
    mismatch = _mismatch(one, other)
    # Sides of one that were rounded, or both cut off, make the products differ by less than the other's long side.
    return mismatch <= max(*one, *other) or mismatch <= _SHAPE_TOLERANCE * one[1] * other[0]


def _check_header(opened: Opened, recipe: ImageRecipe) -> None:
    width, height = opened.width, opened.height
    if width * height > recipe.max_pixels:
        raise Unfit(RejectReason.TOO_MANY_PIXELS, f"{width} x {height} is more than data.max_pixels {recipe.max_pixels:,}")
    if max(width, height) > recipe.max_input_aspect * min(width, height):
        raise Unfit(
            RejectReason.TOO_EXTREME_ASPECT,
            f"{width} x {height} is longer than data.max_input_aspect {recipe.max_input_aspect:g}",
        )
    if recipe.animated == "reject" and decode.is_animated(opened):
        raise Unfit(RejectReason.ANIMATED, "it has several frames, and data.animated says reject")


def _placements(opened: Opened, sha256: str, recipe: ImageRecipe) -> dict[Placement, list[int]]:
    """Where the image goes in each resolution that it may reach, with the numbers of the crops that are cut there.

    Two resolutions can share a bucket: one placement.
    """
    width, height = opened.width, opened.height
    limit = {"always": float("inf"), "limit": recipe.upscale_limit, "never": 1.0}[recipe.upscale]
    nearest: dict[Placement, list[int]] = {}
    for aspect, numbers in share_out(recipe.aspects or (ORIGINAL,), sha256, recipe.crops).items():
        for placement in _nearest(width, height, aspect, recipe):
            nearest[placement] = sorted({*nearest.get(placement, ()), *numbers})
    reached = {placement: numbers for placement, numbers in nearest.items() if placement.enlargement(width, height) <= limit}
    if not reached:
        least = min(nearest, key=lambda placement: placement.enlargement(width, height))
        setting = "data.upscale: never" if recipe.upscale == "never" else f"data.upscale_limit {limit:g}"
        raise Unfit(
            RejectReason.TOO_SMALL,
            f"{width} x {height} would be enlarged {least.enlargement(width, height):.2f} times to reach "
            f"{least.bucket_width} x {least.bucket_height}, against {setting}",
        )
    return reached


def _nearest(width: int, height: int, aspect: str, recipe: ImageRecipe) -> list[Placement]:
    """Of each resolution the bucket that is nearest to an aspect, covered by the whole image."""
    part = largest_part(width, height, ratio(aspect))
    placements = [place(*part, list(sizes)) for sizes in recipe.sizes]
    if recipe.exact_sizes:
        placements.append(place_exactly(*part, recipe.exact_sizes))
    return [cover(width, height, (placement.bucket_width, placement.bucket_height)) for placement in placements]


def _crops(
    placement: Placement, numbers: Sequence[int], resized: Image.Image | None, sha256: str, recipe: ImageRecipe
) -> tuple[Placement, ...]:
    if recipe.crop == "random":
        return random_crops(placement, sha256, numbers)
    if recipe.crop == "focus" and resized is not None and placement.slack != (0, 0):
        return (placement.at(*resize.attention(resized, placement.bucket_width, placement.bucket_height)),)
    return (placement,)


def _prepare(files: list[_File], contents: tuple[str, ...], task: ImageTask) -> PreparedImage:
    recipe = task.recipe
    opened = _open_all(files, recipe)
    image = opened[0]
    placements = _placements(image, contents[0], recipe)
    pictures = [(file, _picture(file, one, recipe)) for file, one in zip(files, opened, strict=True)]
    if recipe.references and recipe.references.seen_area:
        pictures += [(replace(file, kind="seen"), picture) for file, picture in pictures if file.kind == "reference"]
    variants: list[Variant] = []
    hashed = ""
    for placement, numbers in placements.items():
        parts = [_part(file, picture, placement, recipe) for file, picture in pictures]
        hashed = hashed or perceptual_hash(parts[0].resized)
        for cropped in _crops(placement, numbers, parts[0].resized, contents[0], recipe):
            for flipped in (False, True)[: 1 + recipe.flip]:
                variants.append(_with_made_controls(_variant(parts, image, cropped, flipped, recipe), task))
    return PreparedImage(
        width=image.width, height=image.height, contents=contents, perceptual_hash=hashed, variants=tuple(variants)
    )


def _picture(file: _File, opened: Opened, recipe: ImageRecipe) -> Rendering:
    return Rendering(
        opened,
        is_mask=file.kind == "mask",
        background=recipe.background,
        linear=recipe.resize == "linear" and file.kind != "mask",
        max_pixels=recipe.max_pixels,
    )


def _part(file: _File, picture: Rendering, leader: Placement, recipe: ImageRecipe) -> _ResizedFile:
    width, height = picture.opened.width, picture.opened.height
    own = _placement(file.kind, width, height, leader, recipe)
    with _blaming(file):
        resized = picture.at(own.resize_width, own.resize_height)
    return _ResizedFile(file=file, width=width, height=height, resized=resized, reading=_reading(picture))


def _reading(picture: Rendering) -> tuple[str | int, ...]:
    opened = picture.opened
    reading: list[str | int] = ["alpha"] if picture.is_alpha else []
    is_turned_like_image = opened.orientation != 1 and opened.tagged_orientation == 1
    return (*reading, "turned", opened.orientation) if is_turned_like_image else tuple(reading)


def _variant(parts: list[_ResizedFile], image: Opened, placement: Placement, flipped: bool, recipe: ImageRecipe) -> Variant:
    encoding = encoding_of(image, recipe.image_format, recipe.quality)
    suffix = None if flipped else _copied_suffix(image, placement, recipe)
    data = parts[0].file.data if suffix else encode(_cut(parts[0], placement, flipped, recipe), encoding)
    stored = "copy" if suffix else f"{encoding.image_format} {encoding.quality}"
    masks, controls, references, seen = (
        [part for part in parts if part.file.kind == kind] for kind in ("mask", "control", "reference", "seen")
    )
    mask = _cut(masks[0], placement, flipped, recipe) if masks else None
    return Variant(
        placement=placement,
        flipped=flipped,
        image_id=_part_id(parts[0], placement, flipped, stored, recipe),
        suffix=suffix or encoding.suffix,
        data=data,
        copied=suffix is not None,
        mask=encode(mask, PNG) if mask else None,
        mask_id=_part_id(masks[0], placement, flipped, "png", recipe) if masks else "",
        has_empty_mask=mask is not None and bool(np.asarray(mask).max() < _FAINT),
        controls=tuple(encode(_cut(part, placement, flipped, recipe), PNG) for part in controls),
        control_ids=tuple(_part_id(part, placement, flipped, "png", recipe) for part in controls),
        references=tuple(encode(_cut(part, placement, flipped, recipe), PNG) for part in references),
        reference_ids=tuple(_part_id(part, placement, flipped, "png", recipe) for part in references),
        reference_sizes=tuple(part.resized.size for part in references),
        seen=tuple(encode(_cut(part, placement, flipped, recipe), PNG) for part in seen),
        seen_ids=tuple(_part_id(part, placement, flipped, "png", recipe) for part in seen),
        seen_sizes=tuple(part.resized.size for part in seen),
    )


def _with_made_controls(variant: Variant, task: ImageTask) -> Variant:
    """The sample with the control images that are made from its own pixels among those that were found."""
    if not task.recipe.made:
        return variant
    with Image.open(io.BytesIO(variant.data)) as image:
        pixels_HWC = np.asarray(image.convert("RGB"))  # as they are stored, and will be seen: lossy formats change some
    controls, control_ids = list(variant.controls), list(variant.control_ids)
    for position, made in zip(task.made_at or [made.position for made in task.recipe.made], task.recipe.made, strict=True):
        control_HWC = made.of(pixels_HWC, variant.image_id)
        controls.insert(position, encode(decode.as_image(control_HWC), PNG))
        control_ids.insert(position, _made_id(control_HWC))
    return replace(variant, controls=tuple(controls), control_ids=tuple(control_ids))


def _made_id(control_HWC: np.ndarray) -> str:
    """Names the pixels themselves: what a user's function gives for equal input is not ours to know."""
    return storage.digest(["made control", control_HWC.shape, hashlib.sha256(control_HWC.data).hexdigest()])


def _copied_suffix(image: Opened, placement: Placement, recipe: ImageRecipe) -> str | None:
    is_whole = (placement.resize_width, placement.resize_height) == (image.width, image.height)
    return copied_suffix(image, recipe.image_format) if is_whole and placement.slack == (0, 0) else None


def _placement(kind: str, width: int, height: int, leader: Placement, recipe: ImageRecipe) -> Placement:
    """Where an image of these sides goes: a reference to a size of its own, uncropped; all others where their image goes."""
    if kind not in ("reference", "seen"):
        return follow(leader, width, height)
    assert recipe.references is not None
    size = recipe.references.seen_size if kind == "seen" else recipe.references.size
    width, height = size(width, height)
    return Placement(bucket_width=width, bucket_height=height, resize_width=width, resize_height=height, crop_x=0, crop_y=0)


def _cut(part: _ResizedFile, placement: Placement, flipped: bool, recipe: ImageRecipe) -> Image.Image:
    own = _placement(part.file.kind, part.width, part.height, placement, recipe)
    left, top = own.crop_x, own.crop_y
    cropped = part.resized.crop((left, top, left + own.bucket_width, top + own.bucket_height))
    return ImageOps.mirror(cropped) if flipped else cropped


def _part_id(part: _ResizedFile, placement: Placement, flipped: bool, stored: str, recipe: ImageRecipe) -> str:
    """Names the pixels of a sample's image, mask, control or reference: the file's content and all done to it.

    `stored` says how they are encoded, so that equal names mean equal bytes too.
    """
    placed = _placement(part.file.kind, part.width, part.height, placement, recipe)
    geometry = [getattr(placed, name) for name in Placement.__slots__]
    # Nothing is laid under a mask, and it is always averaged as stored.
    colours = [] if part.file.kind == "mask" else [list(recipe.background), recipe.resize]
    named = [IMAGES_VERSION, part.file.kind, part.file.sha256, geometry, flipped, stored, colours]
    return storage.digest([*named, *part.reading])
