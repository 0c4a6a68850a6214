"""How many of the attributes that captions tell are in the pictures that a model draws from them.

    python examples/world/measure.py work/world/small

Captions that nothing was trained on; each picture is read by `ftk.demo.checker`. Prints the share by attribute, and writes
measure.json and a sheet of pictures, measure.png, beside the model or to `--to`.
"""

import time
from pathlib import Path
from typing import Any

import torch
from parts import parse, parser, positive, run
from rich.console import Console
from rich.table import Table
from train_vae import decoded

from ftk import storage
from ftk.demo import evaluate, world
from ftk.errors import ModelError
from ftk.models.qwen_image import FAMILY
from ftk.train.sheet import grid, png_bytes

NUM_ON_SHEET = 12


def show(found: dict[str, Any]) -> None:
    """A row for each attribute."""
    title = f"{found['num_captions']} held-out captions, {found['seconds_per_picture']:.2f} s a picture"
    table = Table("told", "there", "in the world's own, through the VAE", title=title, title_justify="left")
    for name, share in found["agreement"].items():
        table.add_row(name, f"{share:.1%}", f"{found['through_vae'][name]:.1%}")
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
    scenes = evaluate.held_out(options.count)
    sampling = evaluate.Sampling(
        num_inference_steps=options.num_inference_steps, guidance_scale=options.guidance_scale, batch_size=options.batch_size
    )
    started = time.monotonic()
    pictures = evaluate.draw(pipeline, FAMILY, scenes, sampling)
    found = {
        "model": options.model.name,
        "num_captions": len(scenes),
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "seconds_per_picture": (time.monotonic() - started) / len(scenes),
        "agreement": evaluate.agreement(pictures, scenes),
        "through_vae": evaluate.agreement([decoded(world.render(scene), pipeline.vae) for scene in scenes], scenes),
    }
    to = options.to or options.model.parent
    storage.commit_json(to / "measure.json", found)
    rows = [(world.render(scene), picture) for scene, picture in zip(scenes, pictures, strict=True)][:NUM_ON_SHEET]
    sheet = grid(rows, [scene.caption for scene in scenes[:NUM_ON_SHEET]], ["the world's own", options.model.name])
    storage.commit_bytes(to / "measure.png", png_bytes(sheet))
    show(found)


if __name__ == "__main__":
    run(main)
