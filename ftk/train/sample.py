"""`ftk sample`: pictures from the base model and from the adapter, same seeds, side by side in one grid."""

import gc
import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from ftk import storage
from ftk.configs.load import run_path
from ftk.configs.schema import RunConfig
from ftk.errors import CheckpointError, ConfigError
from ftk.methods import base as methods
from ftk.models import base as models
from ftk.models.base import Family
from ftk.progress import track

_MARGIN_PX = 12
_MIN_CELL_PX = 192


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleReport:
    """Where the grid lies, and how far the adapter moved the pictures: mean absolute difference in 8-bit levels."""

    grid: str
    num_images: int
    mean_difference: float
    adapter: str


def run(config: RunConfig) -> SampleReport:
    """Draw every prompt twice through diffusers' own pipeline: without and with the trained weights.

    Raises:
        ConfigError: `sample.prompts` is empty.
        CheckpointError: there are no trained weights yet.
    """
    family, directory = models.get(config.model.family), run_path(config)
    method, _ = methods.parse(config.method)
    adapter = directory / "adapter"
    if not config.sample.prompts:
        raise ConfigError('sample.prompts is empty: name at least one, for example --set sample.prompts="[a red fox]"')
    if not adapter.is_dir():
        raise CheckpointError(f"{adapter} does not exist: run `ftk train` first.")
    device = models.resolve_device(config.sample.device)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    components = (*family.latent_components, *family.text_components, *family.denoiser_components)
    pipeline = family.pipeline(models.locate(config.model, components), dtype, device)
    with track("sample", 2 * len(config.sample.prompts), "image") as progress:

        def draw_all(pipeline: Any) -> list[Image.Image]:
            images = []
            for position, prompt in enumerate(config.sample.prompts):
                texts = {"prompt": prompt}
                if config.sample.guidance_scale > 1:
                    texts["negative_prompt"] = config.sample.negative_prompt
                images.append(generate(pipeline, family, config, texts, position))
                progress.advance(1)
            return images

        base = draw_all(pipeline)
        method.load_into(pipeline, adapter)
        adapted = draw_all(pipeline)
    del pipeline
    gc.collect()
    path = directory / "samples" / "base-and-adapter.png"
    pairs = list(zip(base, adapted, strict=True))
    storage.commit_bytes(path, png_bytes(grid(pairs, list(config.sample.prompts), ["base", config.run])))
    return SampleReport(
        grid=str(path),
        num_images=2 * len(pairs),
        mean_difference=sum(_difference(*pair) for pair in pairs) / len(pairs),
        adapter=str(adapter),
    )


def dry_run(config: RunConfig) -> dict[str, Any]:
    """What `run` would draw, and whether there are weights to draw with."""
    width, height = size(config)
    return {
        "num_images": 2 * len(config.sample.prompts),
        "size": f"{width}x{height}",
        "num_inference_steps": config.sample.num_inference_steps,
        "adapter_exists": (run_path(config) / "adapter").is_dir(),
    }


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
    """Rows of images under column titles, each row under its prompt."""
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
        draw.text((_MARGIN_PX + column * (cell_width + _MARGIN_PX), _MARGIN_PX), title, "black", font)
    top = line_px + 2 * _MARGIN_PX
    for row, lines in zip(rows, wrapped, strict=True):
        draw.text((_MARGIN_PX, top), "\n".join(lines), "#444444", font)
        top += len(lines) * line_px + _MARGIN_PX // 2
        for column, image in enumerate(row):
            size = (image.width * scale, image.height * scale)
            sheet.paste(image.resize(size, Image.Resampling.NEAREST), (_MARGIN_PX + column * (cell_width + _MARGIN_PX), top))
        top += cell_height + _MARGIN_PX + _MARGIN_PX // 2
    return sheet


def png_bytes(image: Image.Image) -> bytes:
    """The image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _difference(first: Image.Image, second: Image.Image) -> float:
    pixels = [torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8) for image in (first, second)]
    return float((pixels[0].float() - pixels[1].float()).abs().mean())
