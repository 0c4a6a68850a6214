"""Prompts with settings of their own: the pictures are those that diffusers' pipeline draws with these arguments."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ftk.cache.store import CacheStore
from ftk.run import load_run
from ftk.train.sheet import cells, cells_with_inputs

OWN = {"prompt": "two stars", "size": "96x64", "num_inference_steps": 3, "guidance_scale": 3.0, "seed": 11, "strength": 0.4,
       "negative_prompt": "a red circle"}  # fmt: skip
PROMPTS = ["a red circle", OWN, {"prompt": "two stars", "guidance_scale": 1.0}]
TRAIN = {"steps": 2, "checkpoint_every": 2, "learning_rate": 0.05}


def drawn_by_diffusers(run_file: Path, prompt: int, strength: float, with_adapter: bool = True) -> Image.Image:
    """What the official pipeline draws when it is called with the settings as its own arguments."""
    run = load_run(run_file)
    pipeline = run.family.pipeline(Path(run.config.model.path), torch.float32, torch.device("cpu"))
    if with_adapter:
        pipeline.load_lora_weights(run.paths.adapter, adapter_name="mine")
        pipeline.set_adapters(["mine"], [strength])
    size, steps, scale, seed = [((64, 64), 2, 2.0, 0), ((96, 64), 3, 3.0, 11), ((64, 64), 2, 1.0, 2)][prompt]
    negative = {1: "a red circle"}.get(prompt, " ")
    return pipeline(
        prompt=["a red circle", "two stars", "two stars"][prompt], width=size[0], height=size[1], num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed), true_cfg_scale=scale, negative_prompt=negative if scale > 1 else None,
    ).images[0]  # fmt: skip


def shrunk(cell: Image.Image, like: Image.Image) -> np.ndarray:
    """A picture of a sheet at its own size: sheets enlarge by whole factors."""
    return np.asarray(cell.resize(like.size, Image.Resampling.NEAREST), np.int16)


def assert_same(cell: Image.Image, expected: Image.Image) -> None:
    assert cell.width * expected.height == cell.height * expected.width
    assert np.abs(shrunk(cell, expected) - np.asarray(expected.convert("RGB"), np.int16)).max() <= 2


def test_pictures_of_training_and_of_ftk_sample_are_drawn_with_each_prompts_own_settings(
    ftk: Any, workspace: Any, tmp_path: Path
) -> None:
    run_file = workspace(train=TRAIN, sample={"prompts": PROMPTS, "every": 2, "guidance_scale": 2.0})
    assert ftk("run", run_file).code == 0
    run = tmp_path / "work/runs/test"
    while_training = cells(run / "samples/step-00000002.png")
    assert [prompt for _, prompt in while_training] == ["a red circle", "two stars", "two stars"]
    told = json.loads(ftk("sample", run_file, "--json").out)
    both = cells(Path(told["grid"]))
    strengths = [1.0, 0.4, 1.0]
    for number, strength in enumerate(strengths):
        expected = drawn_by_diffusers(run_file, number, strength)
        assert_same(while_training[number][0], expected)
        assert_same(both[2 * number + 1][0], expected)
    assert_same(both[2][0], drawn_by_diffusers(run_file, 1, 1.0, with_adapter=False))
    # Each setting counts: the same prompt without them is another picture.
    assert np.abs(shrunk(while_training[1][0], while_training[2][0]) - np.asarray(while_training[2][0], np.int16)).mean() > 5
    full = drawn_by_diffusers(run_file, 1, 1.0)
    assert np.abs(shrunk(while_training[1][0], full) - np.asarray(full, np.int16)).max() > 2
    card = (run / "adapter/README.md").read_text()
    assert card.count("| two stars |") == 2
    dry = json.loads(ftk("sample", run_file, "--json", "--dry-run").out)
    assert (dry["size"], dry["num_inference_steps"]) == ("64x64, 96x64", "2, 3")
    # How a prompt is drawn is not part of the cache: nothing is encoded again.
    again = ["--set", "sample.prompts.1.seed=3", "--set", "sample.prompts.1.num_inference_steps=2"]
    report = json.loads(ftk("cache", run_file, *again, "--json").out)
    assert (report["num_texts_encoded"], report["num_latents_encoded"]) == (0, 0)
    assert all(not given for _, _, given in cells_with_inputs(Path(told["grid"])))


def test_a_cache_without_a_prompts_negative_text_says_which_and_what_to_run(ftk: Any, cached: Any) -> None:
    run_file = cached(sample={"prompts": ["a red circle", {"prompt": "stars"}], "guidance_scale": 2.0})
    asked = ["--set", "sample.every=2", "--set", "train.steps=1"]
    change = ["--set", "sample.prompts.1.negative_prompt=a blot"]
    told = ftk("train", run_file, *asked, *change)
    assert told.code == 2
    assert "sample.prompts.1.negative_prompt: 'a blot' is not in the cache. Run `ftk cache RUN.yaml`" in told.err
    report = json.loads(ftk("cache", run_file, *change, "--json").out)
    assert (report["num_texts_encoded"], report["num_latents_encoded"]) == (1, 0)
    assert ftk("train", run_file, *asked, *change).code == 0


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "oft", "block_size": 4}, "only LoRA, LoHa and LoKr have a strength, oft has none"),
        ({"name": "full", "targets": "attention"}, "what method full trains has no strength"),
        (
            {"name": "lora", "initialisation": "pissa", "rank": 2},
            "method.initialisation: pissa has moved a part of the base weights into the adapter",
        ),
        ({"name": "lora", "modules_to_save": ["proj_out"]}, "the whole modules of method.modules_to_save have no strength"),
    ],
)
def test_a_strength_that_cannot_be_drawn_is_refused_before_training(ftk: Any, cached: Any, method: Any, message: str) -> None:
    run_file = cached(method=method, sample={"prompts": [{"prompt": "stars", "strength": 0.5}], "every": 2})
    told = ftk("train", run_file)
    assert told.code == 2
    assert "sample.prompts.0.strength: 0.5 cannot be drawn while training: " + message in " ".join(told.err.split())
    # As it is trained it can be drawn.
    assert ftk("train", run_file, "--dry-run", "--set", "sample.prompts.0.strength=1").code == 0


def test_a_strength_of_one_prompt_is_refused_where_the_delivered_weights_have_none(ftk: Any, cached: Any) -> None:
    run_file = cached(method={"name": "oft", "block_size": 4}, train={"steps": 1})
    assert ftk("train", run_file).code == 0
    told = ftk("sample", run_file, "--set", "sample.prompts=[{prompt: stars, strength: 0.5}]")
    assert told.code == 2
    assert "sample.prompts.0.strength: 0.5 has no meaning for" in " ".join(told.err.split())


def test_the_strength_of_a_prompt_does_not_change_that_of_the_next(ftk: Any, cached: Any, tmp_path: Path) -> None:
    run_file = cached(train=TRAIN)
    assert ftk("train", run_file).code == 0
    added = f"sample.adapters=[{{path: {tmp_path / 'work/runs/test/adapter'}, strength: 0.5}}]"
    prompts = "sample.prompts=[{prompt: stars, strength: 0.5, seed: 0}, {prompt: stars, seed: 0}]"
    told = json.loads(ftk("sample", run_file, "--set", prompts, "--set", added, "--json").out)
    base, half, half_and_half, _, whole, whole_and_half = (
        np.asarray(image, np.int16) for image, _ in cells(Path(told["grid"]))
    )
    assert np.abs(half_and_half - whole).max() <= 1
    assert np.abs(half - base).max() > 1
    assert np.abs(whole_and_half - whole).max() > 1


def test_prompts_with_one_text_and_two_negatives_are_both_in_the_cache(ftk: Any, cached: Any, tmp_path: Path) -> None:
    prompts = [{"prompt": "stars", "negative_prompt": each} for each in ("a", "b")]
    cached(sample={"prompts": prompts, "guidance_scale": 2.0})
    with closing(CacheStore.open(tmp_path / "work/cache")) as store:
        assert {"stars", "a", "b"} <= store.manifest.prompts.keys()
