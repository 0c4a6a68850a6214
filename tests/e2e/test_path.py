"""The main job: pictures in, an adapter out that loads elsewhere."""

import gc
import hashlib
import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from e2e_photos import PHOTOS, needs_photos
from PIL import Image

from ftk.deliver.run_delivery import RunDelivery
from ftk.models.base import Model
from ftk.pipeline.dataset import PreparedDataset
from ftk.run import load_run
from ftk.train.build import build_trainer
from ftk.train.hooks.recorder import read_metrics

ADAPTER = "work/runs/test/adapter/pytorch_lora_weights.safetensors"


def reports(result):
    assert result.code == 0, result.err
    return json.loads(result.out)


def hashes(directory: Path) -> dict[str, str]:
    # A shard's receipt also says when its sources were last looked at; what it says of the shard is in dataset.json.
    receipts = {*directory.glob("shards/*.json"), *directory.glob("prepared/shards/*.json")}
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != ".lock" and path not in receipts]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_one_command_makes_an_adapter_and_a_second_call_does_nothing(ftk, workspace, tmp_path):
    run_file = workspace()
    first = reports(ftk("run", run_file, "--json"))
    assert first["prepare"]["num_samples"] == 12
    assert (first["prepare"]["num_rejects"], first["prepare"]["rejects_by_reason"]) == (0, {})
    assert sum(first["prepare"]["buckets"].values()) == 12
    assert len(first["prepare"]["buckets"]) >= 3
    assert first["prepare"]["num_shards"] == 1
    assert first["cache"]["num_latents_encoded"] == 12
    assert first["cache"]["num_texts_encoded"] >= 12
    assert first["cache"]["num_bytes"] > 0
    assert first["train"]["step"] == 6
    # two of the micro-batches may be incomplete, never empty
    assert 12 < first["train"]["num_samples_seen"] <= 24
    assert first["train"]["loss"] > 0
    assert first["train"]["seconds_per_step"] > 0
    assert Path(first["train"]["adapter"], "pytorch_lora_weights.safetensors") == tmp_path / ADAPTER

    before = hashes(tmp_path / "work")
    second = reports(ftk("run", run_file, "--json"))
    assert second["cache"]["num_latents_encoded"] == second["cache"]["num_texts_encoded"] == 0
    assert second["cache"]["num_latents_reused"] == 12
    assert second["train"]["num_steps_now"] == 0
    after = hashes(tmp_path / "work")
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    assert changed <= {"runs/test/report.json"}


def test_a_run_leaves_what_the_layout_promises(ftk, workspace, tmp_path):
    assert ftk("run", workspace()).code == 0
    run = tmp_path / "work/runs/test"
    for name in ("config.yaml", "environment.json", "metrics.parquet", "report.json", "adapter/README.md"):
        assert (run / name).stat().st_size > 0
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["00000003", "00000006"]
    assert {path.name for path in (run / "checkpoints/00000006").iterdir()} == {
        "adapter.safetensors", "optimizer.safetensors", "trainer.json", "COMPLETE",
    }  # fmt: skip
    assert pq.read_table(run / "metrics.parquet")["step"].to_pylist() == [1, 2, 3, 4, 5, 6]
    assert list((run / "logs").glob("events.out.tfevents.*"))
    assert not [path for path in tmp_path.rglob(".tmp-*")]


def test_one_edited_caption_encodes_one_text_and_no_latent(ftk, workspace, tmp_path):
    run_file = workspace()
    ftk("run", run_file)
    caption = min((tmp_path / "pictures").glob("*.txt"))
    caption.write_text("something else altogether")
    assert reports(ftk("prepare", run_file, "--json"))["num_samples"] == 12
    cached = reports(ftk("cache", run_file, "--json"))
    assert (cached["num_latents_encoded"], cached["num_texts_encoded"]) == (0, 1)


def test_equal_captions_and_equal_pictures_are_stored_once(ftk, workspace, tmp_path):
    pictures = sorted(path for path in (tmp_path / "pictures").iterdir() if path.suffix != ".txt")
    (tmp_path / "pictures" / f"copy{pictures[0].suffix}").write_bytes(pictures[0].read_bytes())
    (tmp_path / "pictures" / "copy.txt").write_bytes(pictures[0].with_suffix(".txt").read_bytes())
    run_file = workspace()
    assert reports(ftk("prepare", run_file, "--json"))["num_samples"] == 13
    assert reports(ftk("cache", run_file, "--json"))["num_latents_encoded"] == 12


def test_the_bytes_do_not_depend_on_the_number_of_workers(ftk, workspace, tmp_path):
    run_file = workspace(data={"sources": [{"path": str(tmp_path / "pictures")}], "resolutions": [64], "shard_samples": 5})
    for workers in (1, 2, 3):
        place = tmp_path / f"w{workers}"
        assert ftk("prepare", run_file, "--workspace", place, "--set", f"data.workers={workers}").code == 0
    assert hashes(tmp_path / "w1/prepared") == hashes(tmp_path / "w2/prepared") == hashes(tmp_path / "w3/prepared")
    assert len(list((tmp_path / "w1/prepared/shards").glob("*.tar"))) == 3


def test_webdataset_reads_the_shards(ftk, workspace, tmp_path):
    import webdataset

    ftk("prepare", workspace())
    found = list(webdataset.WebDataset(str(tmp_path / "work/prepared/shards/00000.tar"), shardshuffle=False))
    rows = {row.key: row for row in PreparedDataset.open(tmp_path / "work/prepared").rows()}
    assert {sample["__key__"] for sample in found} == set(rows)
    for sample in found:
        row = rows[sample["__key__"]]
        assert json.loads(sample["json"])["captions"] == row.captions
        image = Image.open(io.BytesIO(sample.get("png") or sample["jpg"]))
        assert image.size == (row.bucket_width, row.bucket_height)
        assert row.bucket_width % 16 == row.bucket_height % 16 == 0


def test_only_the_denoiser_is_alive_during_steps(cached):
    run_file = cached(sample={"every": 2})
    build = build_trainer(load_run(run_file), RunDelivery)
    alive = []

    class Watch:
        def on_start(self, trainer):
            self.on_step(trainer, None)

        def on_step(self, trainer, result):
            gc.collect()
            names = {type(item).__name__ for item in gc.get_objects() if isinstance(item, torch.nn.Module)}
            alive.append(names)

        def on_end(self, trainer):
            pass

    build.trainer.hooks = [*build.trainer.hooks, Watch()]
    build.trainer.fit(build.loader.steps(0, 6))
    assert len(alive) == 7
    for names in alive:
        assert "QwenImageTransformer2DModel" in names
        assert not [name for name in names if "Autoencoder" in name or "Qwen2_5_VL" in name]
    drawn = sorted(path.name for path in (build.directory / "samples").iterdir())
    assert drawn == ["step-00000002.png", "step-00000004.png", "step-00000006.png"]


def test_the_adapter_is_the_model(cached, tmp_path):
    run_file = cached(method={"name": "lora", "rank": 4, "alpha": 8, "targets": "all-linear"})
    run = load_run(run_file)
    build = build_trainer(run, RunDelivery)
    build.trainer.fit(build.loader.steps(0, 6))
    family, trained_model = run.family, build.trainer.model
    pipeline = family.pipeline(tmp_path / "model", torch.float32, torch.device("cpu"))
    batch = build.loader.builder.build(build.inputs.order.step(0)[0])
    arguments = (batch.noise_BCHW, batch.sigma_B, batch.conditions)
    elsewhere = Model(family=family, schedule=trained_model.schedule, denoiser=pipeline.transformer)
    settings = {"prompt": "a red circle", "width": 64, "height": 64, "num_inference_steps": 2, "true_cfg_scale": 1.0}
    with torch.no_grad():
        trained = family.predict(trained_model, *arguments)
        base = family.predict(elsewhere, *arguments)
        before = pipeline(**settings, generator=torch.Generator().manual_seed(0)).images[0]
        run.method.load_into(family, pipeline, run.paths.adapter)
        loaded = family.predict(elsewhere, *arguments)
        after = pipeline(**settings, generator=torch.Generator().manual_seed(0)).images[0]
    assert (loaded - trained).abs().max() < 1e-5
    assert (loaded - base).abs().max() > 1e-3
    assert before.tobytes() != after.tobytes()


def test_sample_puts_base_and_adapter_side_by_side(ftk, workspace):
    run_file = workspace(
        train={"steps": 6, "learning_rate": 1e-2, "precision": "fp32"},
        sample={"prompts": ["a red circle", "two squares"], "num_inference_steps": 2, "guidance_scale": 2.0},
    )
    assert ftk("run", run_file).code == 0
    report = reports(ftk("sample", run_file, "--json"))
    assert report["num_images"] == 4
    assert report["mean_difference"] > 0
    sheet = Image.open(report["grid"])
    assert sheet.width > 2 * 192
    assert sheet.height > 2 * 192


@needs_photos
def test_real_photographs_take_the_whole_path(ftk, workspace):
    run_file = workspace(
        data={"sources": [{"path": str(PHOTOS)}], "resolutions": [256], "workers": 2},
        train={"steps": 4, "global_batch_size": 2, "precision": "fp32", "checkpoint_every": 4},
    )
    done = reports(ftk("run", run_file, "--json"))
    assert list(done) == ["prepare", "cache", "train"]
    assert (done["prepare"]["num_samples"], done["prepare"]["num_rejects"]) == (21, 0)
    assert len(done["prepare"]["buckets"]) >= 3
    assert done["cache"]["num_latents_encoded"] == 21
    assert (
        reports(ftk("sample", run_file, "--json", "--set", "sample.width=64", "--set", "sample.height=64"))["num_images"] == 2
    )


def test_four_samples_are_learnt_by_heart(ftk, workspace, tmp_path):
    """Full-rank LoRA on every linear layer; noise and sigma of one epoch are kept, so there is a fixed thing to learn."""
    for path in sorted((tmp_path / "pictures").iterdir())[8:]:
        path.unlink()
    run_file = workspace(
        data={"sources": [{"path": str(tmp_path / "pictures")}], "resolutions": [32], "workers": 1},
        method={"name": "lora", "rank": 64, "targets": "all-linear"},
        train={
            "steps": 100, "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2, "precision": "fp32",
            "schedule": {"name": "cosine", "warmup_steps": 10}, "checkpoint_every": 1000,
            "posterior": "mean", "optimizer": {"weight_decay": 0.0},
        },
    )  # fmt: skip
    assert ftk("prepare", run_file).code == ftk("cache", run_file).code == 0
    build = build_trainer(load_run(run_file), RunDelivery)
    assert len(build.inputs.store) == 4
    step = build.loader.step(0)
    build.trainer.fit([step] * 100)
    losses = [row["loss"] for row in read_metrics(build.directory)]
    assert sum(losses[-5:]) / 5 <= losses[0] / 100


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradient_checkpointing_changes_memory_and_not_the_loss(cached, precision):
    run_file = cached()
    losses = []
    for on in ("all", "none"):
        settings = [f"train.memory.checkpointing={on}", f"train.precision={precision}", f"run=r{on}"]
        build = build_trainer(load_run(run_file, settings), RunDelivery)
        build.trainer.fit(build.loader.steps(0, 6))
        losses.append([row["loss"] for row in read_metrics(build.directory)])
        dtypes = {parameter.dtype for parameter in build.trainer.model.denoiser.parameters()}
        assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_dry_runs_write_nothing_and_say_what_would_be(ftk, workspace, tmp_path):
    run_file = workspace()
    plan = reports(ftk("run", run_file, "--dry-run", "--json"))
    assert plan["prepare"]["num_samples"] == 12
    assert "not_yet" in plan["cache"]
    assert not (tmp_path / "work").exists()
    ftk("prepare", run_file)
    before = hashes(tmp_path / "work")
    plan = reports(ftk("cache", run_file, "--dry-run", "--json"))
    assert (plan["num_latents_to_encode"], plan["num_latents_reused"]) == (12, 0)
    assert hashes(tmp_path / "work") == before
    ftk("cache", run_file)
    plan = reports(ftk("train", run_file, "--dry-run", "--json"))
    assert (plan["num_frozen_parameters"], plan["num_trainable_parameters"]) == (91920, 2048)


def test_prepared_totals_equal_the_dry_run(ftk, workspace):
    run_file = workspace()
    plan = reports(ftk("prepare", run_file, "--dry-run", "--json"))
    done = reports(ftk("prepare", run_file, "--json"))
    assert {name: plan[name] for name in ("num_samples", "num_shards", "buckets")} == {
        name: done[name] for name in ("num_samples", "num_shards", "buckets")
    }
