"""Contact sheets: images side by side under titles and prompts, as one PNG that can be taken apart again."""

import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

_MARGIN_PX = 12
_MIN_CELL_PX = 192
_CELLS = "cells"
"""Text in a sheet's PNG: JSON, of each drawn picture its prompt and its box in px (left, top, right, bottom).

Where it was drawn from images, a list of their boxes stands behind these.
"""
Inputs = Mapping[str, Sequence[Image.Image]]
"""What pictures were drawn from, by its kind: `reference` and `control` images."""
_Box = tuple[int, int, int, int]


def grid(
    rows: Sequence[Sequence[Image.Image]],
    prompts: Sequence[str],
    titles: Sequence[str],
    inputs: Sequence[Inputs] = (),
    notes: Sequence[str] = (),
) -> Image.Image:
    """Rows of drawn images under column titles, each row under its prompt; its `info` says where each is, for `cells`.

    Args:
        inputs: for each row what it was drawn from: further columns on the left. Where they are larger than the row's first
            image, they are shrunk to it.
        notes: for each row what is printed behind its prompt.
    """
    columns = _input_columns(inputs)
    given = [_in_columns(each, columns, row[0].size) for each, row in zip(inputs or [{}] * len(rows), rows, strict=True)]
    scale = max(1, -(-_MIN_CELL_PX // max(image.width for row in rows for image in row)))
    cell_width = max(image.width for row in rows for image in row) * scale
    heights = [max(image.height for image in row) * scale for row in rows]
    width = (len(columns) + len(titles)) * (cell_width + _MARGIN_PX) + _MARGIN_PX
    font = ImageFont.load_default(max(13, cell_width // 24))
    line_px = int(font.getbbox("Ag")[3]) + 4
    num_chars = max(20, int((width - 2 * _MARGIN_PX) / max(font.getlength("n"), 1)))
    texts = [f"{prompt} ({note})" if note else prompt for prompt, note in zip(prompts, notes or [""] * len(rows), strict=True)]
    wrapped = [textwrap.wrap(text, num_chars) or [""] for text in texts]
    height = line_px + 2 * _MARGIN_PX + sum(
        len(lines) * line_px + high + 2 * _MARGIN_PX for lines, high in zip(wrapped, heights, strict=True)
    )  # fmt: skip
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate([*(title for title, _, _ in columns), *titles]):
        place = (_MARGIN_PX + column * (cell_width + _MARGIN_PX), _MARGIN_PX)
        draw.text(place, _shortened(title, font, cell_width), "black", font)
    top = line_px + 2 * _MARGIN_PX
    cells: list[list[Any]] = []
    for prompt, shown, row, lines, high in zip(prompts, given, rows, wrapped, heights, strict=True):
        draw.text((_MARGIN_PX, top), "\n".join(lines), "#444444", font)
        top += len(lines) * line_px + _MARGIN_PX // 2
        boxes = [
            image and _paste(sheet, image, scale, (_MARGIN_PX + column * (cell_width + _MARGIN_PX), top))
            for column, image in enumerate([*shown, *row])
        ]
        sources = [box for box in boxes[: len(columns)] if box]
        cells += [[prompt, box, *([sources] if sources else [])] for box in boxes[len(columns) :]]
        top += high + _MARGIN_PX + _MARGIN_PX // 2
    sheet.info[_CELLS] = json.dumps(cells)
    return sheet


def _paste(sheet: Image.Image, image: Image.Image, scale: int, place: tuple[int, int]) -> _Box:
    """Paste an enlarged image; returns its box."""
    width, height = image.width * scale, image.height * scale
    sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), place)
    return (*place, place[0] + width, place[1] + height)


def _input_columns(inputs: Sequence[Inputs]) -> list[tuple[str, str, int]]:
    """(title, kind, position) of each column of input images: as many of a kind as the row with most of them has."""
    columns = []
    for kind in dict.fromkeys(kind for each in inputs for kind in each):
        count = max(len(each.get(kind, ())) for each in inputs)
        columns += [(kind if count == 1 else f"{kind} {number + 1}", kind, number) for number in range(count)]
    return columns


def _in_columns(given: Inputs, columns: Sequence[tuple[str, str, int]], size: tuple[int, int]) -> list[Image.Image | None]:
    """A row's input images, each in its column, no larger than this size; None where the row has none."""
    images: list[Image.Image | None] = []
    for _, kind, number in columns:
        image = given[kind][number] if number < len(given.get(kind, ())) else None
        fits = image is None or (image.width <= size[0] and image.height <= size[1])
        images.append(image if image is None or fits else ImageOps.contain(image, size, Image.Resampling.LANCZOS))
    return images


def cells(path: Path) -> list[tuple[Image.Image, str]]:
    """The drawn pictures of a sheet that `grid` made, each with its prompt; of another image itself, without one.

    Raises:
        OSError, ValueError: it is no image, or damaged.
    """
    return [(image, prompt) for image, prompt, _ in cells_with_inputs(path)]


def cells_with_inputs(path: Path) -> list[tuple[Image.Image, str, list[Image.Image]]]:
    """The same, each with the images that it was drawn from, as the sheet shows them."""
    with Image.open(path) as sheet:
        whole = sheet.convert("RGB")
        noted = sheet.info.get(_CELLS)
    whole.info.clear()
    if noted is None:
        return [(whole, "", [])]
    return [
        (whole.crop(tuple(box)), str(prompt), [whole.crop(tuple(each)) for each in (sources[0] if sources else [])])
        for prompt, box, *sources in json.loads(noted)
    ]


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
