"""`ftk sample`: pictures from the base model, the run's weights and others on top, same seeds, side by side in one grid."""

import gc
import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ftk import storage
from ftk.configs.load import run_path
from ftk.configs.schema import RunConfig
from ftk.errors import CheckpointError, ConfigError
from ftk.methods import base as methods
from ftk.models import base as models
from ftk.models.base import Family
from ftk.progress import Tracker, track
from ftk.train import mixing

_MARGIN_PX = 12
_MIN_CELL_PX = 192
_CELLS = "cells"
"""Text in a sheet's PNG: JSON, of each picture its prompt and its box in px (left, top, right, bottom)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleReport:
    """Where the grid lies, and how far the adapter moved the pictures: mean absolute difference in 8-bit levels.

    `together`: the same of the run's own and all of `sample.adapters`; None without any.
    """

    grid: str
    num_images: int
    mean_difference: float
    together: float | None
    adapter: str


def run(config: RunConfig) -> SampleReport:
    """Draw every prompt through diffusers' own pipeline: without the trained weights, with them, and with others on top.

    Raises:
        ConfigError: `sample.prompts` is empty, or an adapter or a strength makes no sense.
        CheckpointError: there are no trained weights yet, or an adapter is of another base.
    """
    family, directory = models.get(config.model.family), run_path(config)
    method, settings = methods.parse(config.method)
    adapter = directory / "adapter"
    added = _check(config, adapter)
    device = models.resolve_device(config.sample.device)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    components = (*family.latent_components, *family.text_components, *family.denoiser_components)
    pipeline = family.pipeline(models.locate(config.model, components), dtype, device)
    mixing.check_fits(pipeline, added)
    own = {} if methods.trains_base(method, settings) else {mixing.OWN: config.sample.strength}
    num_columns = 3 if added else 2
    with track("sample", num_columns * len(config.sample.prompts), "image") as progress:
        columns = [_draw_all(pipeline, family, config, progress)]
        method.load_into(pipeline, adapter)
        mixing.set_strengths(pipeline, own)
        columns.append(_draw_all(pipeline, family, config, progress))
        if added:
            mixing.add(pipeline, own, added)
            columns.append(_draw_all(pipeline, family, config, progress))
    del pipeline
    gc.collect()
    path = directory / "samples" / "base-and-adapter.png"
    rows = list(zip(*columns, strict=True))
    storage.commit_bytes(path, png_bytes(grid(rows, list(config.sample.prompts), _titles(config))))
    return SampleReport(
        grid=str(path),
        num_images=sum(map(len, columns)),
        mean_difference=_mean_difference(columns[0], columns[1]),
        together=_mean_difference(columns[0], columns[2]) if added else None,
        adapter=str(adapter),
    )


def dry_run(config: RunConfig) -> dict[str, Any]:
    """What `run` would draw, and whether there are weights to draw with."""
    width, height = size(config)
    added = _added(config)
    return {
        "num_images": (3 if added else 2) * len(config.sample.prompts),
        "size": f"{width}x{height}",
        "num_inference_steps": config.sample.num_inference_steps,
        "adapter_exists": (run_path(config) / "adapter").is_dir(),
        "adapters": [f"{one.folder} ({one.kind}) at {one.strength:g}" for one in added],
    }


def _check(config: RunConfig, adapter: Path) -> list[mixing.Found]:
    """What is to be added, once all that is asked for is there."""
    if not config.sample.prompts:
        raise ConfigError('sample.prompts is empty: name at least one, for example --set sample.prompts="[a red fox]"')
    if not adapter.is_dir():
        raise CheckpointError(f"{adapter} does not exist: run `ftk train` first.")
    mixing.check_own_strength(config.sample.strength, adapter, config.method.name)
    return _added(config)


def _added(config: RunConfig) -> list[mixing.Found]:
    return [mixing.find(one, f"sample.adapters.{position}") for position, one in enumerate(config.sample.adapters)]


def _draw_all(pipeline: Any, family: Family, config: RunConfig, progress: Tracker) -> list[Image.Image]:
    images = []
    for position, prompt in enumerate(config.sample.prompts):
        texts = {"prompt": prompt}
        if config.sample.guidance_scale > 1:
            texts["negative_prompt"] = config.sample.negative_prompt
        images.append(generate(pipeline, family, config, texts, position))
        progress.advance(1)
    return images


def _titles(config: RunConfig) -> list[str]:
    strength = config.sample.strength
    own = config.run if strength == 1 else f"{config.run} at {strength:g}"
    added = [f"{_name(one.path)} at {one.strength:g}" for one in config.sample.adapters]
    return ["base", own, " + ".join([own, *added])][: 3 if added else 2]


def _name(path: str) -> str:
    """A run's folder rather than the adapter/ in it."""
    place = Path(path).absolute()
    return place.parent.name if place.name in ("adapter", "best") else place.name


def generate(pipeline: Any, family: Family, config: RunConfig, texts: Mapping[str, Any], position: int) -> Image.Image:
    """One image; its seed is `sample.seed` plus the prompt's position, drawn on the CPU so that it is the same anywhere."""
    width, height = size(config)
    result = pipeline(
        **texts,
        width=width,
        height=height,
        num_inference_steps=config.sample.num_inference_steps,
        generator=torch.Generator().manual_seed(config.sample.seed + position),
        **family.generation(config.sample.guidance_scale),
    )
    image: Image.Image = result.images[0]
    return image


def size(config: RunConfig) -> tuple[int, int]:
    """(width, height) in px of what is drawn; `ConfigError` if the family has no such images."""
    multiple = models.get(config.model.family).geometry.pixel_multiple
    edge = config.data.resolutions[0] // multiple * multiple
    width, height = config.sample.width or edge, config.sample.height or edge
    if width % multiple or height % multiple:
        raise ConfigError(f"sample: {width} x {height} px; {config.model.family} needs multiples of {multiple} px.")
    return width, height


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


def _mean_difference(first: Sequence[Image.Image], second: Sequence[Image.Image]) -> float:
    return sum(_difference(*pair) for pair in zip(first, second, strict=True)) / len(first)


def _difference(first: Image.Image, second: Image.Image) -> float:
    pixels = [torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8) for image in (first, second)]
    return float((pixels[0].float() - pixels[1].float()).abs().mean())
