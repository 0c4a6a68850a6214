"""What the HTML pages of `ftk inspect` share. A page is one file: it needs no network and no other file."""

import base64
import hashlib
import io
import math
from collections.abc import Sequence
from pathlib import Path

import jinja2
from PIL import Image

from ftk.progress import human_bytes

_MOST_CAPTIONS, _CAPTION_CHARS = 5, 400


def environment(package: str) -> jinja2.Environment:
    """Templates of a package's folder `templates`, and the frame and the pieces that all pages have."""
    shared = jinja2.PackageLoader("ftk.pipeline")
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package), shared]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["commas"] = lambda number: f"{number:,}"
    environment.filters["percent"] = lambda share: f"{share:.1%}"
    environment.filters["number"] = lambda value: f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
    environment.filters["count"] = lambda value: f"{value:,.0f}"
    environment.filters["decibels"] = lambda ratio: (
        f"{ratio:.1f}\N{NO-BREAK SPACE}dB" if math.isfinite(ratio) else "no difference"
    )
    environment.filters["bytes"] = human_bytes
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode()
    return environment


def encoded(html: str) -> bytes:
    """The page's bytes. A folder's name may hold bytes that are no UTF-8."""
    return html.encode("utf-8", "backslashreplace")


def short_name(directory: Path) -> str:
    """A folder and the one around it."""
    return "/".join(directory.resolve().parts[-2:])


def thumbnail(image: Image.Image, longest_px: int, quality: int = 80, subsampling: int = 2) -> str:
    """A picture, made smaller if need be, as the data URI of a JPEG; options as Pillow takes them."""
    image.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return data_uri(image.convert("RGB"), "JPEG", quality=quality, subsampling=subsampling)


def data_uri(image: Image.Image, image_format: str, **options: int) -> str:
    """A picture as it is, as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return f"data:image/{image_format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def shortened(captions: Sequence[str]) -> list[str]:
    """The first captions, each cut where it gets long."""
    return [
        caption if len(caption) <= _CAPTION_CHARS else f"{caption[:_CAPTION_CHARS]}… ({len(caption):,} characters)"
        for caption in captions[:_MOST_CAPTIONS]
    ]
