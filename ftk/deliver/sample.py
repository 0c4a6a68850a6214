"""`ftk sample`: pictures from the base model, the run's weights and others on top, same seeds, side by side in one grid."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ftk import storage
from ftk.configs.load import run_path
from ftk.configs.schema import RunConfig
from ftk.deliver import mixing
from ftk.errors import CheckpointError, ConfigError
from ftk.methods import base as methods
from ftk.models import base as models
from ftk.models.base import Family
from ftk.progress import ProgressBar, track
from ftk.train.drawing import generate, size
from ftk.train.sheet import grid, png_bytes


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


def _check(config: RunConfig, adapter: Path) -> list[mixing.DeliveredAdapter]:
    """What is to be added, once all that is asked for is there."""
    if not config.sample.prompts:
        raise ConfigError('sample.prompts is empty: name at least one, for example --set sample.prompts="[a red fox]"')
    if not adapter.is_dir():
        raise CheckpointError(f"{adapter} does not exist: run `ftk train` first.")
    mixing.check_own_strength(config.sample.strength, adapter, config.method.name)
    return _added(config)


def _added(config: RunConfig) -> list[mixing.DeliveredAdapter]:
    return [mixing.find(one, f"sample.adapters.{position}") for position, one in enumerate(config.sample.adapters)]


def _draw_all(pipeline: Any, family: Family, config: RunConfig, progress: ProgressBar) -> list[Image.Image]:
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


def _mean_difference(first: Sequence[Image.Image], second: Sequence[Image.Image]) -> float:
    return sum(_difference(*pair) for pair in zip(first, second, strict=True)) / len(first)


def _difference(first: Image.Image, second: Image.Image) -> float:
    pixels = [torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8) for image in (first, second)]
    return float((pixels[0].float() - pixels[1].float()).abs().mean())
