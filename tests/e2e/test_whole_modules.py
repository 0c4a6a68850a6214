"""Runs that train modules of the denoiser whole beside an adapter."""

import json

import pytest
from safetensors.torch import load_file

METHOD = {"name": "lora", "rank": 4, "modules_to_save": ["norm_out", "proj_out"]}
TRAIN = {
    "steps": 4, "precision": "bf16", "ema_decay": 0.5, "learning_rate": 0.01, "checkpoint_every": 2, "trackers": [],
    "validation": {"share": 0.2, "every": 2, "samples": 2, "sigmas": 2},
}  # fmt: skip


@pytest.fixture
def run_file(cached):
    return cached(method=METHOD, train=TRAIN, sample={"every": 4, "prompts": ["a red circle"]})


def test_a_run_with_whole_modules_resumes_draws_merges_and_starts_others(ftk, run_file, tmp_path):
    assert ftk("train", run_file).code == 0
    runs = tmp_path / "work/runs"
    for steps in (2, 4):
        done = ftk("train", run_file, "--set", "run=halves", "--set", f"train.steps={steps}")
        assert done.code == 0, done.err
    files = [
        "checkpoints/00000004/adapter.safetensors",
        "checkpoints/00000004/optimizer.safetensors",
        "samples/step-00000004.png",
    ]
    for file in [*files, "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "best/adapter_model.safetensors"]:
        assert (runs / "halves" / file).read_bytes() == (runs / "test" / file).read_bytes(), file
    trained = load_file(runs / "test/checkpoints/00000004/adapter.safetensors")
    assert {name for name in trained if "lora_" not in name} == {
        "norm_out.linear.bias", "norm_out.linear.weight", "proj_out.bias", "proj_out.weight",
    }  # fmt: skip

    done = ftk("sample", run_file, "--json")
    assert (done.code, json.loads(done.out)["mean_difference"] > 0.1) == (0, True), done.err
    done = ftk("export", run_file, "--json")
    assert json.loads(done.out)["format"] == "peft"
    done = ftk("merge", run_file, "--out", tmp_path / "merged", "--dtype", "float32", "--json")
    assert json.loads(done.out)["difference"] < 1e-5
    half = ftk("merge", run_file, "--out", tmp_path / "half", "--strength", "0.5")
    assert (half.code, "they have no strength" in half.err) == (2, True)

    start = (
        "--set",
        f"train.start_from={runs / 'test/exports/peft'}",
        "--set",
        "run=next",
        "--set",
        "train.learning_rate=1e-9",
    )
    assert ftk("train", run_file, *start).code == 0
    after = load_file(runs / "next/checkpoints/00000004/adapter.safetensors")
    exported = load_file(runs / "test/exports/peft/adapter_model.safetensors")
    for name in ("norm_out.linear.weight", "proj_out.bias"):
        assert (after[name] - exported[f"base_model.model.{name}"]).abs().max() < 1e-6
    without = ftk("train", run_file, *start, "--set", "method={name: lora, rank: 4}", "--set", "run=without")
    assert (without.code, "Set method.modules_to_save: [norm_out, proj_out]" in without.err) == (2, True)
