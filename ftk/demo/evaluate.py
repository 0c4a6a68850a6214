"""How well a model of the small world follows captions, and how well it knows the creature: pictures drawn and read back."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ftk import storage
from ftk.demo import checker, world
from ftk.demo.scenes import SIZES, Scene
from ftk.models.base import Family
from ftk.progress import track
from ftk.train.sheet import png_bytes

_CLASS_SEED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How pictures are drawn; a `guidance_scale` of 1 or less is none."""

    num_inference_steps: int = 20
    guidance_scale: float = 2.5
    batch_size: int = 16


def held_out(count: int) -> list[Scene]:
    """Scenes of the world that nothing was trained on."""
    return [world.scene(world.HELD_OUT_SEED, index) for index in range(count)]


def held_out_concept(count: int) -> list[Scene]:
    """Scenes with the creature that nothing was trained on."""
    return [world.concept_scene(world.HELD_OUT_SEED, index) for index in range(count)]


def held_out_creatures(count: int) -> list[Scene]:
    """Scenes with other creatures that nothing was trained on."""
    return [world.creature_scene(world.HELD_OUT_SEED, index) for index in range(count)]


def draw(
    pipeline: Any,
    family: Family,
    scenes: Sequence[Scene],
    sampling: Sampling,
    more: Callable[[Sequence[int]], Mapping[str, Any]] = lambda _: {},
) -> list[Image.Image]:
    """A picture from each caption, of the scene's size, from noise of its own position; those of one size together.

    Args:
        more: further arguments of the pipeline for a batch of scenes, by their positions.
    """
    drawn: dict[int, Image.Image] = {}
    with track("draw", len(scenes), "picture") as progress:
        for size in SIZES:
            indices = [index for index, scene in enumerate(scenes) if (scene.width, scene.height) == size]
            for start in range(0, len(indices), sampling.batch_size):
                part = indices[start : start + sampling.batch_size]
                images = _draw_batch(pipeline, family, [scenes[index] for index in part], part, sampling, more(part))
                drawn.update(zip(part, images, strict=True))
                progress.advance(len(part))
    return [drawn[index] for index in range(len(scenes))]


def _draw_batch(
    pipeline: Any,
    family: Family,
    scenes: Sequence[Scene],
    seeds: Sequence[int],
    sampling: Sampling,
    more: Mapping[str, Any],
) -> list[Image.Image]:
    guided = {"negative_prompt": [" "] * len(scenes)} if sampling.guidance_scale > 1 else {}
    result = pipeline(
        prompt=[scene.caption for scene in scenes],
        width=scenes[0].width,
        height=scenes[0].height,
        num_inference_steps=sampling.num_inference_steps,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **guided,
        **more,
        **family.generation(sampling.guidance_scale),
    )
    images: list[Image.Image] = result.images
    return images


def write_class_images(directory: Path, count: int, pipeline: Any, family: Family, sampling: Sampling) -> None:
    """What the model draws from captions of its world, each with its caption beside it: what it shall not forget.

    Every third is of a creature: without them each unknown word would come to mean the one that is learned.
    """
    scenes = [(world.creature_scene if index % 3 == 2 else world.scene)(_CLASS_SEED, index) for index in range(count)]
    for index, (scene, picture) in enumerate(zip(scenes, draw(pipeline, family, scenes, sampling), strict=True)):
        storage.commit_bytes(directory / f"{index:03d}.png", png_bytes(picture))
        storage.commit_bytes(directory / f"{index:03d}.txt", f"{scene.caption}\n".encode())


def agreement(pictures: Sequence[Image.Image], scenes: Sequence[Scene]) -> dict[str, float]:
    """By attribute, and for `all` together, the share of what captions tell that is there; both things count alike."""
    told: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for picture, scene in zip(pictures, scenes, strict=True):
        for name, agrees in checker.score(picture, scene).items():
            if name in scene.told:
                kind = name.rpartition(".")[2] if name.startswith("things") else name
                told[kind] += 1
                right[kind] += agrees
    return {"all": right.total() / told.total(), **{name: right[name] / told[name] for name in sorted(told)}}


def likeness(pictures: Sequence[Image.Image]) -> float:
    """The mean of `checker.similarity`: how much of the creature's look is in the pictures, 0 to 1."""
    return float(np.mean([checker.similarity(picture) for picture in pictures]))
