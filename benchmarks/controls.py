"""How well each method learns to follow a control image.

The small model that comes with ftk learns from scenes whose captions tell no places and no sizes, with the outlines of things
as control images. It then draws scenes that nothing was trained on, and a program reads the pictures: with the control image
of the scene, with that of another scene of the same size (what caption and chance do), and with the scene's at half strength.

    place       the share of things that are at the scene's place
    size        the share that have the scene's size; shape and colour alike
    px          how far a thing is from where it is to be, the mean over pictures of one thing
"""

import argparse
import gc
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# First: it settles how many threads torch may use.
import train_setup as setup  # isort: skip
import torch
import yaml
from train_setup import spread, spread_text

from ftk import storage
from ftk.cache import stage as cache
from ftk.configs.load import RECIPES, validate
from ftk.configs.schema import RunConfig
from ftk.deliver.run_delivery import RunDelivery
from ftk.demo import evaluate, lesson, steering, world
from ftk.pipeline import stage as prepare
from ftk.progress import track
from ftk.run import Run, resolve
from ftk.train import stage as train

NUM_PICTURES = 600
SAMPLING = evaluate.Sampling()
HALF = 0.5
SHOWN = {
    "place": (100, 0, "%"),
    "size": (100, 0, "%"),
    "shape": (100, 0, "%"),
    "colour": (100, 0, "%"),
    "distance_px": (1, 1, ""),
}
"""Measures by their fields, with factor, digits and unit of the tables."""
MEASURED = {"right": "its own control", "shuffled": "another scene's", "half": "its own at half strength"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A method with its settings, learning rate and steps."""

    method: Mapping[str, Any]
    rate: float
    steps: int


ARMS: Mapping[str, Arm] = {
    "ControlNet, 2 blocks": Arm(method={"name": "controlnet", "blocks": 2}, rate=3e-3, steps=200),
    "Control LoRA, rank 32": Arm(method={"name": "control-lora", "rank": 32}, rate=5e-3, steps=200),
    "T2I-Adapter": Arm(method={"name": "t2i-adapter"}, rate=3e-3, steps=400),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One run. `right`, `shuffled` and `half` are `steering.Agreement`s, by their fields."""

    arm: str
    seed: int
    steps: int
    num_parameters: int
    cpu_seconds: float
    right: Mapping[str, float]
    shuffled: Mapping[str, float]
    half: Mapping[str, float]


def make_run(root: Path, arm: Arm, *, seed: int, name: str) -> Run:
    """The demo's run with another method; those that read pixels have a cache of their own."""
    tree: dict[str, Any] = yaml.safe_load((RECIPES / steering.RECIPE).read_text())
    kind = "pixels" if arm.method["name"] == "t2i-adapter" else "latents"
    tree |= {"run": name, "workspace": str(root / kind), "method": arm.method}
    tree["model"]["path"] = str(lesson.MODEL)
    tree["data"]["sources"][0] |= {"path": str(root / "pictures"), "controls": [str(root / "pictures" / world.EDGES)]}
    tree["train"] |= {"steps": arm.steps, "learning_rate": arm.rate, "seed": seed, "checkpoint_every": arm.steps}
    return resolve(validate(RunConfig, tree, "benchmarks/controls.py"))


def set_up(root: Path, num_pictures: int, names: Sequence[str]) -> None:
    """Pictures with control images, prepared and cached in each form that is read."""
    world.write_steered(root / "pictures", num_pictures, seed=5)
    for name in names:
        run = make_run(root, ARMS[name], seed=0, name="x")
        prepare.run(run)
        cache.run(run)


def learn(root: Path, name: str, seed: int, num_scenes: int) -> Point:
    """One run, and what it draws."""
    torch.set_num_threads(1)
    run = make_run(root, ARMS[name], seed=seed, name=f"{list(ARMS).index(name)}-{seed}")
    started = time.process_time()
    report = train.run(run, RunDelivery)
    cpu_seconds = time.process_time() - started
    assert report is not None
    gc.collect()
    scenes = steering.held_out(num_scenes)
    pipeline = run.method.load_into(run.family, steering.base_pipeline(run), run.paths.adapter)

    def read(controls: Sequence[Any], **options: Any) -> dict[str, float]:
        pictures = steering.draw(pipeline, run, scenes, controls, SAMPLING, **options)
        return asdict(steering.agreement(pictures, scenes))

    return Point(
        arm=name, seed=seed, steps=report.step, num_parameters=report.num_trainable_parameters, cpu_seconds=cpu_seconds,
        right=read(scenes), shuffled=read(steering.shuffled(scenes)), half=read(scenes, strength=HALF),
    )  # fmt: skip


def learn_all(root: Path, options: argparse.Namespace, done: Sequence[Point], keep: Callable[[list[Point]], None]) -> None:
    """All runs that are not done yet, `--jobs` at a time, each in a process with one thread; `keep` gets all points so far."""
    have = {(point.arm, point.seed) for point in done}
    tasks = [
        (root, name, seed, options.scenes)
        for seed in range(options.seeds)
        for name in options.method
        if (name, seed) not in have
    ]
    points = list(done)
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawning) as pool, track("learn", len(tasks), "run") as progress:
        for point in pool.map(_learn, tasks):
            points.append(point)
            keep(points)
            progress.advance(1, f"{point.arm}: place {point.right['place']:.2f}, shuffled {point.shuffled['place']:.2f}")


def _learn(task: tuple[Path, str, int, int]) -> Point:
    return learn(*task)


def base_row(num_scenes: int) -> dict[str, float]:
    """What the model draws from captions alone."""
    scenes, run = steering.held_out(num_scenes), make_run(Path(), ARMS["Control LoRA, rank 32"], seed=0, name="x")
    pictures = evaluate.draw(steering.base_pipeline(run), run.family, scenes, SAMPLING)
    return asdict(steering.agreement(pictures, scenes))


def markdown(report: Mapping[str, Any]) -> str:
    """The table of docs/methods.md."""
    points = [Point(**point) for point in report["points"]]
    head = ["method", "trained", "steps", "CPU s", "drawn with", "place", "size", "shape", "colour", "px"]
    rows = [head, ["---", *["---:"] * 3, "---", *["---:"] * len(SHOWN)]]
    rows.append(["the base model", "", "", "", "no control", *_cells([report["base"]])])
    for name in dict.fromkeys(point.arm for point in points):
        of_arm = [point for point in points if point.arm == name]
        seconds = spread_text(spread([point.cpu_seconds for point in of_arm]), 1, 0)
        facts = [name, f"{of_arm[0].num_parameters:,}", str(of_arm[0].steps), seconds]
        for field, title in MEASURED.items():
            rows.append([*facts, title, *_cells([getattr(point, field) for point in of_arm])])
            facts = [""] * len(facts)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cells(measured: Sequence[Mapping[str, float]]) -> list[str]:
    return [
        spread_text(spread([each[name] for each in measured]), scale, digits) + unit
        for name, (scale, digits, unit) in SHOWN.items()
    ]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--method", choices=tuple(ARMS), action="append", help="may be given several times; all by default")
    parser.add_argument("--seeds", type=int, default=2, help="runs with other weights and noise")
    parser.add_argument("--scenes", type=int, default=48, help="that are drawn, three times")
    parser.add_argument("--pictures", type=int, default=NUM_PICTURES, help="to learn from")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    kept = "keep the numbers and the machine's facts here; what FILE has is not measured again"
    parser.add_argument("--json", type=Path, metavar="FILE", help=kept)
    options = parser.parse_args(arguments)
    if min(options.seeds, options.scenes, options.pictures, options.jobs) < 1:
        parser.error("--seeds, --scenes, --pictures and --jobs are at least 1")
    options.method = options.method or list(ARMS)
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for and is not in the file yet."""
    asked = {name: getattr(options, name) for name in ("scenes", "pictures")}
    report = json.loads(options.json.read_text()) if options.json and options.json.exists() else {"asked": asked, "points": []}
    if report["asked"] != asked:
        raise SystemExit(f"{options.json} was measured with {report['asked']}, not {asked}: name another file.")
    report |= {"machine": setup.machine(torch.device("cpu")), "jobs": options.jobs}

    def keep(points: list[Point]) -> None:
        report.update(points=[asdict(point) for point in points], arms={each.arm: asdict(ARMS[each.arm]) for each in points})
        if options.json:
            storage.commit_json(options.json, report)

    with tempfile.TemporaryDirectory(prefix="ftk-bench-") as folder:
        root = Path(folder)
        set_up(root, options.pictures, options.method)
        report.setdefault("base", base_row(options.scenes))
        learn_all(root, options, [Point(**point) for point in report["points"]], keep)
    return report


def main() -> None:
    """Measure, keeping each run's numbers where they are asked for, and print the table."""
    options = parse_arguments()
    print(markdown(run(options)))
    print("\nMedians over the seeds, with least and greatest in brackets; CPU seconds of training by one thread.")


if __name__ == "__main__":
    main()
