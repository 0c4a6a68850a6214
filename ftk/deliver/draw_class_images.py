"""`ftk prepare --make-class-images`: draws the class images that a source lacks, with the base model's own pipeline.

An image depends on the source's settings and its index alone, so what a killed run left out is drawn as it would have been.
"""

import gc
import importlib.metadata
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ftk import devices, storage
from ftk.cache import fingerprint
from ftk.configs.schema import ModelConfig
from ftk.models.base import Family
from ftk.pipeline import class_images
from ftk.pipeline.class_images import RECORD, RECORD_SCHEMA, ClassImages, stem
from ftk.progress import track
from ftk.run import Run
from ftk.train.sheet import png_bytes

LOGGER = logging.getLogger("ftk")
_SEED_DIGITS = 15


def run(run: Run) -> None:
    """Draw what is missing of every source with `generate`, and free the model again.

    Raises:
        SourceError: images are there that were drawn with other settings or other weights.
        ModelError: the model is not of the family, or incomplete.
        EnvironmentFault: another process draws into the same folder, or the device or the Hub is not there.
    """
    for images in class_images.wanted(run):
        if images.num_missing or images.record is not None:
            _complete(images, run)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _complete(images: ClassImages, run: Run) -> None:
    model, components = run.config.model, run.all_components
    # Settings that are not set are left out: an older record does not name all of them.
    recorded = {name: value for name, value in (images.record or {}).get("model", {}).items() if value is not None}
    has_moved = images.record is not None and recorded != model.model_dump(mode="json", exclude_none=True)
    must_load = images.num_missing or has_moved
    directory = run.locate(components) if must_load else run.local_components(components)
    if directory is None:
        return  # complete, and drawn with a model of the Hub that has the same name
    drawn_with = {
        "generate": images.settings,
        "model": model.model_dump(mode="json", include={"family"}),
        "weights": {name: fingerprint.weights_digest(directory / name) for name in components},
    }
    with storage.lock(images.directory):
        storage.sweep(images.directory)
        images.refuse_changes(drawn_with)
        storage.commit_json(images.directory / RECORD, _record(images, drawn_with, model))
        if images.num_missing:
            _draw_missing(images, run.family, directory)


def _record(images: ClassImages, drawn_with: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """The record with the model's present place; the versions of libraries are those of the first image, for information."""
    new = {
        **drawn_with,
        "schema_version": RECORD_SCHEMA,
        "libraries": {name: importlib.metadata.version(name) for name in ("torch", "diffusers")},
    }
    return {**new, **(images.record or {}), "model": model.model_dump(mode="json")}


def _draw_missing(images: ClassImages, family: Family, directory: Path) -> None:
    device, dtype = devices.resolve_device(images.generate.device), getattr(torch, images.generate.dtype)
    pipeline = family.pipeline(directory, dtype, device)
    with track("class images", images.generate.count, "image", images.num_found) as progress:
        for batch, wanted in _batches(images.missing, images.generate.batch_size):
            drawn = zip(batch, _draw(pipeline, family, images, batch), strict=True)
            for index, image in drawn:
                if index in wanted:
                    _commit(images, index, image)
                    progress.advance(1)
    LOGGER.info("drew %s class images into %s", f"{images.num_missing:,}", images.directory)


def _batches(missing: Sequence[int], batch_size: int) -> Iterator[tuple[range, set[int]]]:
    """Whole batches, and which of each are missing: an image is the same whichever others were there before it."""
    for number, wanted in itertools.groupby(missing, key=lambda index: index // batch_size):
        yield range(number * batch_size, (number + 1) * batch_size), set(wanted)


def _draw(pipeline: Any, family: Family, images: ClassImages, indices: Sequence[int]) -> list[Image.Image]:
    """One image an index; its noise is drawn on the CPU, so that it is the same anywhere."""
    generate, (width, height) = images.generate, images.size
    texts = {"prompt": [images.caption] * len(indices)}
    if generate.guidance_scale > 1:
        texts["negative_prompt"] = [generate.negative_prompt] * len(indices)
    drawn: list[Image.Image] = pipeline(
        **texts,
        width=width,
        height=height,
        num_inference_steps=generate.num_inference_steps,
        generator=[torch.Generator().manual_seed(_seed(generate.seed, index)) for index in indices],
        **family.generation(generate.guidance_scale),
    ).images
    return drawn


def _seed(seed: int, index: int) -> int:
    return int(storage.digest([seed, index], _SEED_DIGITS), 16)


def _commit(images: ClassImages, index: int, image: Image.Image) -> None:
    """The caption first: an image that is there is complete."""
    path = images.directory / stem(index)
    storage.commit_bytes(path.with_suffix(".txt"), f"{images.caption}\n".encode())
    storage.commit_bytes(path.with_suffix(".png"), png_bytes(image))
