"""From a finished run to what others load: cards, extracted LoRAs, the Hub, and adapters drawn together."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from hub_server import TOKEN, hub_server
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from ftk.deliver import card
from ftk.methods import base as methods
from ftk.models import base as models

METHODS = {
    "lora": {"name": "lora", "rank": 3, "alpha": 6, "targets": "attention"},
    "lokr": {"name": "lokr", "rank": 2},
    "oft": {"name": "oft", "block_size": 8, "targets": ["to_q"]},
    "full": {"name": "full", "targets": ["to_q", "norm_q"]},
}


@pytest.fixture(scope="module")
def place(ftk, pictures, tiny_model, tmp_path_factory) -> Path:
    """A workspace with one finished run of each method, which drew and measured; read only."""
    place = tmp_path_factory.mktemp("publish")
    shutil.copytree(tiny_model, place / "model")
    tree = {
        "run": "lora",
        "workspace": str(place / "work"),
        "model": {"family": "qwen-image", "path": str(place / "model")},
        "data": {"sources": [{"path": str(pictures), "trigger": "sks", "repeats": 2}], "resolutions": [64], "workers": 1},
        "cache": {"text_dtype": "float32", "latents_dtype": "float32"},
        "method": METHODS["lora"],
        "train": {
            "steps": 4, "global_batch_size": 2, "learning_rate": 0.1, "precision": "fp32", "checkpoint_every": 2,
            "trackers": [], "validation": {"share": 0.2, "every": 2, "samples": 1, "sigmas": 1},
        },
        "sample": {"prompts": ["a red circle"], "every": 4, "num_inference_steps": 2, "guidance_scale": 1.0},
        "card": {"license": "apache-2.0"},
    }  # fmt: skip
    for name, method in METHODS.items():
        run_file = place / f"{name}.yaml"
        run_file.write_text(yaml.safe_dump({**tree, "run": name, "method": method}))
        done = ftk("run" if name == "lora" else "train", run_file)
        assert done.code == 0, done.err
    return place


def pipeline_of(folder: Path):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline) -> torch.Tensor:
    images = pipeline(
        "a red circle", width=64, height=64, num_inference_steps=2, output_type="pt", true_cfg_scale=1.0,
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    return torch.as_tensor(images)


@pytest.fixture(scope="module")
def delivered(place) -> Callable[[str], torch.Tensor]:
    """What a pipeline draws with the adapter of a run, `base` without any."""
    found: dict[str, torch.Tensor] = {}

    def of(name: str) -> torch.Tensor:
        if name not in found:
            pipeline = pipeline_of(place / "model")
            if name != "base":
                method = methods.get(METHODS[name]["name"])
                method.load_into(models.get("qwen-image"), pipeline, place / f"work/runs/{name}/adapter")
            found[name] = drawn(pipeline)
        return found[name]

    return of


@pytest.mark.parametrize("name", METHODS)
def test_the_python_on_the_card_loads_what_was_trained(place, delivered, name):
    adapter = place / f"work/runs/{name}/adapter"
    text = (adapter / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    known: dict[str, object] = {}
    exec(code.replace(card.HERE, str(adapter)).replace("path/to/model", str(place / "model")), known)
    known["pipeline"].set_progress_bar_config(disable=True)
    torch.testing.assert_close(drawn(known["pipeline"]), delivered(name), rtol=0, atol=1e-4)
    assert (delivered(name) - delivered("base")).abs().max() > 1e-3
    assert "Drawn at step 4" in text
    assert "validation loss" in text
    assert str(place) not in text
    with Image.open(adapter / "images/0.png") as image:
        assert image.size == (192, 192)


def test_cards_that_a_kill_left_behind_are_renewed(ftk, place):
    run = place / "work/runs/lora"
    kept = {path: path.read_bytes() for folder in ("adapter", "best") for path in (run / folder).rglob("*.*") if path.is_file()}
    assert {path.name for path in kept} == {"README.md", "0.png", "pytorch_lora_weights.safetensors"}
    for folder in ("adapter", "best"):
        # As they were before the last step's images were drawn.
        shutil.rmtree(run / folder / "images")
        (run / folder / "README.md").write_text("before")
    (run / "adapter/images").mkdir()
    (run / "adapter/images/.tmp-0.png-1-ab").touch()
    assert ftk("train", place / "lora.yaml").code == 0
    assert {path: path.read_bytes() for path in kept} == kept
    assert not list(run.rglob(".tmp-*"))


def test_an_extract_of_the_merged_lora_draws_the_same(ftk, place, delivered, tmp_path):
    assert ftk("merge", place / "lora.yaml", "--out", tmp_path / "merged").code == 0
    shown = ftk(
        "extract", place / "model", tmp_path / "merged", "--family", "qwen-image", "--out", tmp_path / "out", "--rank", 3
    )
    assert shown.code == 0, shown.err
    assert "100.00%" in shown.out
    assert "attn.to_q" in shown.out
    assert "not in the LoRA" not in shown.out
    pipeline = pipeline_of(place / "model")
    pipeline.load_lora_weights(tmp_path / "out")
    torch.testing.assert_close(drawn(pipeline), delivered("lora"), rtol=0, atol=1e-4)
    text = (tmp_path / "out/README.md").read_text()
    assert "makes merged of model" in text
    assert str(tmp_path) not in text
    again = ftk("extract", place / "model", tmp_path / "merged", "--family", "qwen-image", "--out", tmp_path / "out")
    assert (again.code, "holds something already" in again.err) == (2, True)


def test_an_oft_and_whole_weights_become_loras_with_what_that_costs(ftk, place, delivered, tmp_path):
    assert ftk("merge", place / "oft.yaml", "--out", tmp_path / "oft").code == 0
    options = ("--family", "qwen-image", "--json")
    reports = [
        json.loads(
            ftk("extract", place / "model", tmp_path / "oft", *options, "--out", tmp_path / str(rank), "--rank", rank).out
        )
        for rank in (2, 32)
    ]
    assert reports[0]["energy"] < 0.9
    assert reports[1]["energy"] == pytest.approx(1, abs=1e-6)
    pipeline = pipeline_of(place / "model")
    pipeline.load_lora_weights(tmp_path / "32")
    torch.testing.assert_close(drawn(pipeline), delivered("oft"), rtol=0, atol=1e-4)
    # What full fine-tuning delivers is the denoiser alone; its norms are no LoRA's.
    tuned = place / "work/runs/full/adapter"
    report = json.loads(ftk("extract", place / "model", tuned, *options, "--out", tmp_path / "full", "--rank", 32).out)
    assert {one["name"] for one in report["left_out"]} == {"attn.norm_q.weight", "attn.to_q.bias"}
    assert 0 < report["left_out_share"] < 1
    shown = ftk("extract", place / "model", tuned, "--family", "qwen-image", "--out", tmp_path / "shown", "--energy", 0.5)
    assert "RMSNorm's weight" in shown.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{base}", "{base}", "--family", "qwen-image"), "All their tensors are equal"),
        (("{base}", "{base}", "--family", "sdxl"), "not the StableDiffusionXLPipeline"),
        (("{base}", "{base}", "--family", "flux-9"), "there is no family"),
        (("nowhere", "{base}", "--family", "qwen-image"), "no such folder"),
        (("{base}", "{base}", "--family", "qwen-image", "--rank", "0"), "--rank 0"),
    ],
)
def test_what_cannot_be_extracted_is_said(ftk, place, tmp_path, arguments, message):
    filled = [argument.format(base=place / "model") for argument in arguments]
    done = ftk("extract", *filled, "--out", tmp_path / "out")
    assert (done.code, message in done.err) == (2, True), done.err
    assert not (tmp_path / "out").exists()


def test_an_export_goes_to_the_hub_with_its_card_and_pictures(ftk, place, tmp_path):
    out = tmp_path / "export"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with hub_server() as hub:
        planned = json.loads(ftk("export", place / "lora.yaml", "--push", "ada/dog", "--dry-run", "--json").out)
        assert (planned["repository"], planned["logged_in"]) == ("ada/dog", True)
        assert [line.split(",")[0] for line in planned["files"]] == [
            "pytorch_lora_weights.safetensors", "README.md", "images/0.png",
        ]  # fmt: skip
        assert hub.repositories == {}
        done = ftk("export", place / "lora.yaml", "--push", "ada/dog", "--private", "--out", out, "--json")
        assert done.code == 0, done.err
        report = json.loads(done.out)
        assert report["url"] == f"{hub.url}/ada/dog"
        found = hub.repositories["ada/dog"]
        assert found["private"]
        assert sorted(found["files"]) == sorted(report["files"])
        assert all((out / name).read_bytes() == data for name, data in found["files"].items())
        assert b'load_lora_weights("ada/dog")' in found["files"]["README.md"]
        assert hub.messages == ["Step 4 of lora, diffusers"]
        public = ftk("export", place / "full.yaml", "--push", "ada/whole", "--json")
        assert public.code == 0, public.err
        assert "transformer/config.json" in hub.repositories["ada/whole"]["files"]
        assert not hub.repositories["ada/whole"]["private"]
        hub.refusals["/api/models/ada/dog/commit"] = (403, f"You have no rights, {TOKEN}")
        refused = ftk("export", place / "lora.yaml", "--push", "ada/dog", "--out", out)
        assert (refused.code, "You have no rights" in refused.err, TOKEN in refused.err) == (4, True, False)
    assert not list((place / "work/runs/lora").glob(".tmp-*"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--push", "dog"), 2, "OWNER/NAME"),
        (("--push", "a/b/c"), 2, "no repository of the Hub can be called so"),
        (("--private",), 2, "--private is for --push"),
        (("--push", "ada/dog"), 4, "not logged in"),
        (("--push", "ada/dog", "--format", "gguf", "--dry-run"), 2, "no delivery format"),
    ],
)
def test_what_cannot_be_pushed_is_said_before_anything_is_written(ftk, place, arguments, code, message):
    exports = place / "work/runs/oft/exports"
    with hub_server(token=None):
        done = ftk("export", place / "oft.yaml", *arguments)
    assert (done.code, message in done.err) == (code, True), done.err
    assert not exports.exists()


def test_the_bases_licence_is_a_hint(ftk, place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "model")
    (tmp_path / "model/README.md").write_text("---\nlicense: openrail++\n---\n")
    arguments = ("export", place / "lora.yaml", "--out", tmp_path / "out", "--set", f"model.path={tmp_path / 'model'}")
    assert "openrail++" not in ftk(*arguments).err
    assert "base model's own card says openrail++" in ftk(*arguments, "--set", "card.license=null").err


def test_other_runs_are_drawn_on_top(ftk, place):
    lokr = place / "work/runs/lokr/adapter"
    added = f"sample.adapters=[{{path: {lokr}, strength: 0.5}}]"
    done = ftk("sample", place / "lora.yaml", "--set", added, "--set", "sample.strength=0.7", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["num_images"] == 3
    assert report["together"] > 0
    with Image.open(report["grid"]) as sheet:
        assert sheet.width == 4 * 12 + 3 * 192
    alone = json.loads(ftk("sample", place / "lora.yaml", "--json").out)
    assert (alone["num_images"], alone["together"]) == (2, None)
    assert alone["mean_difference"] > report["mean_difference"]
    planned = json.loads(ftk("sample", place / "oft.yaml", "--set", added, "--dry-run", "--json").out)
    assert planned["adapters"] == [f"{lokr} (LOKR) at 0.5"]
    assert planned["num_images"] == 3
    for run in ("oft", "full"):
        report = json.loads(ftk("sample", place / f"{run}.yaml", "--set", added, "--json").out)
        assert report["together"] != report["mean_difference"] > 0


@pytest.mark.parametrize(
    ("run", "settings", "message"),
    [
        ("lora", "sample.adapters=[{path: nowhere}]", "sample.adapters.0.path nowhere: no such file or folder"),
        ("lora", "sample.adapters=[{path: '{runs}/oft/adapter'}]", "is of type OFT, which does not add up"),
        ("lora", "sample.adapters=[{path: '{runs}/full/adapter'}]", "holds no adapter"),
        ("lora", "sample.adapters=[{path: '{runs}/lora'}]", "Did you mean"),
        ("oft", "sample.strength=0.5", "which is of type OFT"),
        ("full", "sample.strength=0.5", "whose weights are the model's own"),
        ("lora", "sample.strength=11", "less than or equal to 10"),
        ("lora", "sample.adapters=[{path: x, weight: 1}]", "`sample.adapters.0.weight` is not a setting"),
    ],
)
def test_adapters_and_strengths_that_make_no_sense_are_refused(ftk, place, run, settings, message):
    filled = settings.replace("{runs}", str(place / "work/runs"))
    done = ftk("sample", place / f"{run}.yaml", "--set", filled)
    assert (done.code, message in done.err) == (2, True), done.err


def test_an_export_has_the_runs_weights_and_its_licence(ftk, place, tmp_path):
    exported = json.loads(ftk("export", place / "lora.yaml", "--out", tmp_path / "out", "--json").out)
    assert exported["files"] == ["pytorch_lora_weights.safetensors", "README.md", "images/0.png"]
    name = exported["files"][0]
    found, expected = (load_file(folder / name) for folder in (tmp_path / "out", place / "work/runs/lora/adapter"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    assert ModelCard.load(tmp_path / "out/README.md").data.license == "apache-2.0"
