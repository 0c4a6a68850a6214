"""Killed, stopped, or changed: what a run does when it is started again."""

import fcntl
import hashlib
import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from killing import server

from ftk.deliver.run_delivery import RunDelivery
from ftk.errors import Preempted
from ftk.run import load_run
from ftk.train.build import build_trainer
from ftk.train.hooks.recorder import read_metrics

pytestmark = pytest.mark.faults

STEPS = 120
TRAIN = {
    "steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3, "precision": "fp32",
    "schedule": {"name": "cosine", "warmup_steps": 3}, "checkpoint_every": 5,
    "caption_dropout": 0.2, "seed": 5, "log_every": 4,
}  # fmt: skip


def adapter_hash(directory: Path) -> str:
    return hashlib.sha256((directory / "adapter/pytorch_lora_weights.safetensors").read_bytes()).hexdigest()


def kill_once_it_trains(run_file, checkpoints: Path, delay: float) -> bool:
    """SIGKILL `delay` seconds after a new checkpoint appears; False if the run had ended by itself."""
    before = set(checkpoints.glob("0*")) if checkpoints.exists() else set()
    running = server().start("train", run_file)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and running.is_running:
        if set(checkpoints.glob("0*")) - before:
            time.sleep(delay)
            os.kill(running.pid, signal.SIGKILL)
            break
        time.sleep(0.002)
    return running.wait() == -signal.SIGKILL


def test_a_run_killed_three_times_ends_with_the_bytes_of_one_left_alone(ftk, cached, tmp_path):
    run_file = cached(train=TRAIN, method={"name": "lora", "rank": 4, "dropout": 0.1})
    shutil.copytree(tmp_path / "work", tmp_path / "alone")
    assert ftk("train", run_file, "--workspace", tmp_path / "alone").code == 0

    run = tmp_path / "work/runs/test"
    rng = random.Random(1)
    kills = sum(kill_once_it_trains(run_file, run / "checkpoints", rng.uniform(0, 0.12)) for _ in range(3))
    assert kills == 3
    last = server().run("train", run_file, "--json")
    assert last.code == 0, last.err
    assert last.report["step"] == STEPS
    assert last.report["num_steps_now"] < STEPS
    assert adapter_hash(run) == adapter_hash(tmp_path / "alone/runs/test")
    both = [read_metrics(place) for place in (run, tmp_path / "alone/runs/test")]
    assert [row["step"] for row in both[0]] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in both[0]] == [row["loss"] for row in both[1]]
    assert not list(run.rglob(".tmp-*"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resuming_in_every_step_is_exact(cached, precision):
    steps = 24
    run_file = cached(train={**TRAIN, "precision": precision, "checkpoint_every": 1, "steps": steps})
    whole = build_trainer(load_run(run_file, ["run=whole"]), RunDelivery)
    whole.trainer.fit(whole.loader.steps(0, steps))
    for step in range(6):
        part = build_trainer(load_run(run_file, ["run=part"]), RunDelivery)
        assert part.trainer.step == step
        part.trainer.ranks.stop_requested = True
        with pytest.raises(Preempted):
            part.trainer.fit(part.loader.steps(step, steps))
    rest = build_trainer(load_run(run_file, ["run=part"]), RunDelivery)
    rest.trainer.fit(rest.loader.steps(6, steps))
    for name, tensor in whole.trainer.optimizer.weights().items():
        assert torch.equal(tensor, rest.trainer.optimizer.weights()[name])
    assert adapter_hash(whole.directory) == adapter_hash(rest.directory)


def test_prepare_and_cache_killed_at_any_moment_end_with_the_same_bytes(ftk, workspace, tmp_path):
    from test_path import hashes

    run_file = workspace(data={"sources": [{"path": str(tmp_path / "pictures")}], "resolutions": [64], "shard_samples": 3})
    settings = ["--set", "cache.shard_bytes=60000"]
    for stage in ("prepare", "cache"):
        assert ftk(stage, run_file, *settings, "--workspace", tmp_path / "alone").code == 0
    rng = random.Random(1)
    for stage, target in (("prepare", "work/prepared/shards"), ("cache", "work/cache")):
        for _ in range(3):
            running = server().start(stage, run_file, *settings)
            began = time.monotonic()
            while running.is_running and time.monotonic() - began < 60 and not list((tmp_path / target).rglob("0*")):
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.05))
            os.kill(running.pid, signal.SIGKILL)
            running.wait()
        assert ftk(stage, run_file, *settings).code == 0
    for part in ("prepared", "cache"):
        assert hashes(tmp_path / "work" / part) == hashes(tmp_path / "alone" / part)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_at_the_step_and_exits_75(cached, tmp_path, number):
    run_file = cached(train={**TRAIN, "steps": 5000, "checkpoint_every": 1000, "log_every": 1000, "schedule": "constant"})
    running = server().start("train", run_file)
    while not list((tmp_path / "work/runs/test").glob("logs/*")) and running.is_running:
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(running.pid, number)
    assert running.wait() == 75, running.err
    err = running.err
    assert "Traceback" not in err
    (saved,) = (tmp_path / "work/runs/test/checkpoints").glob("0*")
    assert 0 < int(saved.name) < 5000
    assert f"step {int(saved.name)}, which is saved" in err


def test_a_run_whose_terminal_is_closed_is_saved(cached, tmp_path):
    run_file = cached(train={**TRAIN, "steps": 50_000, "checkpoint_every": 10_000, "log_every": 1000, "schedule": "constant"})
    ours, theirs = pty.openpty()

    def take_the_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        # Whoever runs the tests may ignore it, as nohup does.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    with subprocess.Popen(
        [sys.executable, "-m", "ftk", "train", str(run_file)], stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, preexec_fn=take_the_terminal,
    ) as process:  # fmt: skip
        os.close(theirs)
        try:
            said = b""
            while b"step" not in said:
                said += os.read(ours, 1 << 16)
            os.close(ours)
            assert process.wait(timeout=300) == 75
        finally:
            process.kill()
    (saved,) = (tmp_path / "work/runs/test/checkpoints").glob("0*")
    assert 0 < int(saved.name) < 50_000


def test_a_changed_setting_is_refused_by_name_and_fresh_sets_the_old_run_aside(ftk, workspace, tmp_path):
    run_file = workspace()
    assert ftk("run", run_file).code == 0
    refused = ftk("train", run_file, "--set", "train.learning_rate=0.5", "--set", "train.steps=9")
    assert refused.code == 2
    assert "train.learning_rate: checkpoint 0.001, now 0.5" in refused.err
    assert "--fresh" in refused.err
    longer = ftk("train", run_file, "--set", "train.steps=9", "--json")
    assert (json.loads(longer.out)["step"], json.loads(longer.out)["num_steps_now"]) == (9, 3)
    fresh = ftk("train", run_file, "--set", "train.learning_rate=0.5", "--fresh", "--json")
    assert json.loads(fresh.out)["num_steps_now"] == 6
    assert (tmp_path / "work/runs/test.old-1/checkpoints/00000009").is_dir()


def test_a_schedule_made_longer_tells_of_the_jump_and_one_with_a_length_of_its_own_has_none(ftk, cached):
    train = {**TRAIN, "learning_rate": 0.01, "schedule": "cosine", "steps": 4}
    run_file = cached(train=train)
    assert ftk("train", run_file).code == 0
    refused = ftk("train", run_file, "--set", "train.steps=8")
    assert refused.code == 2
    assert "train.steps: checkpoint 4, now 8" in refused.err
    longer = ftk("train", run_file, "--set", "train.steps=8", "--allow-change")
    assert longer.code == 0
    assert "the learning rate jumps: step 4 had 0.00146 and would have 0.00691 under the new schedule" in longer.err
    own = ["--set", "run=own", "--set", "train.schedule={name: cosine, steps: 4, minimum: 0.1}"]
    assert ftk("train", run_file, *own).code == 0
    longer = ftk("train", run_file, *own, "--set", "train.steps=8")
    assert longer.code == 0
    assert "jumps" not in longer.err
    rates = [row["learning_rate"] for row in read_metrics(run_file.parent / "work/runs/own")]
    assert rates[4:] == pytest.approx([0.001] * 4)


def test_samples_that_changed_in_mid_run_are_told_in_words(ftk, workspace, tmp_path):
    run_file = workspace()
    assert ftk("run", run_file).code == 0
    pictures = sorted((tmp_path / "pictures").glob("*.txt"))
    texts = [path.read_text() for path in pictures]
    pictures[0].write_text("something else")
    more = ("--set", "train.steps=9")
    assert ftk("prepare", run_file).code == ftk("cache", run_file).code == 0
    refused = ftk("train", run_file, *more)
    assert refused.code == 2
    assert "was trained on other data" in refused.err
    assert "data: 1 caption changed\n" in refused.err
    image = pictures[1].with_suffix(".png")
    shutil.copy(image, image.with_stem("new"))
    pictures[1].with_stem("new").write_text("a new one")
    assert ftk("prepare", run_file).code == ftk("cache", run_file).code == 0
    refused = ftk("train", run_file, *more, "--set", "train.seed=6")
    assert "was trained on other data and with other settings" in refused.err
    assert "data: 1 image added, 1 caption changed\n  train.seed: checkpoint 5, now 6\nPut" in refused.err
    pictures[0].write_text(texts[0])
    assert ftk("prepare", run_file).code == ftk("cache", run_file).code == 0
    accepted = ftk("train", run_file, *more, "--allow-change")
    assert accepted.code == 0
    assert "data: 1 image added\n" in accepted.err
    again = ftk("train", run_file, "--set", "train.steps=10")
    assert (again.code, "allow-change" in again.err) == (0, False)


def test_a_second_writer_is_told_who_holds_the_run(ftk, workspace, tmp_path):
    run_file = workspace()
    assert ftk("run", run_file).code == 0
    script = (
        "import sys, time; from pathlib import Path; from ftk import storage\n"
        "with storage.lock(Path(sys.argv[1])):\n print(1, flush=True); time.sleep(60)"
    )
    for directory, command in (("runs/test", "train"), ("cache", "cache"), ("prepared", "prepare")):
        holder = subprocess.Popen([sys.executable, "-c", script, tmp_path / "work" / directory], stdout=subprocess.PIPE)
        holder.stdout.readline()
        refused = ftk(command, run_file)
        assert refused.code == 4
        assert f"process {holder.pid}" in refused.err
        holder.kill()
        holder.communicate()
        assert ftk(command, run_file).code == 0
