"""One run on several processes: who computes changes, what is computed does not."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from world import World

from ftk import storage
from ftk.deliver.run_delivery import RunDelivery
from ftk.run import load_run
from ftk.train.build import build_trainer
from ftk.train.hooks.recorder import read_metrics
from ftk.train.sheet import cells

pytestmark = pytest.mark.faults

TRAIN = {
    "steps": 24, "global_batch_size": 12, "micro_batch_size": 2, "learning_rate": 1e-3, "precision": "fp32",
    "checkpoint_every": 100, "caption_dropout": 0.2, "seed": 5, "log_every": 4, "trackers": [],
}  # fmt: skip


def train(size: int, folder: Path, *arguments: object, **environment: str) -> None:
    codes, err = World(size, folder, *arguments, **environment).end()
    assert codes == [0] * size, err


def traced(folder: Path, steps: int) -> tuple[dict[tuple[int, int], list], dict[tuple[int, int], list]]:
    """Draws and sigmas by (step, micro-batch), from all processes; a step that was made twice was made alike."""
    draws, sigmas = {}, {}
    for path in folder.glob("*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            for number in line["draws"] if line["step"] < steps else ():
                place = (line["step"], int(number))
                for found, now in ((draws, line["draws"]), (sigmas, line["sigmas"])):
                    assert found.setdefault(place, now[number]) == now[number]
    return draws, sigmas


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run)]


def test_a_run_resumed_on_1_2_4_and_3_processes_is_the_run_on_one(cached, tmp_path):
    preserved = {"preservation": {"replace": {"red": "green"}, "every": 3}}
    run_file = cached(train={**TRAIN, "loss": preserved}, method={"name": "lora", "rank": 4, "dropout": 0.1})
    train(1, tmp_path / "one", run_file, "--set", "run=one")
    for steps, size in zip((6, 12, 18, 24), (1, 2, 4, 3), strict=True):
        train(size, tmp_path / "many", run_file, "--set", "run=many", "--set", f"train.steps={steps}")
    runs = tmp_path / "work/runs"
    assert len(list((tmp_path / "many").glob("*.jsonl"))) == 1 + 2 + 4 + 3
    expected, found = traced(tmp_path / "one", 24), traced(tmp_path / "many", 24)
    assert len(expected[0]) == 24 * 6
    assert found == expected
    assert losses(runs / "many") == pytest.approx(losses(runs / "one"), rel=1e-5)
    kept = [[row["preservation_loss"] for row in read_metrics(runs / name)] for name in ("many", "one")]
    assert [value is None for value in kept[1]] == [bool(step % 3) for step in range(24)]
    assert [value is None for value in kept[0]] == [value is None for value in kept[1]]
    assert kept[0][::3] == pytest.approx(kept[1][::3], rel=1e-3, abs=1e-9)
    assert len(losses(runs / "one")) == 24
    weights = [load_file(runs / name / "checkpoints/00000024/adapter.safetensors") for name in ("one", "many")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_the_gradient_does_not_depend_on_how_a_step_is_split(cached, tmp_path):
    """Buckets of several shapes, accumulation, and processes with uneven shares, against one sample at a time."""
    run_file = cached(train=TRAIN, method={"name": "lora", "rank": 4})
    for size in (1, 2, 4):
        train(size, tmp_path / f"{size}", run_file, "--set", "train.steps=1", "--set", f"run=r{size}", WORLD_GRADIENTS="1")
    gradients = [load_file(tmp_path / f"{size}/gradient.safetensors") for size in (1, 2, 4)]

    build = build_trainer(load_run(run_file, ["run=alone"]), RunDelivery)
    step = build.loader.step(0)
    assert len({batch.latents_BCHW.shape[-2:] for _, batch in step.batches}) > 1
    for _, batch in step.batches:
        for row in range(len(batch)):
            texts = dict(batch.conditions.texts)
            if texts["mask"] is not None:
                length = int(texts["mask"][row].sum())
                texts = {"embeds": texts["embeds"][:, :length], "mask": None}
            conditions = replace(batch.conditions, texts=texts)
            alone = replace(batch, conditions=conditions).map(lambda tensor, row=row: tensor[row : row + 1])
            (build.trainer.losses(alone).sum() / step.num_samples).backward()
    gradients.append({name: master.grad for name, master in build.trainer.optimizer.masters.items()})

    scale = max(float(tensor.abs().max()) for tensor in gradients[0].values())
    assert scale > 1e-5
    for others in gradients[1:]:
        for name, tensor in gradients[0].items():
            torch.testing.assert_close(others[name], tensor, rtol=0, atol=1e-6 * scale)


def test_split_weights_give_the_losses_of_whole_ones(cached, tmp_path, ftk):
    run_file = cached(train=TRAIN, sample={"every": 8})
    settings = ["--set", "train.steps=10", "--set", "train.global_batch_size=6", "--set", "train.validation.share=0.1",
                "--set", "train.validation.every=5", "--set", "train.validation.samples=3"]  # fmt: skip
    for sharding in ("none", "fsdp"):
        more = ["--set", f"train.sharding={sharding}", "--set", f"run={sharding}"]
        train(2, tmp_path / sharding, run_file, *settings, *more)
    none, fsdp = (tmp_path / "work/runs" / name for name in ("none", "fsdp"))
    assert losses(fsdp) == pytest.approx(losses(none), rel=1e-6)
    saved = [load_file(run / "checkpoints/00000010/adapter.safetensors") for run in (none, fsdp)]
    assert list(saved[0]) == list(saved[1])
    assert all("lora" in name for name in saved[1])
    for name, tensor in saved[0].items():
        torch.testing.assert_close(saved[1][name], tensor, rtol=1e-5, atol=1e-7)
    assert (fsdp / "samples/step-00000008.png").is_file()
    drawn = json.loads(ftk("sample", run_file, "--set", "run=fsdp", "--json").out)
    assert drawn["mean_difference"] > 0


def test_a_signal_to_one_process_stops_all_at_one_step(cached, tmp_path):
    run_file = cached(train=TRAIN)
    world = World(2, tmp_path / "trace", run_file, "--set", "train.steps=100000", "--set", "train.log_every=1000")
    wait_until_it_trains(tmp_path / "trace")
    os.kill(world.pids[1], signal.SIGTERM)
    codes, err = world.end()
    assert codes == [75, 75], err
    (saved,) = (tmp_path / "work/runs/test/checkpoints").glob("0*")
    assert f"step {int(saved.name)}, which is saved" in err


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_dies_the_others_end_soon_and_can_go_on(cached, tmp_path, victim):
    run_file = cached(train={**TRAIN, "checkpoint_every": 2, "steps": 100000, "log_every": 1000, "timeout_seconds": 20})
    world = World(3, tmp_path / "trace", run_file)
    wait_until_it_trains(tmp_path / "trace")
    os.kill(world.pids[victim], signal.SIGKILL)
    # Without a timeout of their own they would wait for half an hour, and `end` would give up on them.
    codes, err = world.end()
    assert codes == [-signal.SIGKILL if rank == victim else 75 for rank in range(3)], err
    assert "goes on from the last checkpoint" in err
    reached = max(int(path.name) for path in (tmp_path / "work/runs/test/checkpoints").glob("0*"))
    train(1, tmp_path / "alone", run_file, "--set", f"train.steps={reached + 1}")


def test_when_one_process_hangs_the_others_give_up_after_the_timeout(cached, tmp_path):
    run_file = cached(train={**TRAIN, "steps": 100000, "log_every": 1000, "timeout_seconds": 5})
    world = World(2, tmp_path / "trace", run_file)
    wait_until_it_trains(tmp_path / "trace")
    os.kill(world.pids[1], signal.SIGSTOP)
    assert world.runs[0].wait(60) == 75, world.runs[0].err
    assert "does not answer" in world.runs[0].err
    os.kill(world.pids[1], signal.SIGKILL)
    assert world.runs[1].wait(60) == -signal.SIGKILL


def test_pictures_may_take_longer_than_the_timeout_and_are_shared(cached, tmp_path):
    """The others wait for the process that draws most; the pictures are those that one process draws."""
    sizes = {"a red circle": 1.0, "a blue square": 2.0, "two stars": 0.5}
    prompts = ["a red circle", {"prompt": "a blue square", "size": "64x32"}, {"prompt": "two stars", "size": "32x64"}]
    run_file = cached(train={**TRAIN, "steps": 2}, sample={"prompts": prompts})
    settings = ["--set", "sample.every=2", "--set", "train.timeout_seconds=3"]
    train(2, tmp_path / "two", run_file, *settings, "--set", "run=two", WORLD_PICTURE_SECONDS="2")
    train(1, tmp_path / "one", run_file, *settings, "--set", "run=one")
    runs = tmp_path / "work/runs"
    drawn = [cells(runs / name / "samples/step-00000002.png") for name in ("one", "two")]
    assert {prompt: image.width / image.height for image, prompt in drawn[1]} == sizes
    for (alone, _), (shared, _) in zip(*drawn, strict=True):
        # The weights agree to rounding alone.
        assert np.abs(np.asarray(alone, np.int16) - np.asarray(shared, np.int16)).max() <= 2
    assert not (runs / "two/failure.json").exists()


def test_the_same_loss_of_a_process_twice_at_one_step_is_not_tried_again(cached, tmp_path):
    run_file = cached(train={**TRAIN, "steps": 8, "timeout_seconds": 20})
    failure = tmp_path / "work/runs/test/failure.json"
    for step, code, times in ((5, 75, 1), (3, 75, 1), (3, 1, 2)):
        codes, err = World(2, tmp_path / "trace", run_file, WORLD_DIES_AT=str(step)).end()
        assert codes == [code, -signal.SIGKILL], err
        noted = json.loads(failure.read_text())
        assert (noted["step"], noted["times"]) == (step, times)
    assert "ended more than once at step 3 in the same way: a process ended or did not answer" in err
    train(2, tmp_path / "trace", run_file)
    assert not failure.exists()


def test_what_the_main_process_cannot_do_ends_all_with_its_exit_code(cached, tmp_path):
    run_file = cached(train={**TRAIN, "steps": 2, "timeout_seconds": 20})
    train(2, tmp_path / "trace", run_file)
    # The main process alone reads checkpoints, and holds the run's lock.
    codes, err = World(2, tmp_path / "trace", run_file, "--set", "train.seed=6", "--set", "train.steps=4").end()
    assert codes == [2, 2], err
    assert "train.seed: checkpoint 5, now 6" in err
    with storage.lock(tmp_path / "work/runs/test"):
        codes, err = World(2, tmp_path / "trace", run_file, "--set", "train.steps=4").end()
    assert codes == [4, 4], err


def test_a_mistake_is_told_by_every_process_and_none_hangs(cached, tmp_path):
    run_file = cached(train=TRAIN)
    codes, err = World(2, tmp_path / "trace", run_file, "--set", "train.remainder=drop", "--set",
                       "train.global_batch_size=1000").end(60)  # fmt: skip
    assert codes == [2, 2]
    assert "drop leaves nothing" in err


def wait_until_it_trains(folder: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(len(path.read_text().splitlines()) > 8 for path in folder.glob("*.jsonl")):
            return
        time.sleep(0.02)
    raise AssertionError("no step within a minute")
