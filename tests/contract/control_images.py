"""Control images for methods that read some: as tensors, and as a dataset of several kinds of them."""

import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from ftk.configs.load import validate
from ftk.configs.schema import RunConfig
from ftk.errors import ConfigError
from ftk.methods import base as methods
from ftk.methods.base import HasControls, Method
from ftk.models import base as families
from ftk.models.base import Family
from ftk.run import Run, resolve

SIDE = 64
MERGED = {("stable-diffusion", "control-lora"), ("sdxl", "control-lora")}
"""The pairs of which something can be folded into the base weights."""


def tensors(method: Method, family: Family, settings: Any, count: int) -> tuple[torch.Tensor, ...]:
    """`Conditions.controls` of so many samples of 64 px, in the form that the method reads; () for a method that reads none."""
    if not isinstance(method, HasControls):
        return ()
    draw = torch.Generator().manual_seed(5)
    if method.cache_needs(family, settings).controls == "pixels":
        return (torch.rand(count, 3, SIDE, SIDE, generator=draw) * 2 - 1,)
    cells = SIDE // family.geometry.factor
    return (torch.randn(count, family.geometry.channels, cells, cells, generator=draw),)


def knows(family_name: str, method_name: str, settings: Any) -> bool:
    """Whether the method can train this family: one that cannot says so before any weights are read."""
    method = methods.get(method_name)
    try:
        method.encoders(families.get(family_name), method.Config.model_validate(settings))
    except ConfigError:
        return False
    return True


def write(root: Path) -> None:
    """Six pictures with `edges`, of which the last three have a `blocks` too."""
    chance = random.Random(3)
    for number in range(6):
        name, colour = f"{number}.png", tuple(chance.randbytes(3))
        width, height = (SIDE, SIDE) if number % 3 else (2 * SIDE, SIDE)
        left, top = chance.randrange(width // 2), chance.randrange(height // 2)
        box = (left, top, left + width // 2, top + height // 2)
        picture, edges, blocks = (Image.new("RGB", (width, height), background) for background in ("white", "black", "gray"))
        ImageDraw.Draw(picture).rectangle(box, fill=colour)
        ImageDraw.Draw(edges).rectangle(box, outline="white", width=3)
        ImageDraw.Draw(blocks).rectangle(box, fill=colour)
        kinds = {"edges": edges} if number < 3 else {"edges": edges, "blocks": blocks}
        source = root / ("one" if number < 3 else "two")
        for folder, image in ({"images": picture} | kinds).items():
            (source / folder).mkdir(parents=True, exist_ok=True)
            image.save(source / folder / name)
        (source / "images" / f"{number}.txt").write_text(f"a box, number {number}")


def run(pictures: Path, model: Path, workspace: Path, family_name: str, method: dict[str, Any], **sections: Any) -> Run:
    """A run over these pictures; `sections` add to `train` and replace others, but for the name of the run."""
    sources = [
        {"path": str(pictures / "one/images"), "name": "one", "controls": [str(pictures / "one/edges")]},
        {
            "path": str(pictures / "two/images"),
            "name": "two",
            "controls": [str(pictures / "two" / kind) for kind in ("edges", "blocks")],
        },
    ]
    tree: dict[str, Any] = {
        "run": sections.pop("name", "test"),
        "workspace": str(workspace),
        "model": {"family": family_name, "path": str(model)},
        "data": {"sources": sources, "resolutions": [SIDE], "workers": 1},
        "cache": {"device": "cpu", "text_dtype": "float32", "latents_dtype": "float32"},
        "method": method,
        "sample": {
            "prompts": [{"prompt": "a red box", "controls": [str(pictures / "one/edges/1.png")]}],
            "every": 2, "num_inference_steps": 2, "guidance_scale": 2.0, "device": "cpu",
        },
        "train": {
            "steps": 4, "global_batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e-2, "precision": "fp32", "seed": 1,
            "checkpoint_every": 2, "device": "cpu", "trackers": [], "control_dropout": 0.3,
            "validation": {"share": 0.2, "every": 2}, **sections.pop("train", {}),
        },
        **sections,
    }  # fmt: skip
    return resolve(validate(RunConfig, tree, "the test"))
