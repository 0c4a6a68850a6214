"""What `ftk train` does with its settings, as a user sees it."""

import itertools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ftk.configs.schema import TrainConfig
from ftk.deliver import sample
from ftk.deliver.export import Choice, run_dtype
from ftk.deliver.run_delivery import RunDelivery
from ftk.errors import TrainingError
from ftk.run import load_run
from ftk.train import checkpoint, memory
from ftk.train.build import build_trainer
from ftk.train.data import BatchBuilder
from ftk.train.hooks.recorder import read_metrics
from ftk.train.memory import has_torchao
from ftk.train.sheet import cells

DOCS = Path(__file__).parents[2] / "docs"
TRAIN = {
    "steps": 12, "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 5e-3, "precision": "fp32",
    "checkpoint_every": 6, "seed": 5, "log_every": 3, "trackers": [],
}  # fmt: skip


def fit(run_file: Path, *settings: str):
    build = build_trainer(load_run(run_file, settings), RunDelivery)
    build.trainer.fit(build.loader.steps(build.trainer.step, build.trainer.config.steps))
    return build


def delivered(build) -> bytes:
    return (build.directory / "adapter/pytorch_lora_weights.safetensors").read_bytes()


@pytest.fixture(scope="module")
def plain() -> list[bytes]:
    """What the run delivers that has none of the settings of the others, once one of them has trained it."""
    return []


def test_held_out_samples_are_measured_never_trained_on_and_the_best_step_is_kept(ftk, cached, tmp_path):
    run_file = cached(train={**TRAIN, "steps": 40, "validation": {"share": 0.25, "every": 10}, "keep_last": 1})
    report = json.loads(ftk("train", run_file, "--json").out)
    run = tmp_path / "work/runs/test"
    rows = pq.read_table(run / "validation.parquet").to_pylist()
    assert [row["step"] for row in rows] == [0, 10, 20, 30, 40]
    best = min(rows[1:], key=lambda row: row["loss"])
    assert best["loss"] < 0.97 * rows[0]["loss"]
    assert report["best_step"] == best["step"]
    kept = {int(path.name) for path in checkpoint.all_of(run / "checkpoints")}
    assert kept == {best["step"], 40}
    assert (run / "best/pytorch_lora_weights.safetensors").is_file()
    build = build_trainer(load_run(run_file, ["run=other"]), RunDelivery)
    held_out = set(build.inputs.order.held_out.tolist())
    assert len(held_out) == 3
    assert not held_out & {draw.sample for step in range(40) for batch in build.inputs.order.step(step) for draw in batch}


@pytest.mark.parametrize("settings", [{}, {"group_by": "text_length", "remainder": "fill", "caption_dropout": 0.3}])
def test_the_micro_batch_size_changes_speed_alone(cached, settings):
    """The same samples, noise, sigmas and captions in every step: the same weights, but for the rounding of sums."""
    stratified = {"sigma": {"stratified": True}}
    run_file = cached(train={**TRAIN, **stratified, "global_batch_size": 5, "micro_batch_size": 1, "steps": 8, **settings})
    builds = [fit(run_file, f"train.micro_batch_size={size}", f"run=micro-{size}") for size in (1, 2, 4, 5)]
    weights = [build.trainer.optimizer.weights() for build in builds]
    rows = [read_metrics(build.directory) for build in builds]
    assert len({builds[0].inputs.order.shape_of(sample) for sample in range(12)}) > 1
    num_batches = [sum(len(build.inputs.order.step(index)) for index in range(8)) for build in builds]
    assert num_batches[0] == sum(row["num_samples"] for row in rows[0]) > num_batches[1] >= num_batches[-1]
    for others, theirs in zip(weights[1:], rows[1:], strict=True):
        assert [row["num_samples"] for row in theirs] == [row["num_samples"] for row in rows[0]]
        assert [row["loss"] for row in theirs] == pytest.approx([row["loss"] for row in rows[0]], rel=1e-4)
        for name, weight in weights[0].items():
            torch.testing.assert_close(others[name], weight, rtol=1e-3, atol=1e-5)


def test_an_untrained_model_measures_the_same_all_along(cached, tmp_path):
    run_file = cached(train={**TRAIN, "validation": {"share": 0.25, "every": 4, "sigmas": 2}})
    frozen = [f"train.schedule={name}" for name in ("{name: piecewise_constant, rules: '0:1000,0'}",)]
    fit(run_file, *frozen)
    rows = pq.read_table(tmp_path / "work/runs/test/validation.parquet").to_pylist()
    assert len({row["loss"] for row in rows}) == 1
    assert len(rows) == 4


def test_training_ends_when_nothing_gets_better_and_stays_ended(ftk, cached, tmp_path):
    still = {"steps": 60, "learning_rate": 1e-30, "validation": {"share": 0.25, "every": 3, "patience": 2}}
    run_file = cached(train={**TRAIN, **still})
    report = json.loads(ftk("train", run_file, "--json").out)
    assert report["step"] < 60
    rows = pq.read_table(tmp_path / "work/runs/test/validation.parquet").to_pylist()
    assert not any(row["is_best"] for row in rows[-2:])
    again = ftk("train", run_file, "--json")
    assert (again.code, json.loads(again.out)["num_steps_now"]) == (0, 0)


def test_a_poisoned_sample_costs_its_step_and_nothing_else(ftk, cached, tmp_path, monkeypatch):
    run_file = cached(train={**TRAIN, "checkpoint_every": 1, "keep_last": 100})
    plain = BatchBuilder.build
    poisoned: list[int] = []

    def build(self, *arguments, **options):
        batch = plain(self, *arguments, **options)
        poisoned.append(len(poisoned))
        return batch.map(lambda tensor: tensor * float("nan")) if len(poisoned) in (9, 13) else batch

    monkeypatch.setattr(BatchBuilder, "build", build)
    done = ftk("train", run_file, "--json")
    assert json.loads(done.out)["num_bad_steps"] == 2
    run = tmp_path / "work/runs/test"
    assert [row["step"] for row in read_metrics(run) if row["is_bad"]] == [5, 7]
    assert "step 5" in done.err.lower()
    weights = [load_file(path / "adapter.safetensors") for path in checkpoint.all_of(run / "checkpoints")]
    assert len(weights) == 12
    changed = [
        any(not torch.equal(before[name], after[name]) for name in before) for before, after in itertools.pairwise(weights)
    ]
    assert [step for step, is_changed in enumerate(changed, start=2) if not is_changed] == [5, 7]
    assert all(torch.isfinite(tensor).all() for each in weights for tensor in each.values())


def test_fp16_training_follows_fp32_and_resumes_to_the_bit(ftk, cached, tmp_path, monkeypatch):
    run_file = cached(train={**TRAIN, "checkpoint_every": 6})
    exact = fit(run_file, "run=exact")
    # It is refused on a CPU, and the tiny model computes in it all the same.
    monkeypatch.setattr(memory, "precision", lambda config, device: (torch.float16, "a test"))
    whole = fit(run_file, "run=whole", "train.precision=fp16")
    assert {parameter.dtype for parameter in whole.trainer.model.denoiser.parameters()} == {torch.float16}
    part = build_trainer(load_run(run_file, ["run=part", "train.precision=fp16"]), RunDelivery)
    part.trainer.hooks = [*part.trainer.hooks, StopAfter(6)]
    with pytest.raises(Exception, match="Stopped by a signal at step 6"):
        part.trainer.fit(part.loader.steps(0, 12))
    rest = fit(run_file, "run=part", "train.precision=fp16")
    for name in ("checkpoints/00000012/trainer.json", "checkpoints/00000012/optimizer.safetensors",
                 "checkpoints/00000012/adapter.safetensors", "adapter/pytorch_lora_weights.safetensors"):  # fmt: skip
        assert (whole.directory / name).read_bytes() == (rest.directory / name).read_bytes()
    rows, plain = read_metrics(whole.directory), read_metrics(exact.directory)
    overflows = sum(row["is_overflow"] for row in rows)
    scale = {"scale": 2.0 ** (16 - overflows), "good_steps": 12 - overflows}
    assert checkpoint.latest(whole.directory / "checkpoints").optimizer_facts["loss_scale"] == scale
    assert {row["loss_scale"] for row in plain} == {None}
    assert not any(row["is_bad"] for row in rows)
    assert overflows < 3
    if not overflows:
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in plain], rel=2e-3)
        assert [row["grad_norm"] for row in rows] == pytest.approx([row["grad_norm"] for row in plain], rel=2e-2)
    for precision, expected in (("fp16", torch.float16), ("auto", torch.float16), ("bf16", torch.bfloat16)):
        assert run_dtype(load_run(run_file, ["run=whole", f"train.precision={precision}"])) == expected
    run = load_run(run_file, ["run=whole", "train.precision=fp16"])
    choices = [(Choice(), "cpu"), (Choice(), "cuda"), (Choice(dtype="float16"), "cpu")]
    dtypes = [sample._dtype(run, choice, torch.device(device)) for choice, device in choices]
    assert dtypes == [torch.float32, torch.float16, torch.float16]
    assert "loss scale" in ftk("inspect", whole.directory).out


def test_fp16_on_a_cpu_is_refused_before_any_weight_is_read(ftk, cached):
    refused = ftk("train", cached(train={**TRAIN, "precision": "fp16", "device": "cpu"}))
    assert refused.code == 2
    assert "train.precision: fp16 is for GPUs" in refused.err


def test_many_bad_steps_in_a_row_stop_the_training_before_anything_is_saved(cached, monkeypatch):
    run_file = cached(train={**TRAIN, "max_bad_steps": 3, "checkpoint_every": 100})
    plain = BatchBuilder.build
    monkeypatch.setattr(
        BatchBuilder,
        "build",
        lambda self, *arguments, **options: plain(self, *arguments, **options).map(lambda tensor: tensor * float("inf")),
    )
    with pytest.raises(TrainingError, match=r"learning_rate"):
        fit(run_file)
    build = build_trainer(load_run(run_file), RunDelivery)
    assert build.trainer.step == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"ema_decay": 0.9},
        {"optimizer": "lion", "learning_rate": 1e-3},
        {"optimizer": "adafactor"},
        {"optimizer": "schedule-free"},
        {"optimizer": {"name": "torch.optim.SGD", "momentum": 0.9}},
        {"sigma": {"sampling": "logit_normal", "shift": "resolution", "stratified": True}},
        {"sigma": {"sampling": "beta", "beta_alpha": 2.0, "continuous": True, "minimum": 0.1}},
        {"loss": {"kind": "huber"}},
        {"loss": {"kind": "smooth_l1", "huber_schedule": "exponential"}, "noise": {"offset": 0.1, "perturbation": 0.1}},
        {"loss": {"kind": "l1"}, "noise": {"pyramid_levels": 3}},
        {"group_by": "text_length", "caption_dropout": 0.3},
        {"remainder": "fill", "posterior": "frozen"},
        pytest.param(
            {"memory": {"checkpointing": 1, "base": "int8"}},
            marks=pytest.mark.skipif(not has_torchao(), reason="torchao is not installed: pip install 'ftk[int8]'"),
        ),
        {"memory": {"checkpointing": "all", "offload": 1}},
        {"validation": {"share": 0.2, "every": 4}, "schedule": {"name": "linear", "warmup_steps": 2}},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_each_setting_takes_effect_and_a_run_with_it_resumes_to_the_bit(cached, tmp_path, plain, settings):
    run_file = cached(train={**TRAIN, "steps": 6, "checkpoint_every": 3, **settings})
    if not plain:
        plain.append(delivered(fit(cached_plain(run_file, tmp_path), "run=plain", "train.steps=6")))
    whole = fit(run_file, "run=whole")
    part = build_trainer(load_run(run_file, ["run=part"]), RunDelivery)
    part.trainer.ranks.stop_requested = False
    steps = part.loader.steps(0, 6)
    part.trainer.hooks = [*part.trainer.hooks, StopAfter(3)]
    with pytest.raises(Exception, match="Stopped by a signal at step 3"):
        part.trainer.fit(steps)
    rest = fit(run_file, "run=part")
    assert delivered(whole) == delivered(rest)
    if "memory" not in settings or settings["memory"].get("base") == "int8":
        assert delivered(whole) != plain[0]
    assert [row["loss"] for row in read_metrics(whole.directory)] == [row["loss"] for row in read_metrics(rest.directory)]


def test_noise_is_shaped_by_each_samples_own_generator(cached):
    run_file = cached(train={**TRAIN, "micro_batch_size": 4})

    def batches(*settings):
        build = build_trainer(load_run(run_file, settings), RunDelivery)
        return [batch for step in range(3) for _, batch in build.loader.step(step).batches]

    plain, shaped = batches(), batches("train.noise.offset=0.5", "train.noise.perturbation=0.25")
    offsets, perturbations = [], []
    for before, after in zip(plain, shaped, strict=True):
        offset = after.noise_BCHW - before.noise_BCHW
        assert torch.allclose(offset, offset.mean((2, 3), keepdim=True), atol=1e-5)
        offsets += offset.mean((2, 3)).flatten().tolist()
        perturbations += (after.seen_noise_BCHW - after.noise_BCHW).flatten().tolist()
        assert torch.equal(after.sigma_B, before.sigma_B)
        assert before.seen_noise_BCHW is None
    assert len(set(offsets)) == len(offsets)
    assert np.std(offsets) == pytest.approx(0.5, rel=0.15)
    assert np.std(perturbations) == pytest.approx(0.25, rel=0.05)
    # Whoever computes a sample, and with which others, it has the same noise.
    alone = batches("train.noise.offset=0.5", "train.noise.perturbation=0.25", "train.micro_batch_size=1")
    rows = [[row for batch in each for row in batch.seen_noise_BCHW.flatten(1).sum(1).tolist()] for each in (shaped, alone)]
    assert sorted(rows[0]) == pytest.approx(sorted(rows[1]))


class StopAfter:
    """As a signal would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_start(self, trainer) -> None: ...

    def on_step(self, trainer, result) -> None:
        trainer.ranks.stop_requested = result.step >= self.step

    def on_end(self, trainer) -> None: ...


def cached_plain(run_file: Path, tmp_path: Path) -> Path:
    """The same run file with the training section that the others change."""
    import yaml

    tree = yaml.safe_load(run_file.read_text())
    tree["train"] = {**TRAIN, "checkpoint_every": 3}
    path = tmp_path / "plain.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_what_is_delivered_is_the_average(cached):
    run_file = cached(train={**TRAIN, "ema_decay": 0.9})
    build = fit(run_file)
    delivered = load_file(build.directory / "adapter/pytorch_lora_weights.safetensors")
    masters = build.trainer.optimizer.weights()
    for name, tensor in masters.items():
        (key,) = [key for key in delivered if name.replace(".default", "").endswith(key.removeprefix("transformer."))]
        assert not torch.equal(delivered[key], tensor)
    state, _ = build.trainer.optimizer.state()
    name = next(name for name in masters if "lora_B" in name)
    key = "transformer." + name.replace(".default", "")
    torch.testing.assert_close(delivered[key], state[f"{name}/ema"])


def test_a_dry_run_draws_the_sigmas_and_explains_the_memory(ftk, cached, tmp_path):
    run_file = cached(train={**TRAIN, "sigma": {"sampling": "logit_normal", "shift": 3.0}})
    done = ftk("train", run_file, "--dry-run")
    assert done.code == 0
    assert "█" in done.out or "▁" in done.out
    plan = json.loads(ftk("train", run_file, "--dry-run", "--json").out)
    assert plan["reasons"]
    assert "█" in plan["sigmas"] or "▁" in plan["sigmas"]
    assert not (tmp_path / "work/runs").exists()
    assert ftk("train", run_file, "--set", "train.steps=1").code == 0
    assert Image.open(tmp_path / "work/runs/test/sigmas.png").width > 300


def test_masks_leave_what_they_cover_out_of_the_loss(ftk, workspace, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    workspace()
    pictures = [path for path in (tmp_path / "pictures").iterdir() if path.suffix != ".txt"]
    for path in pictures:
        with Image.open(path) as image:
            mask = Image.new("L", image.size, 0)
            mask.paste(255, (0, 0, image.width // 2, image.height))
            mask.save(masks / f"{path.stem}.png")
    source = {"path": str(tmp_path / "pictures"), "masks": str(masks)}
    run_file = workspace(data={"sources": [source], "resolutions": [64], "workers": 1}, train=TRAIN)
    assert ftk("prepare", run_file).code == ftk("cache", run_file).code == 0
    build = build_trainer(load_run(run_file), RunDelivery)
    batch = build.loader.builder.build(build.inputs.order.step(0)[0])
    assert batch.cell_weight_BHW.min() == 0
    assert batch.cell_weight_BHW.max() == 1
    hidden, shown = ((batch.cell_weight_BHW == value)[:, None] for value in (0, 1))
    losses = []
    for error in (torch.zeros_like(batch.noise_BCHW), hidden * 100.0, shown * 100.0):
        build.trainer.method = SimpleNamespace(predict=lambda model, noisy, *_, error=error: noisy * 0 + error)
        losses.append(build.trainer.losses(batch))
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=0)
    assert (losses[2] > 1000 * losses[0]).all()
    ignored = build_trainer(load_run(run_file, ["train.loss.unmasked_weight=1", "run=ignored"]), RunDelivery)
    assert ignored.loader.builder.build(ignored.inputs.order.step(0)[0]).cell_weight_BHW is None


def test_class_images_weigh_what_the_run_file_says_and_come_as_often(ftk, workspace, tmp_path, pictures):
    shutil.copytree(pictures, tmp_path / "classes")
    sources = [
        {"path": str(tmp_path / "pictures"), "trigger": "sks"},
        {"path": str(tmp_path / "classes"), "role": "class", "name": "classes"},
    ]
    train = {**TRAIN, "class_ratio": 0.5, "loss": {"prior_weight": 0.25}}
    run_file = workspace(data={"sources": sources, "resolutions": [64], "workers": 1}, train=train)
    assert ftk("prepare", run_file).code == ftk("cache", run_file).code == 0
    build = build_trainer(load_run(run_file), RunDelivery)
    roles = build.inputs.store.table["role"].to_pylist()
    order = build.inputs.order
    micro_batches = [micro_batch for index in range(order.steps_an_epoch) for micro_batch in order.step(index)]
    uses = [roles[draw.sample] for micro_batch in micro_batches for draw in micro_batch]
    assert (uses.count("instance"), uses.count("class")) == (12, 6)
    for micro_batch in micro_batches:
        weights = build.loader.builder.build(micro_batch).weight_B.tolist()
        assert weights == [0.25 if roles[draw.sample] == "class" else 1.0 for draw in micro_batch]


def test_repeats_that_are_not_whole_pass_through_every_stage(ftk, workspace, tmp_path, pictures):
    shutil.copytree(pictures, tmp_path / "others")
    sources = [{"path": str(tmp_path / "pictures"), "repeats": 2}, {"path": str(tmp_path / "others"), "repeats": 0.5}]
    run_file = workspace(data={"sources": sources, "resolutions": [64], "workers": 1}, train=TRAIN)
    assert ftk("prepare", run_file).code == ftk("cache", run_file).code == 0
    again = json.loads(ftk("prepare", run_file, "--json").out)
    assert again["num_shards_reused"] == again["num_shards"] == 2
    tables = sorted((tmp_path / "work/prepared/shards").glob("*.parquet"))
    assert [str(pq.read_schema(path).field("repeats").type) for path in tables] == ["int32", "double"]
    summary = json.loads(ftk("inspect", tmp_path / "work/prepared", "--json").out)
    assert [source["repeats"] for source in summary["sources"]] == [0.5, 2]
    assert ftk("gc", tmp_path / "work/cache", "--yes").code == 0
    build = build_trainer(load_run(run_file), RunDelivery)
    assert build.inputs.store.sample(0).repeats == 2
    order = build.inputs.order
    assert order.samples_an_epoch == 2 * 12 + 6
    epochs = [
        [draw.sample for index in range(order.steps_of(1)) for batch in order.step(first + index) for draw in batch]
        for first in (0, order.steps_of(1))
    ]
    assert sorted(sample for epoch in epochs for sample in epoch if sample >= 12) == list(range(12, 24))
    assert all(sorted(sample for sample in epoch if sample < 12) == sorted(2 * list(range(12))) for epoch in epochs)


def test_a_run_of_so_many_epochs_has_their_steps_and_keeps_them(ftk, cached, tmp_path):
    # 12 samples in steps of 5: three per epoch
    run_file = cached(train={**TRAIN, "global_batch_size": 5, "steps": None, "epochs": 2, "schedule": {"warmup": 2}})
    dry = json.loads(ftk("train", run_file, "--dry-run", "--json").out)
    assert (dry["steps"], dry["epochs"]) == (6, 2)
    doctor = json.loads(ftk("doctor", run_file, "--json").out)
    assert (doctor["steps"], doctor["epochs"]) == (6, 2)
    assert re.search(r"steps +6 +\nepochs +2 ", ftk("doctor", run_file).out)
    assert json.loads(ftk("train", run_file, "--json").out)["step"] == 6
    assert load_run(tmp_path / "work/runs/test/config.yaml").config.train.steps == 6
    counts = [row["num_samples"] for row in read_metrics(tmp_path / "work/runs/test")]
    assert counts == [5, 5, 2] * 2
    # The images are seen twice as often now, and still the run has the length that it began with.
    more = ["--set", "data.sources.0.repeats=2"]
    assert ftk("prepare", run_file, *more).code == ftk("cache", run_file, *more).code == 0
    assert ftk("train", run_file, *more).code == 2
    again = json.loads(ftk("train", run_file, *more, "--allow-change", "--json").out)
    assert (again["step"], again["num_steps_now"]) == (6, 0)
    longer = ["--set", "train.epochs=2.2", "--allow-change", "--json"]
    assert json.loads(ftk("train", run_file, *more, *longer).out)["step"] == 2 * 5 + 1


def test_steps_take_the_place_of_epochs_where_one_of_them_is_given(ftk, cached):
    run_file = cached(train=TRAIN)
    both = ftk("train", run_file, "--set", "train.epochs=1", "--dry-run")
    assert both.code == 2
    assert "`steps` and `epochs` are two ways to give the length of a run" in both.err
    dry = ftk("train", run_file, "--set", "train.epochs=0.5", "--set", "train.steps=null", "--dry-run", "--json")
    assert json.loads(dry.out)["steps"] == 2
    short = ["--set", "train.schedule={name: linear, steps: 2}", "--set", "train.steps=null", "--set", "train.epochs=1"]
    refused = ftk("train", run_file, *short)
    assert refused.code == 2
    assert "steps 2: the learning rate is 0 after that, and the run has 3 steps" in refused.err


def test_every_setting_of_training_is_in_its_guide():
    guide = (DOCS / "train.md").read_text() + (DOCS / "cluster.md").read_text()

    def names(model):
        for name, field in model.model_fields.items():
            inner = field.annotation
            yield name
            if isinstance(inner, type) and hasattr(inner, "model_fields"):
                yield from names(inner)

    missing = sorted({name for name in names(TrainConfig) if not re.search(rf"`[^`\n]*\b{name}\b[^`\n]*`", guide)})
    assert missing == []


def test_pictures_at_the_start_are_those_of_the_base_model(ftk, cached, tmp_path):
    run_file = cached(train={**TRAIN, "steps": 2}, sample={"at_start": True})
    assert ftk("train", run_file).code == 0
    run = tmp_path / "work/runs/test"
    # Nothing else asks for pictures.
    assert [path.name for path in (run / "samples").iterdir()] == ["step-00000000.png"]
    drawn = json.loads(ftk("sample", run_file, "--json").out)
    (at_start, prompt), (base, _) = cells(run / "samples/step-00000000.png")[0], cells(Path(drawn["grid"]))[0]
    assert prompt == "a red circle"
    assert np.abs(np.asarray(at_start, np.int16) - np.asarray(base, np.int16)).max() <= 2
    page = tmp_path / "page.html"
    assert ftk("inspect", run, "--html", "--out", page).code == 0
    assert "<figcaption>step 0</figcaption>" in page.read_text()
    (run / "samples/step-00000000.png").unlink()
    assert ftk("train", run_file, "--set", "train.steps=3").code == 0
    assert not list((run / "samples").glob("step-*"))  # a resumed run no longer has the base
