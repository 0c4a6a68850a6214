"""Runs of Custom Diffusion: two concepts at once beside class images, whole matrices and low-rank changes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open

from ftk.configs import load
from ftk.train.sheet import cells

VECTORS = ("learned_embeds-new1.safetensors", "learned_embeds-new2.safetensors")
WEIGHTS = "pytorch_custom_diffusion_weights.safetensors"
PROMPT = "<new1> dog beside <new2> mug"
WORDS = {"tokens": {"<new1>": "!", "<new2>": {"start": "a b", "vectors": 2}}, "rate": 5.0}
TRAIN = {"steps": 2, "checkpoint_every": 2, "precision": "bf16", "learning_rate": 0.01, "trackers": [], "class_ratio": 1.0}


@pytest.fixture
def make(ftk, cached, pictures, tmp_path, tiny_models):
    """Write a run file over two concepts and their class images, with its cache ready."""

    def write(method=(), family="stable-diffusion", **sections):
        sources = []
        for name, numbers in (("new1", range(3)), ("new2", range(3, 6)), ("class", range(6, 10))):
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            for path in (path for number in numbers for path in pictures.glob(f"{number:03d}-*")):
                shutil.copy(path, folder)
            sources.append({"path": str(folder), **({"role": "class"} if name == "class" else {"trigger": f"<{name}> thing"})})
        sample = {"every": None, "prompts": [PROMPT]}
        data = {"sources": sources, "resolutions": [64], "workers": 1}
        model = {"family": family, "path": str(tiny_models(family))}
        method = {"name": "custom-diffusion", **dict(method)}
        train = {**TRAIN, **sections.pop("train", {})}
        run_file = cached(model=model, data=data, method=method, train=train, sample=sample)
        # What was copied may be of a method without new words.
        assert ftk("cache", run_file).code == 0
        return run_file

    return write


@pytest.fixture
def recipe(pictures, tmp_path, tiny_models):
    """The recipe as it is, but for what makes it small; its photos are there."""
    tree = yaml.safe_load((load.RECIPES / "custom-diffusion.yaml").read_text())
    for source, numbers in zip(tree["data"]["sources"], (range(3), range(3, 6), (), ()), strict=True):
        source["path"] = str(tmp_path / source["path"])
        for path in (path for number in numbers for path in pictures.glob(f"{number:03d}-*.png")):
            Path(source["path"]).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, source["path"])
        if "generate" in source:
            source["generate"] |= {"count": 2, "num_inference_steps": 2}
    tree["workspace"], tree["card"] = str(tmp_path / "work"), {"title": "test"}
    tree["model"]["path"] = str(tiny_models("stable-diffusion"))
    tree["data"] |= {"resolutions": [64], "workers": 1}
    # The tiny tokenizer has no rare words, but letters.
    tree["method"]["words"]["tokens"] = {"<new1>": "!", "<new2>": {"start": "a b", "vectors": 2}}
    tree["train"] |= {
        "steps": 4, "checkpoint_every": 2, "precision": "fp32", "ema_decay": 0.5, "learning_rate": 0.01, "trackers": [],
        "validation": {"share": 0.2, "every": 2, "samples": 1, "sigmas": 1},
    }  # fmt: skip
    tree["sample"] |= {"prompts": [PROMPT], "every": 4, "num_inference_steps": 2}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_two_concepts_of_the_recipe_are_trained_resumed_drawn_exported_and_merged(ftk, recipe, tmp_path):
    runs = tmp_path / "work/runs"
    for command in (["prepare", recipe, "--make-class-images"], ["run", recipe]):
        done = ftk(*command)
        assert done.code == 0, done.err
    for steps in (2, 4):
        done = ftk("train", recipe, "--set", "run=halves", "--set", f"train.steps={steps}")
        assert done.code == 0, done.err
    states = [f"checkpoints/00000004/{kind}.safetensors" for kind in ("adapter", "optimizer")]
    delivered = [f"{folder}/{file}" for folder in ("adapter", "best") for file in (WEIGHTS, *VECTORS)]
    for file in [*states, "samples/step-00000004.png", *delivered]:
        assert (runs / "halves" / file).read_bytes() == (runs / "dog-and-mug" / file).read_bytes(), file
    card = (runs / "halves/adapter/README.md").read_text()
    assert f'load_attn_procs("path/to/this/folder", weight_name="{WEIGHTS}", _pipeline=pipeline)' in card
    assert f'load_textual_inversion("path/to/this/folder", weight_name="{VECTORS[0]}")' in card
    assert "`<new1> dog`, `<new2> mug`" in card

    done = ftk("sample", recipe, "--json")
    assert (done.code, json.loads(done.out)["mean_difference"] > 0.1) == (0, True), done.err
    ((while_training, _),) = cells(runs / "dog-and-mug/samples/step-00000004.png")
    afterwards, _ = cells(runs / "dog-and-mug/samples/base-and-adapter.png")[1]
    assert np.abs(np.asarray(while_training).astype(int) - np.asarray(afterwards)).max() <= 1
    done = ftk("merge", recipe, "--out", tmp_path / "merged", "--dtype", "float32", "--json")
    assert (done.code, json.loads(done.out)["difference"] < 1e-5) == (0, True), done.err

    # The merged pipeline, and what is delivered in diffusers' own pipeline: the same picture; the base's is another one.
    pipelines = [StableDiffusionPipeline.from_pretrained(tmp_path / "merged")]
    for folder in (runs / "dog-and-mug/adapter", None):
        pipeline = StableDiffusionPipeline.from_pretrained(yaml.safe_load(recipe.read_text())["model"]["path"])
        if folder is not None:
            pipeline.unet.load_attn_procs(folder, weight_name=WEIGHTS, _pipeline=pipeline)
            for file in VECTORS:
                pipeline.load_textual_inversion(folder, weight_name=file)
        pipelines.append(pipeline)
    latents = [_draw(pipeline, PROMPT) for pipeline in pipelines]
    torch.testing.assert_close(latents[0], latents[1], atol=1e-4, rtol=1e-4)
    assert (latents[0] - latents[2]).abs().max() > 1e-2


def _draw(pipeline, prompt):
    pipeline.set_progress_bar_config(disable=True)
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipeline(prompt, latents=start, height=64, width=64, num_inference_steps=3, output_type="latent").images


def test_words_of_two_encoders_are_merged_with_a_low_rank_change(ftk, make, tmp_path):
    run_file = make({"words": WORDS, "rank": 2}, family="sdxl")
    assert ftk("train", run_file).code == 0
    done = ftk("merge", run_file, "--out", tmp_path / "merged", "--dtype", "float32", "--json")
    assert (done.code, json.loads(done.out)["difference"] < 1e-5) == (0, True), done.err
    done = ftk("export", run_file)
    assert done.code == 0, done.err
    folder = tmp_path / "work/runs/test/exports/diffusers"
    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
        assert file.metadata()["ss_network_dim"] == "2"
    merged = StableDiffusionXLPipeline.from_pretrained(tmp_path / "merged")
    pipeline = StableDiffusionXLPipeline.from_pretrained(yaml.safe_load(run_file.read_text())["model"]["path"])
    lines = (folder / "README.md").read_text().partition("from_pretrained(")[2].partition("```")[0].partition("\n")[2]
    exec(lines.replace("path/to/this/folder", str(folder)), {"pipeline": pipeline})
    torch.testing.assert_close(_draw(merged, PROMPT), _draw(pipeline, PROMPT), atol=1e-4, rtol=1e-4)


def test_words_of_a_language_model_are_delivered_beside_the_matrices(ftk, make, tmp_path):
    words = {"tokens": {"<new1>": {"start": "a", "vectors": 2}, "<new2>": {}}, "train": "output"}
    run_file = make({"words": words}, family="qwen-image")
    assert ftk("train", run_file).code == 0
    adapter = tmp_path / "work/runs/test/adapter"
    assert {path.name for path in adapter.glob("*.safetensors")} == {"custom_diffusion_weights.safetensors", *VECTORS}
    done = ftk("sample", run_file, "--json")
    assert (done.code, json.loads(done.out)["mean_difference"] > 0) == (0, True), done.err
    done = ftk("merge", run_file, "--out", tmp_path / "merged")
    assert (done.code, "the new words of qwen-image cannot be merged" in done.err) == (2, True), done.err
    done = ftk("export", run_file, "--format", "comfyui")
    assert (done.code, "Write diffusers" in done.err, list(tmp_path.rglob("exports"))) == (2, True, []), done.err


def test_compression_is_chosen_when_a_run_is_exported(ftk, make, tmp_path):
    run_file = make()
    assert ftk("train", run_file).code == 0
    sizes = []
    for energy in (0.3, 0.9):
        out = tmp_path / f"out-{energy}"
        done = ftk("export", run_file, "--set", f"method.energy={energy}", "--format", "kohya", "--out", out, "--json")
        assert (done.code, json.loads(done.out)["format"]) == (0, "kohya"), done.err
        sizes.append((out / "kohya.safetensors").stat().st_size)
        with safe_open(out / "kohya.safetensors", "pt") as file:
            assert "ss_network_dim" not in file.metadata()
    assert sizes[0] < sizes[1]
    done = ftk("export", run_file, "--format", "kohya")
    assert (done.code, "export with `--set method.energy=0.9`" in done.err) == (2, True)

    for command, told in {
        ("sample", "--set", "sample.strength=0.5"): "sample.strength: 0.5 has no meaning",
        ("merge", "--out", tmp_path / "half", "--strength", "0.5"): "--strength 0.5 has no meaning for method custom-diffusion",
        ("train", "--set", "run=next", "--set", "train.start_from=x"): "custom-diffusion has no adapter to go on from",
        ("sample", "--set", f"sample.adapters=[{{path: {tmp_path}/work/runs/test/adapter}}]"): "is of type WHOLE WEIGHTS",
    }.items():
        name, *options = command
        done = ftk(name, run_file, *options)
        assert (done.code, told in done.err) == (2, True), done.err


def test_class_images_that_are_missing_are_asked_for(ftk, make):
    run_file = make({"class_images": False}, train={"steps": 1, "class_ratio": None})
    tree = yaml.safe_load(run_file.read_text())
    del tree["data"]["sources"][2]
    run_file.write_text(yaml.safe_dump(tree))
    assert ftk("run", run_file).code == 0
    with_them = ("--set", "method.class_images=true", "--set", "run=other")
    for command in ("cache", "train", "run"):
        done = ftk(command, run_file, *with_them)
        assert (done.code, "needs class images, and" in done.err, "`role: class`" in done.err) == (2, True, True), done.err


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"targets": "cross-attention"}, "method.targets: qwen-image has no cross-attention"),
        ({"targets": "attention"}, "method.targets"),
        ({"energy": 2}, "method.energy"),
        ({"words": {"tokens": {"<a>": "cat"}, "train": "outputs"}}, "method.words.train"),
        ({"ranks": 4}, "Did you mean `rank`"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused_before_a_model_is_looked_for(ftk, workspace, settings, told):
    run_file = workspace(method={"name": "custom-diffusion", **settings}, model={"path": "nowhere"})
    for command in ("prepare", "cache", "train"):
        done = ftk(command, run_file)
        assert (done.code, told in done.err, "nowhere" in done.err) == (2, True, False), done.err
