"""Contact sheets: images side by side under titles and prompts, as one PNG that can be taken apart again."""

import io
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

_MARGIN_PX = 12
_MIN_CELL_PX = 192
_CELLS = "cells"
"""Text in a sheet's PNG: JSON, of each picture its prompt and its box in px (left, top, right, bottom)."""


def grid(rows: Sequence[Sequence[Image.Image]], prompts: Sequence[str], titles: Sequence[str]) -> Image.Image:
    """Rows of images under column titles, each row under its prompt; its `info` says where each is, for `cells`."""
    scale = max(1, -(-_MIN_CELL_PX // max(image.width for row in rows for image in row)))
    cell_width = max(image.width for row in rows for image in row) * scale
    cell_height = max(image.height for row in rows for image in row) * scale
    width = len(titles) * (cell_width + _MARGIN_PX) + _MARGIN_PX
    font = ImageFont.load_default(max(13, cell_width // 24))
    line_px = int(font.getbbox("Ag")[3]) + 4
    columns = max(20, int((width - 2 * _MARGIN_PX) / max(font.getlength("n"), 1)))
    wrapped = [textwrap.wrap(prompt, columns) or [""] for prompt in prompts]
    height = line_px + 2 * _MARGIN_PX + sum(len(lines) * line_px + cell_height + 2 * _MARGIN_PX for lines in wrapped)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        place = (_MARGIN_PX + column * (cell_width + _MARGIN_PX), _MARGIN_PX)
        draw.text(place, _shortened(title, font, cell_width), "black", font)
    top = line_px + 2 * _MARGIN_PX
    boxes = []
    for prompt, row, lines in zip(prompts, rows, wrapped, strict=True):
        draw.text((_MARGIN_PX, top), "\n".join(lines), "#444444", font)
        top += len(lines) * line_px + _MARGIN_PX // 2
        for column, image in enumerate(row):
            width, height, left = image.width * scale, image.height * scale, _MARGIN_PX + column * (cell_width + _MARGIN_PX)
            sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top))
            boxes.append((prompt, (left, top, left + width, top + height)))
        top += cell_height + _MARGIN_PX + _MARGIN_PX // 2
    sheet.info[_CELLS] = json.dumps(boxes)
    return sheet


def cells(path: Path) -> list[tuple[Image.Image, str]]:
    """The pictures of a sheet that `grid` made, each with its prompt; of another image itself, without one.

    Raises:
        OSError, ValueError: it is no image, or damaged.
    """
    with Image.open(path) as sheet:
        whole = sheet.convert("RGB")
        noted = sheet.info.get(_CELLS)
    whole.info.clear()
    if noted is None:
        return [(whole, "")]
    return [(whole.crop(tuple(box)), str(prompt)) for prompt, box in json.loads(noted)]


def png_bytes(image: Image.Image) -> bytes:
    """The image as PNG, with what `grid` noted."""
    buffer, noted = io.BytesIO(), PngInfo()
    if _CELLS in image.info:
        noted.add_text(_CELLS, image.info[_CELLS])
    image.save(buffer, "PNG", pnginfo=noted)
    return buffer.getvalue()


def _shortened(text: str, font: Any, width: int) -> str:
    while font.getlength(text) > width and len(text) > 3:
        text = text[:-4] + "..."
    return text
