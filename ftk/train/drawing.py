"""Draws images with a diffusers pipeline: the sample images of training and of `ftk sample`, by the same settings and seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from ftk.methods.base import HasControls
from ftk.models.base import EditsImages
from ftk.run import Run


def generate(pipeline: Any, run: Run, arguments: Mapping[str, Any], position: int) -> Image.Image:
    """One image of a prompt, whose texts and images are in the arguments.

    Its seed is `sample.seed` plus the prompt's position; noise is drawn on the CPU, so that it is the same anywhere.
    """
    width, height = run.sample_size
    settings = run.config.sample
    result = pipeline(
        **arguments,
        width=width,
        height=height,
        num_inference_steps=settings.num_inference_steps,
        generator=torch.Generator().manual_seed(settings.seed + position),
        **run.family.generation(settings.guidance_scale),
    )
    image: Image.Image = result.images[0]
    return image


def image_arguments(run: Run, references: Sequence[torch.Tensor], controls: Sequence[torch.Tensor]) -> dict[str, Any]:
    """The pipeline's arguments for a prompt's images, as `Conditions` has them, each in a batch of one."""
    arguments: dict[str, Any] = {}
    if references:
        assert isinstance(run.family, EditsImages)
        arguments |= run.family.pipeline_references(references)
    if controls:
        assert isinstance(run.method, HasControls)
        arguments |= run.method.pipeline_controls(controls)
    return arguments
