"""Draws images with a diffusers pipeline: the sample images of training and of `ftk sample`, by the same settings and seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from ftk.configs.schema import PromptConfig
from ftk.methods.base import HasControls
from ftk.models.base import EditsImages
from ftk.run import Run


def generate(pipeline: Any, run: Run, arguments: Mapping[str, Any], position: int) -> Image.Image:
    """One image of the prompt at this position, whose texts and images are in the arguments.

    Noise is drawn on the CPU, so that it is the same anywhere.
    """
    drawn = run.drawn_prompts[position]
    result = pipeline(
        **arguments,
        width=drawn.width,
        height=drawn.height,
        num_inference_steps=drawn.num_inference_steps,
        generator=torch.Generator().manual_seed(drawn.seed),
        **run.family.generation(drawn.guidance_scale),
    )
    image: Image.Image = result.images[0]
    return image


def image_arguments(
    run: Run, entry: PromptConfig, references: Sequence[torch.Tensor], controls: Sequence[torch.Tensor]
) -> dict[str, Any]:
    """The pipeline's arguments for a prompt's images, as `Conditions` has them, each in a batch of one."""
    arguments: dict[str, Any] = {}
    if references:
        assert isinstance(run.family, EditsImages)
        arguments |= run.family.pipeline_references(references)
    if controls:
        assert isinstance(run.method, HasControls)
        arguments |= run.method.pipeline_controls(controls, entry.control_strength)
    return arguments
