"""What `ftk demo` teaches, and how it finds out what was learned: a creature that the shipped model has never seen."""

import gc
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ftk import storage
from ftk.configs.load import RECIPES
from ftk.configs.schema import RunConfig
from ftk.demo import checker, evaluate, world
from ftk.demo.scenes import Scene
from ftk.errors import ModelError
from ftk.run import Run, load_run
from ftk.train import run_summary
from ftk.train.loop import NUM_BANDS
from ftk.train.sheet import grid, png_bytes

MODEL = Path(__file__).with_name("model")
"""A Qwen-Image of 3 million parameters in the Diffusers layout, trained on the small world: examples/world."""
FAMILY = "qwen-image"
NUM_PICTURES = 14
"""A dozen to learn from, and two that are held out."""
NUM_KNOWN = 96
"""That the model draws of its own world before, and is reminded of meanwhile."""
NUM_SCENES = 24
"""With the creature, as many without any, and as many with another one: both models draw them."""
NUM_SHOWN = (6, 3, 1)
"""Of each in the sheet."""
_SEED = 1

Pictures = Sequence[Image.Image]

_PLACES = {"model.path": "model", "data.sources.0.path": "pictures", "data.sources.1.path": "known"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A measure of the model as it is shipped, and of it with the adapter."""

    before: float
    after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BandChange:
    """Loss of the held-out pictures with sigma in [low, high)."""

    low: float
    high: float
    before: float
    after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LessonReport:
    """What was learned and what was kept, on scenes that were not trained on.

    Attributes:
        num_pictures: that it learned from; the held-out ones are not among them.
        likeness: how much of the creature's look is in pictures of captions with its word, 0 to 1.
        num_recognised: of how many of `num_scenes` such pictures a creature is seen in.
        followed: the share of what these captions tell (creature, ground, place, size, other things) that is there.
        kept: the share of what captions without the word tell that is there.
        num_confused: of how many of `num_scenes` pictures of another creature's name it is seen in.
        grid: a sheet of pictures before and after.
    """

    word: str
    num_pictures: int
    num_scenes: int
    likeness: Change
    num_recognised: Change
    followed: Change
    kept: Change
    num_confused: Change
    bands: list[BandChange]
    grid: str


def write_model(directory: Path) -> None:
    """Copy the shipped model.

    Raises:
        ModelError: this installation lacks it.
    """
    if not (MODEL / "model_index.json").is_file():
        raise ModelError(f"{MODEL} is missing: install ftk anew, with its data files.")
    with storage.committing_directory(directory) as temporary:
        shutil.copytree(MODEL, temporary, dirs_exist_ok=True)


def set_up(root: Path) -> Run:
    """Model, pictures, class images and run file in a folder. A model and class images that are there already stay."""
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "model" / "model_index.json").exists():
        write_model(root / "model")
    world.write_concept(root / "pictures", NUM_PICTURES, _SEED)
    run_file = root / "demo.yaml"
    storage.commit_bytes(run_file, (RECIPES / "demo.yaml").read_bytes())
    # JSON strings are YAML strings: any folder name survives --set
    places = [f"{key}={dumps(str(root / name))}" for key, name in _PLACES.items()]
    run = load_run(run_file, places, workspace=str(root))
    if len(list((root / "known").glob("*.txt"))) < NUM_KNOWN:
        evaluate.write_class_images(root / "known", NUM_KNOWN, _pipeline(run), run.family, _sampling(run.config))
    return run


def examine(run: Run) -> LessonReport:
    """Draw held-out scenes with and without the creature, before and after, and read the pictures."""
    kinds = [draw(NUM_SCENES) for draw in (evaluate.held_out_concept, evaluate.held_out, evaluate.held_out_creatures)]
    with_word, without, _ = kinds
    scenes = [scene for kind in kinds for scene in kind]
    before, after = _drawn(run, scenes)
    path = run.paths.run / "samples" / "before-and-after.png"
    shown = [number * NUM_SCENES + one for number, count in enumerate(NUM_SHOWN) for one in range(count)]
    sheet = grid([(before[one], after[one]) for one in shown], [scenes[one].caption for one in shown], ["before", "after"])
    storage.commit_bytes(path, png_bytes(sheet))
    taught, others, other_creatures = (
        (before[start : start + NUM_SCENES], after[start : start + NUM_SCENES]) for start in range(0, len(scenes), NUM_SCENES)
    )
    return LessonReport(
        word=world.CREATURE,
        num_pictures=NUM_PICTURES - round(run.config.train.validation.share * NUM_PICTURES),
        num_scenes=NUM_SCENES,
        likeness=_change(evaluate.likeness, *taught),
        num_recognised=_change(_num_recognised, *taught),
        followed=_change(lambda pictures: evaluate.agreement(pictures, with_word)["all"], *taught),
        kept=_change(lambda pictures: evaluate.agreement(pictures, without)["all"], *others),
        num_confused=_change(_num_recognised, *other_creatures),
        bands=_bands(run.paths.run),
        grid=str(path),
    )


def _drawn(run: Run, scenes: Sequence[Scene]) -> tuple[list[Image.Image], list[Image.Image]]:
    """By the base model, and with the adapter."""
    pipeline, sampling = _pipeline(run), _sampling(run.config)
    before = evaluate.draw(pipeline, run.family, scenes, sampling)
    pipeline = run.method.load_into(run.family, pipeline, run.paths.adapter)
    after = evaluate.draw(pipeline, run.family, scenes, sampling)
    del pipeline
    gc.collect()
    return before, after


def _pipeline(run: Run) -> Any:
    return run.family.pipeline(Path(run.config.model.path), torch.float32, torch.device("cpu"))


def _sampling(config: RunConfig) -> evaluate.Sampling:
    sample = config.sample
    return evaluate.Sampling(num_inference_steps=sample.num_inference_steps, guidance_scale=sample.guidance_scale)


def _change(measure: Callable[[Pictures], float], before: Pictures, after: Pictures) -> Change:
    return Change(before=measure(before), after=measure(after))


def _num_recognised(pictures: Pictures) -> int:
    return sum(checker.similarity(picture) >= checker.RECOGNISED for picture in pictures)


def _bands(directory: Path) -> list[BandChange]:
    """As validation measured them, before the first step and after the last."""
    losses_MK = run_summary.validation(directory).band_losses_MK
    edges = [number / NUM_BANDS for number in range(NUM_BANDS + 1)]
    return [
        BandChange(low=low, high=high, before=float(before), after=float(after))
        for low, high, before, after in zip(edges, edges[1:], losses_MK[0], losses_MK[-1], strict=False)
    ]
