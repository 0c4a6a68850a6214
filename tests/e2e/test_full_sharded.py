"""Full fine-tuning with weights, gradients and moments split over processes, against the same run on one."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, QwenImageTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file
from sharded_worlds import STEPS, odd_rows

from ftk.deliver import export
from ftk.models.base import Conditions, Model
from ftk.run import load_run
from ftk.train import checkpoint, inputs
from ftk.train.hooks.recorder import read_metrics, validation_table
from ftk.train.ranks import Ranks

pytestmark = pytest.mark.faults

WORLDS = Path(__file__).parent / "sharded_worlds.py"
TRAIN = {
    "steps": 6, "global_batch_size": 6, "micro_batch_size": 2, "learning_rate": 1e-3, "precision": "fp32", "seed": 5,
    "checkpoint_every": 2, "keep_last": 10, "caption_dropout": 0.2, "log_every": 2, "trackers": [], "ema_decay": 0.5,
    "validation": {"share": 0.2, "every": 3, "samples": 2, "sigmas": 2},
}  # fmt: skip
ODD_SIZES = (4, 3)
LAST = "checkpoints/00000006"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, pictures, tiny_model, ftk):
    """The runs' folder, once all have run; `run_file` beside `work`, and what each world ended with."""
    folder = tmp_path_factory.mktemp("sharded")
    process = subprocess.Popen(
        [sys.executable, WORLDS], env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    shutil.copytree(pictures, folder / "pictures")
    run_file = folder / "run.yaml"
    tree = {
        "run": "test",
        "workspace": str(folder / "work"),
        "model": {"family": "qwen-image", "path": str(tiny_model)},
        "data": {"sources": [{"path": str(folder / "pictures")}], "resolutions": [64], "workers": 1},
        "cache": {"text_dtype": "float32", "latents_dtype": "float32"},
        "method": {"name": "full"},
        "train": TRAIN,
        "sample": {"prompts": ["a red circle"], "num_inference_steps": 2, "guidance_scale": 1.0},
    }
    run_file.write_text(yaml.safe_dump(tree))
    assert ftk("prepare", run_file).code == ftk("cache", run_file).code == 0

    def world(run, size, *settings, sharding="fsdp", **others):
        given = [f"run={run}", f"train.sharding={sharding}", *settings]
        return {"size": size, "arguments": [str(run_file), *(part for one in given for part in ("--set", one))], **others}

    bf16 = ("train.precision=bf16", "train.steps=3", "train.validation.every=50")
    worlds = [
        world("one", 1, "sample.every=3"),
        world("many", 2, "sample.every=3", "train.steps=2"),
        world("many", 1, "sample.every=3", "train.steps=4"),
        world("many", 3, "sample.every=3"),
        world("killed", 2, dies=(1, "optimizer-00001-000.safetensors")),
        world("killed", 2, dies=(0, "COMPLETE")),
        world("bf16-one", 1, *bf16),
        world("bf16-two", 2, *bf16, "train.memory.checkpointing=all", max_shard_size="60KB"),
        *({"size": size, "folder": str(folder / "odd")} for size in ODD_SIZES),
    ]
    out, err = process.communicate(json.dumps(worlds), timeout=300)
    assert "Traceback" not in err, err
    codes = [json.loads(line) for line in out.splitlines() if line.startswith("[")]
    killed = [[75, -signal.SIGKILL], [-signal.SIGKILL, 75]]
    assert codes == [[0], [0, 0], [0], [0, 0, 0], *killed, [0], [0, 0], *([0] * size for size in ODD_SIZES)], err
    return folder / "work/runs"


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run)]


def assert_near(found, expected, tolerance):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance)


def test_a_run_on_2_1_and_3_processes_is_the_run_on_one(runs):
    one, many = (runs / name for name in ("one", "many"))
    assert losses(many) == pytest.approx(losses(one), rel=1e-6)
    norms = [[row["grad_norm"] for row in read_metrics(run)] for run in (many, one)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    measured = [validation_table(run).to_pylist() for run in (many, one)]
    assert [row["step"] for row in measured[0]] == [0, 2, 3, 4, 6]
    by_step = {row["step"]: row["loss"] for row in measured[0]}
    assert [by_step[row["step"]] for row in measured[1]] == pytest.approx([row["loss"] for row in measured[1]], rel=1e-6)
    for found, expected in zip(checkpoint.read(many / LAST).tensors(), checkpoint.read(one / LAST).tensors(), strict=True):
        assert_near(found, expected, 1e-6)
    for step in ("00000003", "00000006"):
        assert (many / f"samples/step-{step}.png").is_file()


def test_each_process_writes_its_rows_and_reads_them_again(runs):
    expected = {
        name: [f"{kind}-{rank:05d}-000.safetensors" for kind in ("adapter", "optimizer") for rank in range(size)]
        for name, size in (("00000002", 2), ("00000006", 3))
    }
    for name, files in expected.items():
        path = runs / "many/checkpoints" / name
        assert sorted(each.name for each in path.iterdir()) == sorted([*files, "trainer.json", "COMPLETE"])
    assert {path.name for path in (runs / "many/checkpoints/00000004").iterdir()} == {
        "adapter.safetensors", "optimizer.safetensors", "trainer.json", "COMPLETE",
    }  # fmt: skip
    parts = [load_file(runs / "many" / LAST / f"adapter-{rank:05d}-000.safetensors") for rank in range(3)]
    name = "transformer_blocks.0.attn.to_q.weight"
    assert [len(part[name]) for part in parts] == [11, 11, 10]


def test_a_kill_in_the_middle_of_a_save_leaves_the_checkpoint_before(runs, ftk):
    folder = runs / "killed/checkpoints"
    assert [path.name for path in checkpoint.all_of(folder)] == ["00000002", "00000003"]
    (torn,) = folder.glob(".tmp-00000004-*")
    assert {path.name for path in torn.iterdir()} >= {"adapter-00000-000.safetensors", "adapter-00001-000.safetensors"}
    done = ftk("train", runs.parents[1] / "run.yaml", "--set", "run=killed", "--set", "train.sharding=fsdp")
    assert done.code == 0, done.err
    assert losses(runs / "killed") == pytest.approx(losses(runs / "one"), rel=1e-6)
    assert not list(folder.glob(".tmp-*"))


@pytest.mark.parametrize("name", ["many", "bf16-two"])
def test_what_is_delivered_loads_in_diffusers_and_predicts_as_the_trained_model(runs, tiny_model, ftk, name):
    settings = [f"run={name}", "train.sharding=fsdp", *(["train.precision=bf16"] if name == "bf16-two" else [])]
    run = load_run(runs.parents[1] / "run.yaml", settings)
    delivered = runs / name / "adapter/transformer"
    assert len(list(delivered.glob("*.safetensors"))) == (1 if name == "many" else 4)
    assert json.loads((delivered / "config.json").read_text())["_class_name"] == "QwenImageTransformer2DModel"
    dtype = torch.float32 if name == "many" else torch.bfloat16
    loaded = QwenImageTransformer2DModel.from_pretrained(delivered, dtype=dtype)
    pipeline = DiffusionPipeline.from_pretrained(tiny_model, transformer=loaded, dtype=dtype)
    found = checkpoint.latest(runs / name / "checkpoints")
    generator = torch.Generator().manual_seed(0)
    latents_BCHW = torch.randn(1, 16, 8, 8, generator=generator).to(dtype)
    texts = {"embeds": torch.randn(1, 5, loaded.config.joint_attention_dim, generator=generator).to(dtype), "mask": None}
    with export.trained(run, tiny_model, found) as model, torch.no_grad():
        elsewhere = Model(family=run.family, schedule=model.schedule, denoiser=pipeline.transformer)
        predictions = [
            run.family.predict(each, latents_BCHW, torch.tensor([0.5]), Conditions(texts=texts)) for each in (model, elsewhere)
        ]
    assert torch.equal(predictions[0], predictions[1])
    sets = [part for one in settings for part in ("--set", one)]
    done = ftk("export", runs.parents[1] / "run.yaml", "--format", "diffusers", *sets)
    assert done.code == 0, done.err
    for path in delivered.glob("*.safetensors"):
        exported = load_file(runs / name / "exports/diffusers/transformer/diffusion_pytorch_model.safetensors")
        for key, tensor in load_file(path).items():
            assert torch.equal(exported[key], tensor)


def test_bf16_is_gathered_from_fp32_masters(runs, tiny_model):
    one, two = (runs / name for name in ("bf16-one", "bf16-two"))
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    saved = [checkpoint.latest(run / "checkpoints").tensors() for run in (two, one)]
    assert {tensor.dtype for tensor in saved[0][0].values()} == {torch.float32}
    flat = [torch.cat([tensor.flatten() for tensor in tensors.values()]) for tensors, _ in saved]
    base = QwenImageTransformer2DModel.from_pretrained(tiny_model / "transformer", dtype=torch.bfloat16).state_dict()
    start = torch.cat([base[name].flatten() for name in saved[0][0]])
    assert float((flat[0] != flat[0].bfloat16()).float().mean()) > 0.9
    # Adam's first steps go by the sign: where a gradient is all rounding they go either way.
    assert float((flat[0] - flat[1]).abs().mean()) < 0.01 * float((flat[0] - start).abs().mean())
    delivered = load_file(next((two / "adapter/transformer").glob("*-00001-of-*.safetensors")))
    for name, tensor in delivered.items():
        assert torch.equal(tensor, saved[0][1][f"{name}/ema"].bfloat16())


def test_parameters_with_fewer_rows_than_processes(runs, tmp_path):
    for _ in ODD_SIZES:
        odd_rows(Ranks(), tmp_path)
    found, expected = (checkpoint.latest(folder) for folder in (runs.parents[1] / "odd", tmp_path))
    assert found.step == expected.step == STEPS * len(ODD_SIZES)
    assert found.optimizer_facts == expected.optimizer_facts
    for mine, theirs in zip(found.tensors(), expected.tensors(), strict=True):
        assert_near(mine, dict(sorted(theirs.items())), 1e-6)
    with safe_open(found.path / "adapter-00002-000.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["blocks.0.seven", "blocks.0.wide", "blocks.1.seven", "blocks.1.wide", "outside"]


@pytest.mark.parametrize("optimizer", ["muon", "adafactor", "torch.optim.Muon"])
def test_optimizers_that_need_whole_tensors_are_refused(runs, ftk, optimizer):
    refused = ftk("train", runs.parents[1] / "run.yaml", "--set", "run=refused", "--set", "train.sharding=fsdp", "--set",
                  f"train.optimizer={optimizer}")  # fmt: skip
    assert refused.code == 2
    assert f"optimizer {optimizer} is not known to treat a part of a tensor as within the whole" in refused.err
    assert "adamw, lion" in refused.err


def test_auto_splits_nothing_for_an_optimizer_that_needs_whole_tensors(runs):
    run = load_run(runs.parents[1] / "run.yaml", ["train.optimizer=muon"])
    assert inputs.settings_for_plan(run).sharding == "none"
