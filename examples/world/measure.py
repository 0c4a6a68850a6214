"""How many of the attributes that captions tell are in the pictures that a model draws from them.

    python examples/world/measure.py work/world/small

Captions that nothing was trained on; each picture is read by `ftk.demo.checker`. Prints the share by attribute, and writes
measure.json and a sheet of pictures, measure.png, beside the model or to `--to`.
"""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from parts import HELD_OUT_SEED, parse, parser, positive, run
from PIL import Image
from rich.console import Console
from rich.table import Table

from ftk import storage
from ftk.demo import checker, world
from ftk.demo.scenes import SIZES, Scene
from ftk.errors import ModelError
from ftk.models.qwen_image import FAMILY
from ftk.progress import track
from ftk.train.sample import grid, png_bytes

NUM_ON_SHEET = 12


def held_out(count: int) -> list[Scene]:
    """Scenes that nothing was trained on."""
    return [world.scene(HELD_OUT_SEED, index) for index in range(count)]


def draw(pipeline: Any, scenes: list[Scene], settings: Any) -> list[Image.Image]:
    """A picture from each caption, of the scene's size, with a seed of its own; those of one size are drawn together."""
    drawn: dict[int, Image.Image] = {}
    with track("draw", len(scenes), "picture") as progress:
        for size in SIZES:
            indices = [index for index, scene in enumerate(scenes) if (scene.width, scene.height) == size]
            for start in range(0, len(indices), settings.batch_size):
                part = indices[start : start + settings.batch_size]
                drawn.update(zip(part, _draw_batch(pipeline, [scenes[index] for index in part], part, settings), strict=True))
                progress.advance(len(part))
    return [drawn[index] for index in range(len(scenes))]


def _draw_batch(pipeline: Any, scenes: list[Scene], seeds: list[int], settings: Any) -> list[Image.Image]:
    guided = {"negative_prompt": [" "] * len(scenes)} if settings.guidance_scale > 1 else {}
    result = pipeline(
        prompt=[scene.caption for scene in scenes],
        width=scenes[0].width,
        height=scenes[0].height,
        num_inference_steps=settings.num_inference_steps,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **guided,
        **FAMILY.generation(settings.guidance_scale),
    )
    images: list[Image.Image] = result.images
    return images


def agreement(pictures: list[Image.Image], scenes: list[Scene]) -> dict[str, float]:
    """By attribute, and for all together, the share of what captions tell that is there; both things of a scene count alike."""
    told: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for picture, scene in zip(pictures, scenes, strict=True):
        for name, agrees in checker.score(picture, scene).items():
            if name in scene.told:
                kind = name.rpartition(".")[2] if name.startswith("things") else name
                told[kind] += 1
                right[kind] += agrees
    return {"all": right.total() / told.total(), **{name: right[name] / told[name] for name in sorted(told)}}


def show(found: dict[str, Any]) -> None:
    """A row for each attribute."""
    title = f"{found['num_captions']} held-out captions, {found['seconds_per_picture']:.2f} s a picture"
    table = Table("told", "there", title=title, title_justify="left")
    for name, share in found["agreement"].items():
        table.add_row(name, f"{share:.1%}")
    Console().print(table)


def main() -> None:
    """The command."""
    made = parser(__doc__)
    made.add_argument("model", type=Path, help="a pipeline's folder")
    made.add_argument("--count", type=positive, default=200, help="captions")
    made.add_argument("--num-inference-steps", type=positive, default=20)
    made.add_argument("--guidance-scale", type=float, default=1.0, help="1 or less: none")
    made.add_argument("--batch-size", type=positive, default=16)
    made.add_argument(
        "--to", type=Path, metavar="DIR", help="where the numbers and the sheet go; the model's parent by default"
    )
    options = parse(made)
    if not options.model.is_dir():
        raise ModelError(f"{options.model} does not exist: assemble.py writes a model, and prints where.")
    FAMILY.check(options.model)
    pipeline = FAMILY.pipeline(options.model, torch.float32, torch.device("cpu"))
    scenes = held_out(options.count)
    started = time.monotonic()
    pictures = draw(pipeline, scenes, options)
    found = {
        "model": options.model.name,
        "num_captions": len(scenes),
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "seconds_per_picture": (time.monotonic() - started) / len(scenes),
        "agreement": agreement(pictures, scenes),
    }
    to = options.to or options.model.parent
    storage.commit_json(to / "measure.json", found)
    rows = [(world.render(scene), picture) for scene, picture in zip(scenes, pictures, strict=True)][:NUM_ON_SHEET]
    sheet = grid(rows, [scene.caption for scene in scenes[:NUM_ON_SHEET]], ["the world's own", options.model.name])
    storage.commit_bytes(to / "measure.png", png_bytes(sheet))
    show(found)


if __name__ == "__main__":
    run(main)
