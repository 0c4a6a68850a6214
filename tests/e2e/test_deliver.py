"""What was trained, in other formats and folded into a pipeline."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open

from ftk.methods import base as methods
from ftk.models import base as models

METHODS = {
    "lora": {"name": "lora", "rank": 4, "alpha": 8},
    "oft": {"name": "oft", "block_size": 16},
    "loha": {"name": "loha", "rank": 4},
    "lokr": {"name": "lokr", "rank": 4},
    "full": {"name": "full", "targets": ["to_q"]},
}
FORMATS = ("diffusers", "peft", "comfyui", "kohya", "lycoris")


@pytest.fixture(params=METHODS)
def trained(ftk, cached, request):
    """A run file whose run is done, and the name of its method."""
    train = {"steps": 4, "learning_rate": 0.05, "precision": "fp32", "trackers": [], "global_batch_size": 2}
    run_file = cached(method=METHODS[request.param], train={**train, "ema_decay": 0.5})
    assert ftk("train", run_file).code == 0
    return run_file, request.param


def test_a_merged_pipeline_draws_what_the_adapted_one_draws(ftk, trained, tmp_path):
    run_file, name = trained
    done = ftk("merge", run_file, "--out", tmp_path / "merged", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["difference"] < 1e-5
    method = methods.get(name)
    drawn = []
    for folder, adapter in (("merged", None), ("model", tmp_path / "work/runs/test/adapter"), ("model", None)):
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / folder)
        if adapter is not None:
            method.load_into(models.get("qwen-image"), pipeline, adapter)
        pipeline.set_progress_bar_config(disable=True)
        image = pipeline(
            "a red circle", width=64, height=64, num_inference_steps=2, output_type="pt", true_cfg_scale=1.0,
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip
        drawn.append(torch.as_tensor(image))
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=1e-4)
    assert (drawn[0] - drawn[2]).abs().max() > 1e-3
    assert "trained weights are in the pipeline itself" in (tmp_path / "merged/README.md").read_text()
    assert ftk("merge", run_file, "--out", tmp_path / "merged").code == 2


def test_every_format_is_written_or_refused_with_the_way_that_works(ftk, trained, tmp_path):
    run_file, name = trained
    written = methods.get(name).FORMATS
    for form in FORMATS:
        done = ftk("export", run_file, "--format", form, "--json")
        if form not in written:
            assert done.code == 2
            assert form in done.err
            continue
        report = json.loads(done.out)
        assert report["step"] == 4
        (weights, *_) = [path for path in report["files"] if path.endswith(".safetensors")]
        folder = tmp_path / "work/runs/test/exports" / form
        (path,) = folder.rglob(weights)
        with safe_open(path, "pt") as file:
            assert file.metadata()["ftk_step"] == "4"
            assert file.metadata()["ftk_method"] == name


def test_what_cannot_be_delivered_is_said(ftk, workspace, tmp_path):
    run_file = workspace()
    assert "holds no whole checkpoint" in ftk("export", run_file, "--format", "comfyui").err
    assert ftk("run", run_file).code == 0
    unknown = ftk("export", run_file, "--format", "comfy")
    assert (unknown.code, "there is no delivery format 'comfy'" in unknown.err) == (2, True)
    other = ftk("merge", run_file, "--out", tmp_path / "out", "--set", "method.targets=all-linear")
    assert (other.code, "holds other parameters" in other.err) == (2, True)
    assert "knows no best step" in ftk("merge", run_file, "--out", tmp_path / "out", "--best").err
    assert not (tmp_path / "out").exists()
