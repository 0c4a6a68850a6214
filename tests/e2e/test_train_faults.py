"""`ftk train` under faults: killed anywhere, signalled, a full disk, flipped bits, two writers, no memory. Same bytes."""

import contextlib
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from killing import Server, server, torn
from test_cache_faults import FullDisk, small_disk
from world import World

from ftk import storage
from ftk.demo import draw_pictures
from ftk.models.qwen_image import QwenImage
from ftk.train import checkpoint, drawing, run_summary
from ftk.train.hooks.recorder import METRICS, VALIDATION, metrics_table, validation_table

pytestmark = pytest.mark.faults

STEPS, LONG = 6, 24
TIMES = ("seconds", "data_seconds", "memory_bytes")
OTHER = {".lock", "config.yaml", "environment.json", "report.json", METRICS}
MORE_CHECKPOINTS = ("--set", "train.keep_last=3", "--set", "train.schedule=constant")


@dataclass(frozen=True, eq=False)
class Scene:
    """A cache, and the ways to train from it. Read only but for `runs`, where every test has a run of its own."""

    run_file: Path
    runs: Path
    server: Server

    def arguments(self, name: str, *settings: object, steps: int = STEPS) -> tuple[object, ...]:
        return (self.run_file, "--set", f"run={name}", "--set", f"train.steps={steps}", *settings)

    def start(self, name: str, *settings: object, steps: int = STEPS, at: int = 0, by: int = signal.SIGKILL):
        return self.server.start("train", *self.arguments(name, *settings, steps=steps), at=at, by=by)

    def run(self, name: str, *settings: object, steps: int = STEPS, at: int = 0):
        running = self.start(name, *settings, steps=steps, at=at)
        running.wait()
        return running

    def begin(self, name: str) -> Path:
        """The empty place of a run."""
        shutil.rmtree(self.runs / name, ignore_errors=True)
        return self.runs / name

    @functools.cache  # noqa: B019  (one scene a module)
    def alone(self, *settings: object, steps: int = STEPS) -> dict[str, object]:
        """What a run leaves that nothing interrupts."""
        name = f"alone-{steps}-{storage.digest([str(one) for one in settings], 6)}"
        done = self.run(name, *settings, steps=steps)
        assert done.code == 0, done.err
        return results(self.runs / name)


@pytest.fixture(scope="module")
def scene(tmp_path_factory, tiny_model) -> Scene:
    place = tmp_path_factory.mktemp("train")
    draw_pictures(place / "pictures", 12)
    tree = {
        "run": "test",
        "workspace": str(place / "work"),
        "model": {"family": "qwen-image", "path": str(tiny_model)},
        "data": {"sources": [{"path": str(place / "pictures")}], "resolutions": [64], "workers": 1},
        "cache": {"text_dtype": "float32", "latents_dtype": "float32"},
        "method": {"name": "lora", "rank": 2, "dropout": 0.1},
        "train": {
            "steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3, "precision": "fp32",
            "checkpoint_every": 2, "keep_last": 1, "caption_dropout": 0.2, "seed": 5, "log_every": 2, "ema_decay": 0.9,
            "validation": {"share": 0.2, "every": 3, "sigmas": 1, "samples": 2}, "trackers": [],
        },
        "sample": {"prompts": ["a red circle"], "every": 3, "num_inference_steps": 1, "guidance_scale": 1.0},
        "card": {"title": "test"},
    }  # fmt: skip
    run_file = place / "run.yaml"
    run_file.write_text(yaml.safe_dump(tree))
    for command in ("prepare", "cache"):
        assert server().run(command, run_file).code == 0
    return Scene(run_file, place / "work/runs", server())


def results(run: Path) -> dict[str, object]:
    """All that a run leaves: the bytes of weights, checkpoints and images, and its history without the times."""
    found: dict[str, object] = {}
    for path in run.rglob("*"):
        name = str(path.relative_to(run))
        if path.is_file() and name not in OTHER:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    metrics = pq.read_table(run / METRICS)
    found[METRICS] = str(metrics.drop_columns(list(TIMES)).to_pylist())
    return found


def assert_one_is_whole(run: Path) -> None:
    """Once there is a checkpoint there is a whole one, at every instant."""
    folder = run / "checkpoints"
    if checkpoint.all_of(folder):
        assert checkpoint.latest(folder) is not None


def assert_completes(
    scene: Scene, name: str, *settings: object, steps: int = STEPS, where: object = "", but_for: Iterable[str] = ()
) -> None:
    done = scene.run(name, *settings, steps=steps)
    assert done.code == 0, (where, done.err)
    found, expected = results(scene.runs / name), scene.alone(*settings, steps=steps)
    other = {key for key in {*found, *expected} if found.get(key) != expected.get(key)}
    assert other <= set(but_for), (where, done.err)


def kill_and_repeat(scene: Scene, name: str, points: list[int]) -> None:
    for point in points:
        run = scene.begin(name)
        assert scene.run(name, at=point).code == -signal.SIGKILL, point
        assert_one_is_whole(run)
        assert_completes(scene, name, where=point)


@functools.cache
def num_touches(scene: Scene) -> int:
    scene.begin("counted")
    done = scene.run("counted")
    assert done.code == 0, done.err
    assert results(scene.runs / "counted") == scene.alone()
    return done.touches


def test_killed_at_touches_of_the_disk_a_second_run_completes_with_the_same_bytes(scene):
    touches = num_touches(scene)
    assert touches > 300
    # The last ones come between the last checkpoint and the report.
    points = [random.Random(1).randrange(touches // 4, touches // 2), touches - 45, touches - 25, touches - 12]
    kill_and_repeat(scene, "touched", points)


@pytest.mark.campaign
def test_killed_at_every_touch_of_the_disk(scene):
    touches, began = num_touches(scene), time.monotonic()
    kill_and_repeat(scene, "touched", list(range(1, touches + 1)))
    seconds = time.monotonic() - began
    print(f"{touches} kills, one at every touch of the disk; all completed with equal bytes; {seconds:.0f} s")


@pytest.mark.campaign
def test_a_hundred_kills_at_random_instants_end_with_the_same_bytes(scene):
    rng, began = random.Random(2), time.monotonic()
    scene.alone(steps=LONG)
    begun = time.monotonic()
    scene.begin("random")
    assert_completes(scene, "random", steps=LONG)
    seconds, kills, completed = time.monotonic() - begun, 0, 0
    while kills < 100:
        run = scene.begin("random")
        for _ in range(rng.randint(1, 5)):
            running = scene.start("random", steps=LONG)
            time.sleep(rng.uniform(0.1, 0.9) * seconds)
            with contextlib.suppress(ProcessLookupError):
                os.kill(running.pid, signal.SIGKILL)
            kills += running.wait() == -signal.SIGKILL
            assert_one_is_whole(run)
        assert_completes(scene, "random", steps=LONG, where=f"after {kills} kills")
        completed += 1
    print(f"{kills} random kills, {completed} completed runs, all equal; alone {seconds:.1f} s; "
          f"{time.monotonic() - began:.0f} s")  # fmt: skip


def signal_and_repeat(scene: Scene, name: str, point: int) -> int:
    """SIGTERM at a touch of the disk; then to the end."""
    run = scene.begin(name)
    stopped = scene.start(name, at=point, by=signal.SIGTERM)
    code = stopped.wait()
    # Before the loop, and after it, nothing needs saving.
    assert code in (0, 75, -signal.SIGTERM), (point, stopped.err)
    if code == 75:
        assert f"step {checkpoint.latest(run / 'checkpoints').step}, which is saved" in stopped.err, point
        assert not list(run.rglob(".tmp-*"))
    assert_completes(scene, name, where=point)
    return code


def test_a_signal_in_the_middle_of_a_save_lets_it_end(scene):
    assert signal_and_repeat(scene, "signalled", num_touches(scene) // 4) == 75


def test_signals_that_never_end_stop_a_run_once(scene):
    run = scene.begin("signals")
    running = scene.start("signals", steps=5000)
    while not checkpoint.all_of(run / "checkpoints"):
        time.sleep(0.005)
    for _ in range(20):
        with contextlib.suppress(ProcessLookupError):
            os.kill(running.pid, signal.SIGTERM)
        time.sleep(0.005)
    assert running.wait() == 75, running.err
    assert "Traceback" not in running.err
    assert f"step {checkpoint.latest(run / 'checkpoints').step}, which is saved" in running.err


@pytest.mark.campaign
def test_a_signal_at_every_fifth_touch_of_the_disk(scene):
    touches, began = num_touches(scene), time.monotonic()
    codes = Counter(signal_and_repeat(scene, "signalled", point) for point in range(1, touches + 1, 5))
    print(f"{codes.total()} signals: {dict(codes)}; all completed with equal bytes; {time.monotonic() - began:.0f} s")


def test_what_a_kill_left_out_after_the_last_checkpoint_is_made_up_for(scene):
    run = scene.begin("left-out")
    assert scene.run("left-out").code == 0
    best = checkpoint.best_step(run / "checkpoints")
    assert best == STEPS
    for name in ("adapter", "best"):
        shutil.rmtree(run / name)
    (run / f"samples/step-{STEPS:08d}.png").unlink()
    (run / "checkpoints/best.json").unlink()
    shutil.copytree(run / f"checkpoints/{STEPS:08d}", run / f"checkpoints/{STEPS - 2:08d}")
    assert_completes(scene, "left-out")


def train_together(scene: Scene, folder: Path, name: str, victim: int | None = None, delay: float = 0.0) -> tuple[bool, str]:
    """Train on two processes, and kill one of them `delay` seconds after the first step; whether it was killed in time."""
    world = World(2, folder, *scene.arguments(name, "--set", "train.timeout_seconds=20", steps=LONG))
    killed = False
    if victim is not None:
        before = sum(path.stat().st_size for path in folder.glob("2-*.jsonl"))
        while world.is_running and sum(path.stat().st_size for path in folder.glob("2-*.jsonl")) <= before:
            time.sleep(0.005)
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.kill(world.pids[victim], signal.SIGKILL)
    codes, err = world.end()
    if victim is not None:
        killed = codes[victim] == -signal.SIGKILL
        # The other one may have done its last step when the first one went.
        assert codes[1 - victim] in ((75, 0) if killed else (0,)), (codes, err)
    else:
        assert codes == [0, 0], err
    return killed, err


def kill_one_of_two(scene: Scene, place: Path, wanted: int, longest: float) -> tuple[int, int]:
    train_together(scene, place / "alone", "two-alone")
    expected, rng, kills, completed = results(scene.runs / "two-alone"), random.Random(4), 0, 0
    while kills < wanted:
        run = scene.begin("two")
        for _ in range(min(rng.randint(1, 3), wanted - kills)):
            kills += train_together(scene, place / "two", "two", rng.randrange(2), rng.uniform(0.0, longest))[0]
            assert_one_is_whole(run)
        train_together(scene, place / "two", "two")
        assert results(run) == expected, f"after {kills} kills"
        completed += 1
    return kills, completed


@pytest.mark.campaign
def test_one_of_two_processes_killed_at_random_instants(scene, tmp_path):
    began = time.monotonic()
    kills, completed = kill_one_of_two(scene, tmp_path, 10, 2.0)
    print(f"{kills} kills of one of two processes, {completed} completed runs, all equal; {time.monotonic() - began:.0f} s")


def fill_the_disk(scene: Scene, ftk: Callable, name: str, at: int) -> bool:
    """Train with a disk that is full from a write on, then free it; False when the run has fewer writes."""
    run = scene.begin(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "committing", torn(storage.committing, FullDisk(at)))
        result = ftk("train", *scene.arguments(name))
    if result.code == 0:
        return False
    assert result.code == 4, at
    assert "disk is full" in result.err
    assert "run the same command again" in result.err
    assert not list(run.rglob(".tmp-*"))
    assert_one_is_whole(run)
    assert_completes(scene, name, where=at)
    return True


def test_a_full_disk_is_said_and_the_run_goes_on_once_there_is_room(scene, ftk):
    assert all(fill_the_disk(scene, ftk, "full", at) for at in (1, 14, 30))


def test_a_disk_that_really_is_full_is_said_and_the_run_goes_on(scene, ftk, tmp_path):
    with small_disk(tmp_path / "disk", 100):
        shutil.copytree(scene.runs.parent / "cache", tmp_path / "cache")
        settings = (*scene.arguments("small"), "--workspace", tmp_path / "disk", "--set", f"cache.path={tmp_path / 'cache'}")
        result = ftk("train", *settings)
        assert result.code == 4
        assert "disk is full" in result.err
        assert_one_is_whole(tmp_path / "disk/runs/small")
        subprocess.run(["mount", "-o", "remount,size=16m", tmp_path / "disk"], check=True)
        assert ftk("train", *settings).code == 0
        assert results(tmp_path / "disk/runs/small") == scene.alone()


@pytest.mark.campaign
def test_a_disk_that_is_full_at_every_write(scene, ftk):
    at, began = 1, time.monotonic()
    while fill_the_disk(scene, ftk, "full", at):
        at += 1
    print(f"the disk was full at each of {at - 1} writes; all said so and completed; {time.monotonic() - began:.0f} s")


@pytest.fixture(scope="module")
def stopped(scene) -> Path:
    """A run with three checkpoints, to be copied and damaged; read only."""
    done = scene.run("stopped", *MORE_CHECKPOINTS)
    assert done.code == 0, done.err
    assert [int(path.name) for path in checkpoint.all_of(scene.runs / "stopped/checkpoints")] == [3, 4, 6]
    return scene.runs / "stopped"


def copied(scene: Scene, source: Path, name: str) -> Path:
    run = scene.begin(name)
    shutil.copytree(source, run)
    return run


def flip(path: Path, rng: random.Random) -> tuple[int, int]:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(data)), rng.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return place, bit


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_named_and_the_one_before_is_used(scene, stopped, caplog):
    run, rng = copied(scene, stopped, "flipped"), random.Random(6)
    files = sorted((run / "checkpoints/00000006").iterdir())
    assert len(files) == 4
    for number in range(100):
        path = files[number % 4]
        whole = path.read_bytes()
        where = flip(path, rng)
        caplog.clear()
        assert checkpoint.latest(run / "checkpoints").step == 4, (path, where)
        assert f"{path.parent} is damaged" in caplog.text
        path.write_bytes(whole)
    assert checkpoint.latest(run / "checkpoints").step == 6


@pytest.mark.parametrize("num_damaged", [1, 3])
def test_a_run_goes_on_from_before_the_damage_to_the_same_bytes(scene, stopped, num_damaged):
    run, rng = copied(scene, stopped, "damaged"), random.Random(7)
    damaged = checkpoint.all_of(run / "checkpoints")[-num_damaged:]
    for path, name in zip(damaged, ("adapter.safetensors", "optimizer.safetensors", "trainer.json"), strict=False):
        flip(path / name, rng)
    done = scene.run("damaged", *MORE_CHECKPOINTS, steps=8)
    assert done.code == 0, done.err
    assert all(f"{path} is damaged" in done.err for path in damaged)
    assert ("no checkpoint is whole" in done.err) == (num_damaged == 3)
    assert results(run) == scene.alone(*MORE_CHECKPOINTS, steps=8)


@pytest.mark.campaign
def test_a_hundred_flipped_bits_in_checkpoints_end_with_the_same_bytes(scene, stopped):
    rng, began = random.Random(8), time.monotonic()
    scene.alone(*MORE_CHECKPOINTS, steps=8)
    for _ in range(100):
        run = copied(scene, stopped, "damaged")
        path = rng.choice([file for one in checkpoint.all_of(run / "checkpoints") for file in sorted(one.iterdir())])
        where = (path, flip(path, rng))
        # A run goes on from the newest; an older one that is kept stays as it is.
        kept = {str(path.relative_to(run))} if path.parent != checkpoint.all_of(run / "checkpoints")[-1] else set()
        assert_completes(scene, "damaged", *MORE_CHECKPOINTS, steps=8, where=where, but_for=kept)
    print(f"100 flipped bits in checkpoints; all completed with equal bytes; {time.monotonic() - began:.0f} s")


@pytest.mark.parametrize("contents", [b"", b"damaged"])
@pytest.mark.parametrize("name", [METRICS, VALIDATION, "checkpoints/best.json", "config.yaml", "trackers.json"])
def test_a_damaged_history_is_said_and_costs_nothing_else(scene, stopped, ftk, name, contents):
    run = copied(scene, stopped, "history")
    (run / name).write_bytes(contents or b"\xff\x00")
    if name != "trackers.json":
        looked = ftk("inspect", run)
        assert looked.code == 0
        assert f"{name} is damaged" in looked.err
    done = scene.run("history", *MORE_CHECKPOINTS, steps=8)
    assert done.code == 0, done.err
    if name not in ("config.yaml", "trackers.json"):
        assert f"{name} is damaged" in done.err
    found, expected = results(run), scene.alone(*MORE_CHECKPOINTS, steps=8)
    other = {key for key in {*found, *expected} if found.get(key) != expected.get(key)}
    assert other <= {name}
    assert json.loads((run / "checkpoints/best.json").read_text())["step"] == 8


@pytest.mark.parametrize("is_lost", [True, False])
def test_the_best_step_is_known_by_its_log_and_where_that_is_lost_by_its_note(scene, stopped, is_lost):
    run = copied(scene, stopped, "best")
    checkpoint.mark_best(run / "checkpoints", 3, 0.0)
    if is_lost:
        (run / VALIDATION).unlink()
    done = scene.run("best", *MORE_CHECKPOINTS, "--set", "train.keep_last=1", steps=8)
    assert done.code == 0, done.err
    assert ("noted again" in done.err) == (not is_lost)
    assert checkpoint.best_step(run / "checkpoints") == (3 if is_lost else 8)
    assert [int(path.name) for path in checkpoint.all_of(run / "checkpoints")] == ([3, 8] if is_lost else [8])
    rows = [(row["step"], row["is_best"]) for row in validation_table(run).to_pylist()]
    assert rows == ([(3, True), (8, False)] if is_lost else [(0, False), (3, True), (6, True), (8, True)])


def test_a_copy_that_somebody_keeps_beside_the_checkpoints_is_left_alone(scene, stopped, ftk):
    run = copied(scene, stopped, "copy")
    mine = run / "checkpoints/00000003-mine"
    (run / "checkpoints/00000003").rename(mine)
    done = scene.run("copy", *MORE_CHECKPOINTS, "--set", "train.keep_last=1", steps=8)
    assert done.code == 0, done.err
    assert mine.is_dir()
    assert ftk("inspect", run).code == 0


def flip_history(run: Path, place: Path, count: int) -> Counter:
    """Flip bits of the history, one at a time; what is read may be wrong, but nothing fails."""
    shutil.copytree(run, place)
    rng, seen = random.Random(9), Counter()
    for number in range(count):
        path = place / (METRICS, VALIDATION, "checkpoints/best.json", "config.yaml")[number % 4]
        whole = path.read_bytes()
        where = (path.name, flip(path, rng))
        try:
            run_summary.summarise(place, verify=False)
            rows = len(metrics_table(place)), len(validation_table(place))
        except Exception as error:
            raise AssertionError(where) from error
        seen[path.name, "read" if all(rows) else "refused"] += 1
        path.write_bytes(whole)
    return seen


def test_a_flipped_bit_of_the_history_stops_nothing(stopped, tmp_path):
    seen = flip_history(stopped, tmp_path / "run", 100)
    assert seen[METRICS, "refused"] > 5


@pytest.mark.campaign
def test_two_thousand_flipped_bits_of_the_history_stop_nothing(stopped, tmp_path):
    began = time.monotonic()
    print(dict(flip_history(stopped, tmp_path / "run", 2_000)), f"{time.monotonic() - began:.0f} s")


def race(scene: Scene, delay: float) -> list[int]:
    run = scene.begin("raced")
    writers = [scene.start("raced")]
    time.sleep(delay)
    writers.append(scene.start("raced"))
    codes = [one.wait() for one in writers]
    for one in writers:
        if one.code == 4:
            assert f"{run} is being written by" in one.err
            assert "Wait for it to end" in one.err
    assert results(run) == scene.alone()
    return sorted(codes)


def test_of_two_writers_the_second_is_told(scene):
    assert race(scene, 0.0) == race(scene, 0.3) == [0, 4]


@pytest.mark.campaign
def test_twenty_races_of_two_writers(scene):
    rng = random.Random(10)
    outcomes = Counter(tuple(race(scene, rng.choice([0.0, rng.uniform(0, 0.02), rng.uniform(0, 0.8)]))) for _ in range(20))
    assert set(outcomes) <= {(0, 4), (0, 0)}
    assert outcomes[0, 4] > 15
    print(f"20 races: {dict(outcomes)}, all with equal bytes")


def test_a_device_without_memory_left_is_told_what_to_change(scene, ftk, monkeypatch):
    scene.begin("memory")
    plain, calls = QwenImage.predict, []

    def predict(self, *arguments, **options):
        calls.append(1)
        if len(calls) > 9:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nAnd more.")
        return plain(self, *arguments, **options)

    monkeypatch.setattr(QwenImage, "predict", predict)
    result = ftk("train", *scene.arguments("memory"), "--set", "train.memory.device_gib=2")
    assert result.code == 4
    message = result.err[result.err.rindex("ftk: ") :]
    assert "Step 4: CUDA out of memory" in message
    for part in ("budget of 2.0 GiB", "2 image(s) of", "px", "train.memory.checkpointing: all",
                 "train.micro_batch_size: 1", "data.resolutions"):  # fmt: skip
        assert part in message
    monkeypatch.undo()
    assert_completes(scene, "memory")


MISTAKES = [
    (["train.step=5"], "`train.step` is not a setting. Did you mean `steps`?"),
    (["train.validation.patiense=2"], "Did you mean `patience`?"),
    (["train.memory.checkpoint=all"], "Did you mean `checkpointing`?"),
    (["train.sigma.sampling=lognormal"], "'logit_normal'"),
    (["train.optimizer=adamv"], "there is no optimizer 'adamv'. Did you mean `adamw`?"),
    (["train.optimizer=torch.optim.Adamm"], "Did you mean `Adam`?"),
    (["train.optimizer={name: adamw, beta: 0.9}"], "adamw has no such setting. Did you mean `betas`?"),
    (["train.optimizer={name: adamw, betas: 0.9}"], "does not accept its settings"),
    (["train.optimizer={name: adamw, groups: [{match: '(lora'}]}"], "is not a regular expression"),
    (["train.optimizer={name: adamw, groups: [{match: other, learning_rate: 1}]}"], "'other' matches no trained parameter"),
    (["train.schedule=cosin"], "'cosine'"),
    (["train.schedule={name: piecewise_constant, rules: '1:100;0.1'}"], "`rules` is FACTOR:STEP"),
    (["train.schedule={name: cosine, rules: '1:100,0.1'}"], "no effect without `name: piecewise_constant`"),
    (["train.validation={patience: 3}"], "`patience` has no effect without `share`"),
    (["train.validation.share=0.6"], "less than or equal to 0.5"),
    (["train.global_batch_size=1"], "micro_batch_size 2 is larger than global_batch_size 1"),
    (["train.class_ratio=1"], "the cache holds no class images"),
    (["train.remainder=drop", "train.micro_batch_size=12", "train.global_batch_size=12"], "drop leaves nothing"),
    (["train.trackers=[tensorbord]"], "Did you mean `tensorboard`?"),
    (["method.targets=atention"], "no group 'atention'"),
    (["method.rang=4"], "Did you mean `rank`?"),
    (["sample.prompts=[a blue square]"], "sample.prompts: 'a blue square' is not in the cache. Run `ftk cache"),
    (["sample.width=100"], "needs multiples of 16 px"),
    (["train.steps.x=3"], "train.steps is a value, not a section"),
]


@pytest.mark.parametrize(("settings", "message"), MISTAKES)
def test_a_mistake_in_the_run_file_is_said_before_anything_is_trained(scene, ftk, settings, message):
    run = scene.begin("mistaken")
    result = ftk("train", *scene.arguments("mistaken"), *(part for setting in settings for part in ("--set", setting)))
    assert result.code == 2
    assert message in result.err
    assert not list(run.rglob("*.safetensors"))
    assert "validation loss" not in result.err


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is ''"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR and MASTER_PORT not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "ranks count from 0 to 1"),
    ],
)
def test_a_launcher_that_says_too_little_is_told_what_is_missing(scene, ftk, monkeypatch, environment, message):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = ftk("train", *scene.arguments("launched"))
    assert result.code == 2
    assert message in result.err


def test_the_last_checkpoint_comes_before_the_last_pictures(cached, ftk, tmp_path, monkeypatch):
    run_file = cached(train={"steps": 2, "checkpoint_every": 100}, sample={"every": 2})
    saved = []
    plain = drawing.generate

    def generate(*arguments):
        saved.extend(path.name for path in (tmp_path / "work/runs/test/checkpoints").iterdir())
        return plain(*arguments)

    monkeypatch.setattr(drawing, "generate", generate)
    assert ftk("train", run_file).code == 0
    assert saved == ["00000002"]


def test_a_signal_while_pictures_are_drawn_saves_first_and_the_resumed_run_draws_them(cached, ftk, tmp_path, monkeypatch):
    run_file = cached(train={"steps": 4, "checkpoint_every": 100}, sample={"every": 2, "prompts": ["a red circle", "stars"]})
    plain, drawn = drawing.generate, []

    def generate(*arguments):
        drawn.append(arguments[-1])
        if len(drawn) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments)

    monkeypatch.setattr(drawing, "generate", generate)
    run = tmp_path / "work/runs/test"
    assert ftk("train", run_file).code == 75
    assert (drawn, [path.name for path in (run / "checkpoints").iterdir()]) == ([0], ["00000002"])
    assert not list((run / "samples").glob("*"))
    assert ftk("train", run_file).code == 0
    assert drawn == [0, 0, 1, 0, 1]
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step-00000002.png", "step-00000004.png"]
