"""What `ftk demo --control` teaches: the shipped model learns to put things where the outlines of a control image are.

Captions of these scenes tell what there is and on which ground, and leave places and sizes out: a control that says what its
caption says already is learned to be ignored.
"""

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ftk import storage
from ftk.configs.load import RECIPES
from ftk.configs.schema import RunConfig
from ftk.demo import checker, evaluate, lesson, world
from ftk.demo.drawing import render_edges
from ftk.demo.scenes import Scene
from ftk.methods.base import HasControls
from ftk.run import Run, load_run
from ftk.train.sheet import grid, png_bytes

RECIPE = "demo-control.yaml"
NUM_PICTURES = 240
NUM_SCENES = 24
"""That nothing was trained on: drawn without a control, with their own, and with another scene's."""
NUM_SHOWN = 8
"""Of them in the sheet."""
_SEED = 5
_PLACES = {
    "model.path": "model", "data.sources.0.path": "pictures", "data.sources.0.controls.0": f"pictures/{world.EDGES}",
}  # fmt: skip
_COLOURS_OF_THINGS = ("things.0.colour", "things.1.colour")


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far pictures show their scenes.

    Attributes:
        place, size, shape, colour: the shares of things that have the scene's.
        ground: the share of pictures with the scene's colour of the ground.
        distance_px: from where a thing is to where it is to be, the mean over pictures of one thing each.
    """

    place: float
    size: float
    shape: float
    colour: float
    ground: float
    distance_px: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeringReport:
    """What the pictures of captions without places show.

    Attributes:
        without: by the base model, from the caption alone.
        steered: with the control image of the scene.
        shuffled: with that of another scene of the same size: what the caption and chance do.
        grid: a sheet of controls, and of pictures without and with them.
    """

    num_pictures: int
    num_scenes: int
    without: Agreement
    steered: Agreement
    shuffled: Agreement
    grid: str


def set_up(root: Path) -> Run:
    """Model, pictures with control images, and run file in a folder. A model that is there already stays."""
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "model" / "model_index.json").exists():
        lesson.write_model(root / "model")
    world.write_steered(root / "pictures", NUM_PICTURES, _SEED)
    run_file = root / RECIPE
    storage.commit_bytes(run_file, (RECIPES / RECIPE).read_bytes())
    # JSON strings are YAML strings: any folder name survives --set
    places = [f"{key}={dumps(str(root / name))}" for key, name in _PLACES.items()]
    return load_run(run_file, places, workspace=str(root))


def held_out(count: int) -> list[Scene]:
    """Scenes whose captions tell no place that nothing was trained on."""
    return [world.steered_scene(world.HELD_OUT_SEED, index) for index in range(count)]


def shuffled(scenes: Sequence[Scene]) -> list[Scene]:
    """For each scene the next one of its size, whose control image does not fit it."""
    following: dict[int, Scene] = {}
    for size in {(scene.width, scene.height) for scene in scenes}:
        indices = [index for index, scene in enumerate(scenes) if (scene.width, scene.height) == size]
        following |= {index: scenes[after] for index, after in zip(indices, [*indices[1:], indices[0]], strict=True)}
    return [following[index] for index in range(len(scenes))]


def examine(run: Run) -> SteeringReport:
    """Draw scenes without a control, with their own and with another's, and read the pictures."""
    scenes, sampling = held_out(NUM_SCENES), _sampling(run.config)
    pipeline = base_pipeline(run)
    without = evaluate.draw(pipeline, run.family, scenes, sampling)
    pipeline = run.method.load_into(run.family, pipeline, run.paths.adapter)
    steered = draw(pipeline, run, scenes, scenes, sampling)
    with_another = draw(pipeline, run, scenes, shuffled(scenes), sampling)
    del pipeline
    gc.collect()
    path = run.paths.run / "samples" / "steered.png"
    rows = [(render_edges(scene), *pictures) for scene, *pictures in zip(scenes, without, steered, strict=True)][:NUM_SHOWN]
    sheet = grid(rows, [scene.caption for scene in scenes[:NUM_SHOWN]], ["control", "without", "with the control"])
    storage.commit_bytes(path, png_bytes(sheet))
    return SteeringReport(
        num_pictures=NUM_PICTURES,
        num_scenes=NUM_SCENES,
        without=agreement(without, scenes),
        steered=agreement(steered, scenes),
        shuffled=agreement(with_another, scenes),
        grid=str(path),
    )


def base_pipeline(run: Run) -> Any:
    """The shipped model's, as the run file names it."""
    return run.family.pipeline(Path(run.config.model.path), torch.float32, torch.device("cpu"))


def draw(
    pipeline: Any,
    run: Run,
    scenes: Sequence[Scene],
    controls: Sequence[Scene],
    sampling: evaluate.Sampling,
    **options: Any,
) -> list[Image.Image]:
    """A picture of each caption with the outlines of another scene, or of its own.

    Args:
        pipeline: that draws with what the run has trained.
        options: more arguments of `HasControls.pipeline_controls`.
    """
    outlines = [render_edges(scene) for scene in controls]
    vae = run.family.load_vae(Path(run.config.model.path), torch.float32, torch.device("cpu"))

    def arguments(indices: Sequence[int]) -> Mapping[str, Any]:
        assert isinstance(run.method, HasControls)
        images = np.stack([np.asarray(outlines[index]) for index in indices])
        pixels_BCHW = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        is_pixels = run.needs.controls == "pixels"
        control_BCHW = pixels_BCHW if is_pixels else run.family.encode_images(vae, pixels_BCHW)[0]
        return run.method.pipeline_controls([control_BCHW], **options)

    return evaluate.draw(pipeline, run.family, scenes, sampling, arguments)


def agreement(pictures: Sequence[Image.Image], scenes: Sequence[Scene]) -> Agreement:
    """Read the pictures, and compare them with the scenes, whatever their captions tell."""
    scores = [checker.score(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]

    def share(ending: str) -> float:
        return float(np.mean([agrees for score in scores for name, agrees in score.items() if name.endswith(ending)]))

    distances = [_distance(*pair) for pair in zip(pictures, scenes, strict=True) if len(pair[1].things) == 1]
    return Agreement(
        place=share(".place"),
        size=share(".size"),
        shape=share(".shape"),
        colour=float(np.mean([score[name] for score in scores for name in _COLOURS_OF_THINGS if name in score])),
        ground=share("ground.colour"),
        distance_px=float(np.mean(distances)),
    )


def _distance(picture: Image.Image, scene: Scene) -> float:
    """From the largest thing in the picture to the scene's first; half of the picture's diagonal where there is none."""
    things = checker.read(picture).things
    if not things:
        return math.hypot(scene.width, scene.height) / 2
    return math.dist((things[0].x, things[0].y), (scene.things[0].x, scene.things[0].y))


def _sampling(config: RunConfig) -> evaluate.Sampling:
    sample = config.sample
    return evaluate.Sampling(num_inference_steps=sample.num_inference_steps, guidance_scale=sample.guidance_scale)
