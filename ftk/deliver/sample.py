"""`ftk sample`: pictures from the base model, the run's weights and others on top, same seeds, side by side in one grid."""

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ftk import devices, storage
from ftk.cache import prompts as cached_prompts
from ftk.cache.plan import ImageItem
from ftk.configs.schema import RunConfig
from ftk.deliver import mixing
from ftk.deliver.export import Choice, chosen_adapter, find_checkpoint, run_dtype
from ftk.errors import ConfigError
from ftk.pipeline import prompt_images
from ftk.progress import ProgressBar, track
from ftk.run import Run
from ftk.train.drawing import generate, image_arguments
from ftk.train.sheet import grid, png_bytes

LOGGER = logging.getLogger("ftk")


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


def run(run: Run, choice: Choice = Choice()) -> SampleReport:  # noqa: B008 - it is frozen
    """Draw every prompt through diffusers' own pipeline: without the trained weights, with them, and with others on top.

    Args:
        choice: which weights, those in the run's adapter/ by default; its precision is the pipeline's too.

    Raises:
        ConfigError: `sample.prompts` is empty, or an adapter or a strength makes no sense.
        CheckpointError: there are no trained weights yet, or an adapter is of another base.
    """
    _check_prompts(run.config)
    with chosen_adapter(run, choice) as adapter:
        mixing.check_own_strength(run.config.sample.strength, adapter, run.config.method.name)
        return _run(run, choice, adapter)


def _run(run: Run, choice: Choice, adapter: Path) -> SampleReport:
    config, added = run.config, _added(run.config)
    device = devices.resolve_device(config.sample.device)
    dtype = _dtype(run, choice, device)
    directory = run.locate(run.all_components)
    images = _prompt_images(run, directory, device, dtype)
    negative = run.negative_prompt(directory)
    pipeline = run.family.pipeline(directory, dtype, device)
    files = mixing.read(run.family, pipeline, added)
    own = {} if run.trains_base else {mixing.OWN: config.sample.strength}
    num_columns = 3 if added else 2
    with track("sample", num_columns * len(config.sample.prompts), "image") as progress:
        # The base model takes the references of an edit model, and knows nothing of a method's control images.
        columns = [_draw_all(pipeline, run, [replace(each, controls=()) for each in images], negative, progress)]
        pipeline = run.method.load_into(run.family, pipeline, adapter)
        mixing.set_strengths(pipeline, own)
        columns.append(_draw_all(pipeline, run, images, negative, progress))
        if added:
            mixing.add(run.family, pipeline, own, [(file, each.strength) for file, each in zip(files, added, strict=True)])
            columns.append(_draw_all(pipeline, run, images, negative, progress))
    del pipeline
    gc.collect()
    path = run.paths.run / "samples" / f"base-and-{_file_name(run, choice)}.png"
    rows = list(zip(*columns, strict=True))
    storage.commit_bytes(path, png_bytes(grid(rows, [entry.prompt for entry in config.sample.entries], _titles(config))))
    return SampleReport(
        grid=str(path),
        num_images=sum(map(len, columns)),
        mean_difference=_mean_difference(columns[0], columns[1]),
        together=_mean_difference(columns[0], columns[2]) if added else None,
        adapter=str(adapter if choice.is_default else find_checkpoint(run, choice).path),
    )


def _dtype(run: Run, choice: Choice, device: torch.device) -> torch.dtype:
    """What the pipeline computes in: what is asked for, or the run's own precision; on a CPU fp32 in place of fp16."""
    if choice.dtype:
        asked: torch.dtype = getattr(torch, choice.dtype)
        return asked
    dtype = run_dtype(run)
    if dtype == torch.float16 and device.type == "cpu":
        LOGGER.info("the run computes in float16, for which the CPU has few kernels: drawing in float32")
        return torch.float32
    return dtype


def _file_name(run: Run, choice: Choice) -> str:
    """What the picture is called: others than those of the newest weights lie beside it."""
    names = [f"step-{find_checkpoint(run, choice).step:08d}"] if choice.step is not None or choice.best else ["adapter"]
    return "-".join([*names, *([choice.dtype] if choice.dtype else [])])


def dry_run(run: Run, choice: Choice = Choice()) -> dict[str, Any]:  # noqa: B008 - it is frozen
    """What `run` would draw, and whether there are weights to draw with."""
    if not choice.is_default:
        find_checkpoint(run, choice)
    width, height = run.sample_size
    added = _added(run.config)
    return {
        "num_images": (3 if added else 2) * len(run.config.sample.prompts),
        "size": f"{width}x{height}",
        "num_inference_steps": run.config.sample.num_inference_steps,
        "adapter_exists": run.paths.adapter.is_dir(),
        "adapters": [f"{each.path} ({each.kind}) at {each.strength:g}" for each in added],
    }


def _check_prompts(config: RunConfig) -> None:
    if not config.sample.prompts:
        raise ConfigError('sample.prompts is empty: name at least one, for example --set sample.prompts="[a red fox]"')


def _added(config: RunConfig) -> list[mixing.AddedAdapter]:
    return [mixing.find(each, f"sample.adapters.{position}.path") for position, each in enumerate(config.sample.adapters)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _PromptImages:
    """The images of one prompt, as `Conditions` has them, in a batch of one."""

    references: tuple[torch.Tensor, ...] = ()
    controls: tuple[torch.Tensor, ...] = ()


def _prompt_images(run: Run, directory: Path, device: torch.device, dtype: torch.dtype) -> list[_PromptImages]:
    """What each prompt is drawn from besides its text, encoded as `ftk cache` encodes it."""
    prompts = cached_prompts.of(run, directory)
    vae = run.family.load_vae(directory, torch.float32, device) if prompts.images else None

    def tensor(item: ImageItem) -> torch.Tensor:
        image = np.array(prompt_images.load(Path(item.key), item.width, item.height))
        pixels_BCHW = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1.0
        encoded = pixels_BCHW if item.form == "pixels" else run.family.encode_images(vae, pixels_BCHW)[0]
        return encoded.to(device, dtype)

    return [
        _PromptImages(
            references=tuple(map(tensor, prompts.references.get(entry.key(), ()))),
            controls=tuple(map(tensor, prompts.controls.get(entry.key(), ()))),
        )
        for entry in run.config.sample.entries
    ]


def _draw_all(
    pipeline: Any, run: Run, images: Sequence[_PromptImages], negative: str | None, progress: ProgressBar
) -> list[Image.Image]:
    drawn = []
    for position, (entry, shown) in enumerate(zip(run.config.sample.entries, images, strict=True)):
        arguments: dict[str, Any] = {"prompt": entry.prompt}
        if run.config.sample.guidance_scale > 1 and negative is not None:
            arguments["negative_prompt"] = negative
        arguments |= image_arguments(run, shown.references, shown.controls)
        drawn.append(generate(pipeline, run, arguments, position))
        progress.advance(1)
    return drawn


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
