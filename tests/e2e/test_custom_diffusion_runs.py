"""Runs of Custom Diffusion: two concepts at once beside class images, whole matrices and low-rank changes."""

import json
import shutil

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open

VECTORS = ("learned_embeds-first.safetensors", "learned_embeds-second.safetensors")
WEIGHTS = "pytorch_custom_diffusion_weights.safetensors"
PROMPT = "<first> thing beside <second> thing"
WORDS = {"tokens": {"<first>": "!", "<second>": {"start": "a b", "vectors": 2}}, "rate": 5.0}
TRAIN = {
    "steps": 4, "precision": "bf16", "ema_decay": 0.5, "learning_rate": 0.01, "checkpoint_every": 2, "trackers": [],
    "class_ratio": 1.0, "caption_dropout": 0.0, "validation": {"share": 0.2, "every": 2, "samples": 2, "sigmas": 2},
}  # fmt: skip


@pytest.fixture
def make(ftk, cached, pictures, tmp_path, tiny_models):
    """Write a run file over two concepts and their class images, with its cache ready."""

    def write(method=(), family="stable-diffusion", **sections):
        sources = []
        for name, numbers in (("first", range(3)), ("second", range(3, 6)), ("class", range(6, 10))):
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            for path in (path for number in numbers for path in pictures.glob(f"{number:03d}-*")):
                shutil.copy(path, folder)
            sources.append({"path": str(folder), **({"role": "class"} if name == "class" else {"trigger": f"<{name}> thing"})})
        sample = {"every": 4, "prompts": [PROMPT], **sections.pop("sample", {})}
        data = {"sources": sources, "resolutions": [64], "workers": 1}
        model = {"family": family, "path": str(tiny_models(family))}
        method = {"name": "custom-diffusion", **dict(method)}
        train = {**TRAIN, **sections.pop("train", {})}
        run_file = cached(model=model, data=data, method=method, train=train, sample=sample)
        # What was copied may be of a method without new words.
        assert ftk("cache", run_file).code == 0
        return run_file

    return write


def test_two_concepts_are_trained_resumed_drawn_exported_and_merged(ftk, make, tmp_path):
    run_file = make({"words": WORDS})
    runs = tmp_path / "work/runs"
    assert ftk("train", run_file).code == 0
    for steps in (2, 4):
        done = ftk("train", run_file, "--set", "run=halves", "--set", f"train.steps={steps}")
        assert done.code == 0, done.err
    states = [f"checkpoints/00000004/{kind}.safetensors" for kind in ("adapter", "optimizer")]
    delivered = [f"{folder}/{file}" for folder in ("adapter", "best") for file in (WEIGHTS, *VECTORS)]
    for file in [*states, "samples/step-00000004.png", *delivered]:
        assert (runs / "halves" / file).read_bytes() == (runs / "test" / file).read_bytes(), file
    card = (runs / "test/adapter/README.md").read_text()
    assert f'load_attn_procs("path/to/this/folder", weight_name="{WEIGHTS}", _pipeline=pipeline)' in card
    assert 'load_textual_inversion("path/to/this/folder", weight_name="learned_embeds-first.safetensors")' in card
    assert "`<first> thing`, `<second> thing`" in card

    done = ftk("sample", run_file, "--json")
    assert (done.code, json.loads(done.out)["mean_difference"] > 0.1) == (0, True), done.err
    for form, file in (("diffusers", WEIGHTS), ("comfyui", "comfyui.safetensors")):
        done = ftk("export", run_file, "--format", form, "--json")
        assert (done.code, file in json.loads(done.out)["files"]) == (0, True), done.err
    assert {path.name for path in (runs / "test/exports/comfyui").glob("*.safetensors")} == {
        "comfyui.safetensors", "first.safetensors", "second.safetensors",
    }  # fmt: skip
    done = ftk("merge", run_file, "--out", tmp_path / "merged", "--dtype", "float32", "--json")
    assert (done.code, json.loads(done.out)["difference"] < 1e-5) == (0, True), done.err

    # The merged pipeline, the delivered file in diffusers' own pipeline: the same picture; the base's is another one.
    pipelines = [StableDiffusionPipeline.from_pretrained(tmp_path / "merged")]
    for folder in (runs / "test/exports/diffusers", None):
        pipeline = StableDiffusionPipeline.from_pretrained(yaml.safe_load(run_file.read_text())["model"]["path"])
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


def test_low_rank_changes_of_a_transformer_are_a_lora(ftk, make, tmp_path):
    run_file = make({"rank": 2}, family="qwen-image", sample={"prompts": [PROMPT], "every": 4})
    assert ftk("train", run_file).code == 0
    adapter = tmp_path / "work/runs/test/adapter/pytorch_lora_weights.safetensors"
    with safe_open(adapter, "pt") as file:
        assert file.metadata()["ss_network_dim"] == "2"
        assert all("add_k_proj" in name or "add_v_proj" in name for name in file.keys())  # noqa: SIM118 - it is no mapping
    done = ftk("sample", run_file, "--set", f"sample.adapters=[{{path: {adapter}, strength: 0.5}}]", "--json")
    assert (done.code, json.loads(done.out)["together"] > 0) == (0, True), done.err
    done = ftk("merge", run_file, "--out", tmp_path / "merged", "--dtype", "float32", "--json")
    assert (done.code, json.loads(done.out)["difference"] < 1e-5) == (0, True), done.err


def test_words_of_two_encoders_are_merged_with_a_low_rank_change(ftk, make, tmp_path):
    train = {"steps": 2, "checkpoint_every": 2, "validation": {"share": 0.0}}
    run_file = make({"words": WORDS, "rank": 2}, family="sdxl", train=train, sample={"every": None})
    assert ftk("train", run_file).code == 0
    done = ftk("merge", run_file, "--out", tmp_path / "merged", "--dtype", "float32", "--json")
    assert (done.code, json.loads(done.out)["difference"] < 1e-5) == (0, True), done.err
    done = ftk("export", run_file)
    assert done.code == 0, done.err
    folder, merged = (
        tmp_path / "work/runs/test/exports/diffusers",
        StableDiffusionXLPipeline.from_pretrained(tmp_path / "merged"),
    )
    pipeline = StableDiffusionXLPipeline.from_pretrained(yaml.safe_load(run_file.read_text())["model"]["path"])
    lines = (folder / "README.md").read_text().partition("from_pretrained(")[2].partition("```")[0].partition("\n")[2]
    exec(lines.replace("path/to/this/folder", str(folder)), {"pipeline": pipeline})
    torch.testing.assert_close(_draw(merged, PROMPT), _draw(pipeline, PROMPT), atol=1e-4, rtol=1e-4)


def test_words_of_a_language_model_are_delivered_beside_the_matrices(ftk, make, tmp_path):
    train = {"steps": 2, "checkpoint_every": 2, "validation": {"share": 0.0}}
    words = {"tokens": {"<first>": {"start": "a", "vectors": 2}, "<second>": {}}, "train": "output"}
    run_file = make({"words": words}, family="qwen-image", train=train)
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
    run_file = make(train={"steps": 2, "validation": {"share": 0.0}}, sample={"every": None})
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
    run_file = make({"class_images": False}, train={"steps": 1, "validation": {"share": 0.0}, "class_ratio": None})
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
