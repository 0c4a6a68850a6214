"""Draws images with a diffusers pipeline: the sample images of training and of `ftk sample`, by the same settings and seeds."""

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from ftk.configs.schema import RunConfig
from ftk.errors import ConfigError
from ftk.models import base as models
from ftk.models.base import Family


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
