"""Images of `sample.prompts`: what an edit model or a control network is shown for a sample image. In no dataset."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ftk import locations, storage
from ftk.errors import ConfigError, did_you_mean
from ftk.pipeline import decode
from ftk.pipeline.buckets import cover
from ftk.pipeline.conditions import base as conditions
from ftk.pipeline.conditions.base import MadeControl
from ftk.pipeline.decode import Opened, Unfit
from ftk.pipeline.images import IMAGES_VERSION
from ftk.pipeline.render import Rendering

_BACKGROUND = (255, 255, 255)
_MAX_PIXELS = 200_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptImage:
    """An image file, and the size in pixels at which the model sees it, or what is `made` from it at this size.

    `id` names the content at this size.
    """

    id: str
    path: Path
    width: int
    height: int
    made: MadeControl | None = None


def find(path: str, size: Callable[[int, int], tuple[int, int]] | tuple[int, int], setting: str) -> PromptImage:
    """Look at an image file: all of its pixels can be read.

    Args:
        size: of references, what gives theirs from the file's; (width, height) of the sample image for a control image.
        setting: what messages call the place of the path.

    Raises:
        ConfigError: it is missing, or no image that can be read.
    """
    place = locations.local_path(path).absolute()
    try:
        data = place.read_bytes()
        opened = decode.open_image(data, _MAX_PIXELS)
        width, height = size(opened.width, opened.height) if callable(size) else size
        _cropped(opened, width, height)
    except (OSError, Unfit) as error:
        raise _unreadable(f"{setting}: {path}", error) from None
    return PromptImage(id=storage.digest(_named(data, width, height)), path=place, width=width, height=height)


def find_control(control: str | Mapping[str, Any], size: tuple[int, int], setting: str) -> PromptImage:
    """Look at a control image, or at the image that one is made from: `{make: canny, from: FILE}`.

    Args:
        size: (width, height) of the sample image.
        setting: what messages call the place of the control image.

    Raises:
        ConfigError: the image is missing, or cannot be read; there is no such kind, or a setting is wrong.
    """
    if isinstance(control, str):
        return find(control, size, setting)
    path = control.get("from")
    if not isinstance(path, str):
        meant = next((hint for key in control if key != "from" and (hint := did_you_mean(str(key), ["from"]))), "")
        raise ConfigError(f"{setting}: say which image it is made from: {{make: canny, from: FILE}}.{meant}")
    made = conditions.parse({key: value for key, value in control.items() if key != "from"}, setting)
    made.maker()
    image = find(path, size, f"{setting}.from")
    return replace(image, id=storage.digest([image.id, made.fingerprint]), made=made)


def load(path: Path, width: int, height: int, made: MadeControl | None = None) -> Image.Image:
    """The image upright, in sRGB on white, resized to cover this size and cropped at its centre; or what is made from that.

    A reference has been given a size of nearly its own aspect ratio: of it, next to nothing is cropped.

    Raises:
        ConfigError: the file cannot be read any more, or a control image could not be made.
    """
    try:
        data = path.read_bytes()
        cropped = _cropped(decode.open_image(data, _MAX_PIXELS), width, height)
    except (OSError, Unfit) as error:
        raise _unreadable(f"sample.prompts: {path}", error) from None
    if made is None:
        return cropped
    try:
        return decode.as_image(made.of(np.asarray(cropped), storage.digest(_named(data, width, height))))
    except Unfit as error:
        raise ConfigError(f"sample.prompts: {path}: {error.detail}. Correct the function, or name a file.") from None


def _cropped(opened: Opened, width: int, height: int) -> Image.Image:
    rendering = Rendering(opened, is_mask=False, background=_BACKGROUND, linear=False, max_pixels=_MAX_PIXELS)
    placement = cover(opened.width, opened.height, (width, height))
    resized = rendering.at(placement.resize_width, placement.resize_height)
    left, top = placement.crop_x, placement.crop_y
    return resized.crop((left, top, left + width, top + height))


def _unreadable(place: str, error: OSError | Unfit) -> ConfigError:
    reason = error.detail if isinstance(error, Unfit) else error.strerror or str(error)
    return ConfigError(f"{place} cannot be read as an image: {reason}. Name an image file.")


def _named(data: bytes, width: int, height: int) -> list[Any]:
    return ["prompt image", IMAGES_VERSION, hashlib.sha256(data).hexdigest(), width, height]
