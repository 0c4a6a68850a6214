"""Images of `sample.prompts`: what an edit model or a control network is shown for a sample image. In no dataset."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ftk import locations, storage
from ftk.errors import ConfigError
from ftk.models.components.geometry import ReferenceRule
from ftk.pipeline import decode
from ftk.pipeline.buckets import cover
from ftk.pipeline.decode import Unfit
from ftk.pipeline.images import IMAGES_VERSION
from ftk.pipeline.render import Rendering

_BACKGROUND = (255, 255, 255)
_MAX_PIXELS = 200_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptImage:
    """An image file, and the size in pixels at which the model sees it. `id` names its content at this size."""

    id: str
    path: Path
    width: int
    height: int


def find(path: str, size: ReferenceRule | tuple[int, int], setting: str) -> PromptImage:
    """Open an image's header.

    Args:
        size: the rule for references; (width, height) of the sample image for a control image.
        setting: what messages call the place of the path.

    Raises:
        ConfigError: it is missing, or no image that can be read.
    """
    place = locations.local_path(path).absolute()
    try:
        data = place.read_bytes()
        opened = decode.open_image(data, _MAX_PIXELS)
    except (OSError, Unfit) as error:
        reason = error.detail if isinstance(error, Unfit) else error.strerror or str(error)
        raise ConfigError(f"{setting}: {path} cannot be read as an image: {reason}. Name an image file.") from None
    width, height = size.size(opened.width, opened.height) if isinstance(size, ReferenceRule) else size
    content = hashlib.sha256(data).hexdigest()
    return PromptImage(
        id=storage.digest(["prompt image", IMAGES_VERSION, content, width, height]), path=place, width=width, height=height
    )


def load(path: Path, width: int, height: int) -> Image.Image:
    """The image upright, in sRGB on white, resized to cover this size and cropped at its centre.

    A reference has been given a size of nearly its own aspect ratio: of it, next to nothing is cropped.
    """
    opened = decode.open_image(path.read_bytes())
    rendering = Rendering(opened, is_mask=False, background=_BACKGROUND, linear=False, max_pixels=_MAX_PIXELS)
    placement = cover(opened.width, opened.height, (width, height))
    resized = rendering.at(placement.resize_width, placement.resize_height)
    left, top = placement.crop_x, placement.crop_y
    return resized.crop((left, top, left + width, top + height))
