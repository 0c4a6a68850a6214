"""Runs of a ControlNet from its recipe: control images that are made, training, drawing, and diffusers' own pipeline."""

import json

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image

from ftk.configs.load import RECIPES
from ftk.demo import draw_pictures

RECIPE = RECIPES / "stable-diffusion-controlnet.yaml"


@pytest.fixture(scope="module")
def scene(tmp_path_factory, tiny_models, ftk):
    """The recipe on a tiny model and drawn pictures, trained for four steps: overrides, the workspace, and the model."""
    root, model = tmp_path_factory.mktemp("controlnet"), tiny_models("stable-diffusion")
    draw_pictures(root / "photos", 8)
    photo = sorted((root / "photos").glob("*.png"))[0]
    settings = {
        "workspace": root / "work",
        "model.path": model,
        "data.sources": json.dumps([{"path": str(root / "photos"), "controls": [{"make": "canny"}]}]),
        "data.resolutions": "[64]",
        "cache.text_stored": "float32",
        "cache.latents_dtype": "float32",
        "train.steps": 4,
        "train.global_batch_size": 4,
        "train.learning_rate": 0.02,
        "train.schedule": "constant",
        "train.checkpoint_every": 2,
        "train.precision": "fp32",
        "train.trackers": "[]",
        "train.validation": "{share: 0.2, every: 2}",
        "sample.prompts": json.dumps([{"prompt": "a house", "controls": [{"make": "canny", "from": str(photo)}]}]),
        "sample.every": 4,
        "sample.num_inference_steps": 2,
    }
    overrides = [each for name, value in settings.items() for each in ("--set", f"{name}={value}")]
    done = ftk("run", RECIPE, *overrides)
    assert done.code == 0, done.err
    return overrides, root / "work", model


def test_the_recipe_draws_along_control_images_that_diffusers_draws_along_too(ftk, scene, tmp_path):
    overrides, workspace, model = scene
    adapter = workspace / "runs/my-controlnet/adapter"
    card = (adapter / "README.md").read_text()
    assert "StableDiffusionControlNetPipeline(**pipeline.components, controlnet=controlnet)" in card
    assert list((workspace / "runs/my-controlnet/samples").glob("step-00000004.png"))
    drawn = ftk("sample", RECIPE, *overrides, "--json")
    assert (drawn.code, json.loads(drawn.out)["mean_difference"] > 0.1) == (0, True), drawn.err

    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        model, controlnet=ControlNetModel.from_pretrained(adapter), safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    edges = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    pictures = [
        pipeline("a house", image=edges, controlnet_conditioning_scale=scale, num_inference_steps=2, output_type="latent",
                 generator=torch.Generator().manual_seed(0)).images
        for scale in (0.0, 1.0)
    ]  # fmt: skip
    assert (pictures[0] - pictures[1]).abs().max() > 1e-2
    report = ftk("export", RECIPE, *overrides, "--out", tmp_path / "half", "--dtype", "float16", "--json")
    assert report.code == 0, report.err
    assert ControlNetModel.from_pretrained(tmp_path / "half", dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["method.blocks=2"], "method.blocks: the ControlNet of a U-Net copies its whole encoder. Leave it out."),
        (["train.start_from=nowhere"], "train.start_from nowhere: there is no ControlNet"),
        (["method.name=lora"], "train.control_dropout has no effect with method lora"),
    ],
    ids=lambda value: value[0].split("=")[0] if isinstance(value, list) else "",
)
def test_bad_input_ends_with_what_to_do(ftk, scene, settings, message):
    overrides, _, _ = scene
    done = ftk("train", RECIPE, *overrides, *(each for setting in settings for each in ("--set", setting)), "--dry-run")
    assert done.code == 2
    assert message in " ".join(done.err.split())
    assert "Traceback" not in done.err
