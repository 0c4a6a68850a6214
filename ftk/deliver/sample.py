"""`ftk sample`: pictures from the base model, the run's weights and others on top, same seeds, side by side in one grid."""

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from ftk.methods.base import HasControls
from ftk.pipeline import prompt_images
from ftk.progress import ProgressBar, track
from ftk.run import DrawnPrompt, Run
from ftk.train.drawing import generate, image_arguments
from ftk.train.sheet import Inputs, grid, png_bytes

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
        _check_strengths(run, adapter)
        return _run(run, choice, adapter)


def _run(run: Run, choice: Choice, adapter: Path) -> SampleReport:
    config, added = run.config, _added(run.config)
    device = devices.resolve_device(config.sample.device)
    dtype = _dtype(run, choice, device)
    directory = run.locate(run.all_components)
    images = _prompt_images(run, directory, device, dtype)
    pipeline = run.family.pipeline(directory, dtype, device)
    files = mixing.read(run.family, pipeline, added)
    own = {} if run.trains_base else {mixing.OWN: config.sample.strength}
    num_columns = 3 if added else 2
    with track("sample", num_columns * len(config.sample.prompts), "image") as progress:
        column = _Column(run=run, images=images, directory=directory, progress=progress)
        # The base model takes the references of an edit model, and knows nothing of a method's control images.
        columns = [replace(column, images=[replace(each, controls=()) for each in images]).drawn(pipeline, {})]
        pipeline = run.method.load_into(run.family, pipeline, adapter)
        columns.append(column.drawn(pipeline, own))
        if added:
            strengths = mixing.add(
                run.family, pipeline, own, [(file, each.strength) for file, each in zip(files, added, strict=True)]
            )
            columns.append(column.drawn(pipeline, strengths))
    del pipeline
    gc.collect()
    path = run.paths.run / "samples" / f"base-and-{_file_name(run, choice)}.png"
    entries = config.sample.entries
    page = grid(
        list(zip(*columns, strict=True)),
        [entry.prompt for entry in entries],
        _titles(config),
        [each.shown for each in images],
        [entry.notes() for entry in entries],
    )
    storage.commit_bytes(path, png_bytes(page))
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
    added, drawn = _added(run.config), run.drawn_prompts
    return {
        "num_images": (3 if added else 2) * len(run.config.sample.prompts),
        "size": ", ".join(dict.fromkeys(f"{each.width}x{each.height}" for each in drawn)),
        "num_inference_steps": ", ".join(dict.fromkeys(str(each.num_inference_steps) for each in drawn)),
        "adapter_exists": run.paths.adapter.is_dir(),
        "adapters": [f"{each.path} ({each.kind}) at {each.strength:g}" for each in added],
    }


def _check_prompts(config: RunConfig) -> None:
    if not config.sample.prompts:
        raise ConfigError('sample.prompts is empty: name at least one, for example --set sample.prompts="[a red fox]"')


def _check_strengths(run: Run, adapter: Path) -> None:
    """Refuse a strength, of all prompts or of one, that the run's own adapter has not."""
    own = [(f"{drawn.place}.strength", drawn.entry.strength) for drawn in run.drawn_prompts]
    for setting, strength in [("sample.strength", run.config.sample.strength), *own]:
        if strength in (None, 1):
            continue
        if isinstance(run.method, HasControls):
            raise ConfigError(
                f"{setting}: method {run.method.name} has the strength of its control images instead. Write {{prompt: ..., "
                f"controls: [FILE], control_strength: {strength:g}}}."
            )
        mixing.check_own_strength(strength, adapter, run.method.name, setting)


def _added(config: RunConfig) -> list[mixing.AddedAdapter]:
    return [mixing.find(each, f"sample.adapters.{position}.path") for position, each in enumerate(config.sample.adapters)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _PromptImages:
    """The images of one prompt, as `Conditions` has them, in a batch of one; and as the sheet shows them.

    `texts` are the pipeline's arguments in place of prompt and negative prompt, where these depend on the references.
    """

    texts: Mapping[str, Any] = field(default_factory=dict)
    references: tuple[torch.Tensor, ...] = ()
    controls: tuple[torch.Tensor, ...] = ()
    shown: Inputs = field(default_factory=dict)


def _prompt_images(run: Run, directory: Path, device: torch.device, dtype: torch.dtype) -> list[_PromptImages]:
    """What each prompt is drawn from besides its text, encoded as `ftk cache` encodes it."""
    prompts = cached_prompts.of(run, directory)
    vae = run.family.load_vae(directory, torch.float32, device) if prompts.images else None

    def picture(item: ImageItem) -> Image.Image:
        return prompt_images.load(Path(item.key), item.width, item.height, item.made)

    def tensor(item: ImageItem) -> torch.Tensor:
        pixels_BCHW = _pixels(item)
        encoded = pixels_BCHW if item.form == "pixels" else run.family.encode_images(vae, pixels_BCHW)[0]
        return encoded.to(device, dtype)

    every = []
    texts = _texts_of_references(run, directory, prompts, device, dtype)
    for entry in run.config.sample.entries:
        references, controls = (part.get(entry.key(), ()) for part in (prompts.references, prompts.controls))
        shown = {"reference": list(map(picture, references)), "control": list(map(picture, controls))}
        every.append(
            _PromptImages(
                texts=texts.get(entry.key(), {}),
                references=tuple(map(tensor, references)),
                controls=tuple(map(tensor, controls)),
                shown={kind: pictures for kind, pictures in shown.items() if pictures},
            )
        )
    return every


def _texts_of_references(
    run: Run, directory: Path, prompts: cached_prompts.Prompts, device: torch.device, dtype: torch.dtype
) -> dict[str, dict[str, Any]]:
    """By `PromptConfig.key`, the pipeline's arguments for the texts of prompts whose references the text encoder sees."""
    if not prompts.seen:
        return {}
    encoder = run.family.load_text_encoder(directory, dtype, device)
    arguments: dict[str, dict[str, Any]] = {}
    for entry in run.config.sample.entries:
        if entry.key() not in prompts.seen:
            continue
        seen = [_pixels(item)[0].to(device) for item in prompts.seen[entry.key()]]
        negative = run.negative_prompt(directory, entry)
        items = run.family.encode_texts(encoder, [entry.prompt, *([] if negative is None else [negative])], [seen, seen])
        arguments[entry.key()] = {
            f"{prefix}{name}": value
            for prefix, item in zip(("", "negative_"), items, strict=False)
            for name, value in run.family.pipeline_texts(item).items()
        }
    return arguments


def _pixels(item: ImageItem) -> torch.Tensor:
    """[1,3,H,W] in [-1, 1]."""
    picture = np.array(prompt_images.load(Path(item.key), item.width, item.height, item.made))
    return torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Column:
    """What all columns of the sheet have in common. `images` are those of each prompt, `directory` is that of the base."""

    run: Run
    images: Sequence[_PromptImages]
    directory: Path
    progress: ProgressBar

    def drawn(self, pipeline: Any, strengths: Mapping[str, float]) -> list[Image.Image]:
        """Every prompt's picture, with these adapters; a prompt may have a strength of the run's own in its place."""
        return [self._image(pipeline, strengths, drawn, position) for position, drawn in enumerate(self.run.drawn_prompts)]

    def _image(self, pipeline: Any, strengths: Mapping[str, float], drawn: DrawnPrompt, position: int) -> Image.Image:
        entry, given = drawn.entry, self.images[position]
        if strengths:
            own = {mixing.OWN: entry.strength} if entry.strength is not None and mixing.OWN in strengths else {}
            mixing.set_strengths(pipeline, {**strengths, **own})
        arguments: dict[str, Any] = dict(given.texts) or {"prompt": entry.prompt}
        negative = self.run.negative_prompt(self.directory, entry)
        if drawn.has_negative and negative is not None and not given.texts:
            arguments["negative_prompt"] = negative
        if not drawn.has_negative:
            arguments = {name: value for name, value in arguments.items() if not name.startswith("negative_")}
        arguments |= image_arguments(self.run, entry, given.references, given.controls)
        image = generate(pipeline, self.run, arguments, position)
        self.progress.advance(1)
        return image


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
