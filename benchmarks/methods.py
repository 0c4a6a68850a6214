"""How well each method learns one thing, and what the model forgets meanwhile.

The small model that comes with ftk learns the creature of its demo from a dozen pictures: every method, at several learning
rates, with the same pictures, steps, batches and noise. After a half and all of the steps the model draws scenes
that nothing was trained on, and a program reads the pictures. It is a model of 2 million parameters: the methods' order here is
a hint for a model of 20 billion, not a promise.

    likeness    how much of the creature's look is in pictures of captions with its word, 0 to 1
    told        the share of what these captions tell that is there: creature, its place and size, ground, other things
    kept        the share of what captions without the word tell that is there
    changed     how far pictures of captions without the word moved from the base model's: mean of absolute levels, of 255
    confused    the share of pictures of another creature's name in which it is seen
"""

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# First: it settles how many threads torch may use.
import train_setup as setup  # isort: skip
import numpy as np
import torch
import yaml
from PIL import Image
from train_setup import spread, spread_text

from ftk import storage
from ftk.cache import stage as cache
from ftk.configs.load import RECIPES, validate
from ftk.configs.schema import RunConfig
from ftk.deliver.run_delivery import RunDelivery
from ftk.demo import checker, evaluate, lesson, world
from ftk.models import base as models
from ftk.pipeline import stage as prepare
from ftk.progress import track
from ftk.run import Run, resolve
from ftk.train import stage as train
from ftk.train.sheet import png_bytes

CPU = torch.device("cpu")
NUM_PICTURES = 12
NUM_CLASS_IMAGES = 96
PARTS = (0.5, 1.0)
REFERENCE = "LoRA, rank 16"
SAMPLING = evaluate.Sampling(guidance_scale=2.0)
SHOWN = {"likeness": (1, 2, ""), "told": (100, 0, "%"), "kept": (100, 0, "%"), "changed": (1, 1, ""), "confused": (100, 0, "%")}
"""Measures by their fields, with factor, digits and unit of the tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A method with its settings, the middle of its learning rates, whether class images are mixed in, and what is preserved.

    `preservation` is `train.loss.preservation`; its captions and those of others are cached apart, and so are captions with new
    words.
    """

    method: Mapping[str, Any]
    rate: float
    has_class_images: bool = False
    preservation: Mapping[str, Any] | None = None

    @property
    def workspace(self) -> str:
        """The folder of what is prepared and cached, which arms with the same texts share."""
        words = self.method.get("tokens") or self.method.get("words", {}).get("tokens")
        if words or self.has_class_images:
            return ("with-class" if self.has_class_images else "alone") + (f"-{storage.digest(words)[:8]}" if words else "")
        return "alone" if self.preservation is None else f"preserving-{storage.digest(self.preservation)[:8]}"


OTHER = "zoka"
"""A creature's name that no picture has."""
_LORA = {"name": "lora", "rank": 16, "targets": "all-linear"}
_OFT = {"name": "oft", "block_size": 16, "targets": "all-linear"}
_WORD = {"tokens": {world.CREATURE: {"vectors": 4}}}
_CUSTOM = {"name": "custom-diffusion"}
ARMS: Mapping[str, Arm] = {
    REFERENCE: Arm(method=_LORA, rate=3e-3),
    "LoRA, rank 4": Arm(method={**_LORA, "rank": 4}, rate=3e-3),
    "LoRA, rank 16, attention": Arm(method={**_LORA, "targets": "attention"}, rate=3e-3),
    # Without the modulations: the last block's have rows of zeros, see docs/methods.md.
    "LoRA, rank 16, DoRA": Arm(method={**_LORA, "targets": "attention+mlp", "dora": True}, rate=3e-3),
    "OFT, blocks of 16": Arm(method=_OFT, rate=1e-3),
    "OFT, blocks of 16, COFT": Arm(method={**_OFT, "coft": True, "eps": 1.0}, rate=3e-3),
    "BOFT, blocks of 4": Arm(method={"name": "boft", "block_size": 4, "targets": "all-linear"}, rate=6e-3),
    "LoHa, rank 8": Arm(method={"name": "loha", "rank": 8, "targets": "all-linear"}, rate=1e-2),
    "LoKr, rank 16": Arm(method={"name": "lokr", "rank": 16, "targets": "all-linear"}, rate=1e-2),
    "MiSS, r 16": Arm(method={"name": "peft", "type": "MISS", "r": 16, "targets": "all-linear"}, rate=3e-3),
    "HRA, r 8": Arm(method={"name": "peft", "type": "HRA", "r": 8, "targets": "all-linear"}, rate=3e-3),
    "full": Arm(method={"name": "full"}, rate=3e-4),
    "textual inversion, 4 vectors": Arm(method={"name": "textual-inversion", **_WORD}, rate=5e-2),
    "textual inversion, LoRA of rank 16": Arm(
        method={"name": "textual-inversion", **_WORD, "rate": 5.0, "lora": {"rank": 16, "targets": "all-linear"}}, rate=3e-3
    ),
    "Custom Diffusion, class images": Arm(method=_CUSTOM, rate=1e-2, has_class_images=True),
    "Custom Diffusion with a new word, class images": Arm(
        method={**_CUSTOM, "words": {**_WORD, "rate": 5.0}}, rate=1e-2, has_class_images=True
    ),
    "Custom Diffusion, rank 8, class images": Arm(method={**_CUSTOM, "rank": 8}, rate=1e-2, has_class_images=True),
    "LoRA, rank 16, class images": Arm(method=_LORA, rate=3e-3, has_class_images=True),
    "OFT, blocks of 16, class images": Arm(method=_OFT, rate=1e-3, has_class_images=True),
    "full, class images": Arm(method={"name": "full"}, rate=3e-4, has_class_images=True),
    "LoRA, rank 16, preserves another name": Arm(method=_LORA, rate=3e-3, preservation={"replace": {world.CREATURE: OTHER}}),
    "LoRA, rank 16, preserves no text": Arm(method=_LORA, rate=3e-3, preservation={"prompt": ""}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One run after some of its steps."""

    arm: str
    rate: float
    seed: int
    steps: int
    num_parameters: int
    seconds_a_step: float
    likeness: float
    told: float
    kept: float
    changed: float
    confused: float


def make_run(root: Path, arm: Arm, *, rate: float, seed: int, steps: int, name: str) -> Run:
    """The demo's run with another method; those with and those without class images share what is prepared and cached."""
    tree: dict[str, Any] = yaml.safe_load((RECIPES / "demo.yaml").read_text())
    tree |= {"run": name, "workspace": str(root / arm.workspace), "method": arm.method}
    tree["model"]["path"] = str(lesson.MODEL)
    tree["data"]["sources"][0]["path"] = str(root / "pictures")
    tree["data"]["sources"][1]["path"] = str(root / "class")
    training = tree["train"]
    training |= {"steps": steps, "learning_rate": rate, "seed": seed, "checkpoint_every": steps, "log_every": steps}
    training["schedule"] = {"name": "constant", "warmup": 20}  # a shorter run is a part of a longer one
    del training["validation"], tree["sample"]
    if arm.preservation is not None:
        training["loss"] = {"preservation": dict(arm.preservation)}
    if not arm.has_class_images:
        del tree["data"]["sources"][1], training["class_ratio"]
    return resolve(validate(RunConfig, tree, "benchmarks/methods.py"))


def set_up(root: Path, num_scenes: int) -> None:
    """Pictures, class images, both caches, and what the base model draws."""
    world.write_concept(root / "pictures", NUM_PICTURES, seed=1)
    pipeline = _pipeline()
    family = models.get(lesson.FAMILY)
    evaluate.write_class_images(root / "class", NUM_CLASS_IMAGES, pipeline, family, SAMPLING)
    for index, picture in enumerate(_draw(pipeline, evaluate.held_out(num_scenes))):
        storage.commit_bytes(root / "base" / f"{index:03d}.png", png_bytes(picture))
    for arm in {arm.workspace: arm for arm in ARMS.values()}.values():
        made = make_run(root, arm, rate=1e-3, seed=0, steps=1, name="x")
        prepare.run(made)
        cache.run(made)


def _pipeline() -> Any:
    return models.get(lesson.FAMILY).pipeline(lesson.MODEL, torch.float32, CPU)


def _draw(pipeline: Any, scenes: Sequence[Any]) -> list[Image.Image]:
    return evaluate.draw(pipeline, models.get(lesson.FAMILY), scenes, SAMPLING)


def learn(root: Path, name: str, rate: float, seed: int, steps: int, num_scenes: int) -> list[Point]:
    """One run, looked at after each part of its steps."""
    torch.set_num_threads(1)
    arm, found = ARMS[name], []
    label = f"{list(ARMS).index(name)}-{rate:g}-{seed}"
    for part in PARTS:
        done = make_run(root, arm, rate=rate, seed=seed, steps=round(part * steps), name=label)
        report = train.run(done, RunDelivery)
        assert report is not None
        found.append(
            Point(
                arm=name, rate=rate, seed=seed, steps=report.step, num_parameters=report.num_trainable_parameters,
                seconds_a_step=report.seconds_per_step, **_read(root, done, num_scenes),
            )
        )  # fmt: skip
        gc.collect()
    return found


def _read(root: Path, done: Run, num_scenes: int) -> dict[str, float]:
    """What the trained model draws, read back."""
    pipeline = _pipeline()
    done.method.load_into(done.family, pipeline, done.paths.adapter)
    base = [Image.open(path).convert("RGB") for path in sorted((root / "base").glob("*.png"))]
    return _measures(pipeline, num_scenes, base)


def _measures(pipeline: Any, num_scenes: int, base: Sequence[Image.Image]) -> dict[str, float]:
    with_word, without = evaluate.held_out_concept(num_scenes), evaluate.held_out(num_scenes)
    taught, others = _draw(pipeline, with_word), _draw(pipeline, without)
    creatures = _draw(pipeline, evaluate.held_out_creatures(num_scenes // 2))
    return {
        "likeness": evaluate.likeness(taught),
        "told": evaluate.agreement(taught, with_word)["all"],
        "kept": evaluate.agreement(others, without)["all"],
        "changed": statistics.fmean(_difference(*pair) for pair in zip(others, base, strict=True)) if base else 0.0,
        "confused": statistics.fmean(checker.similarity(picture) >= checker.RECOGNISED for picture in creatures),
    }


def _difference(first: Image.Image, second: Image.Image) -> float:
    return float(np.abs(np.asarray(first, np.float64) - np.asarray(second, np.float64)).mean())


def rates(arm: Arm, factors: Sequence[float]) -> list[float]:
    """The learning rates that an arm is tried with."""
    return [float(f"{arm.rate * factor:.2g}") for factor in factors]


def learn_all(root: Path, options: argparse.Namespace, done: Sequence[Point], keep: Callable[[list[Point]], None]) -> None:
    """All runs that are not done yet, `--jobs` at a time, each in a process with one thread; `keep` gets all points so far."""
    have = {(point.arm, point.rate, point.seed) for point in done}
    tasks = [
        (root, name, rate, seed, options.steps, options.scenes)
        for seed in range(options.seeds)
        for name in options.method
        for rate in rates(ARMS[name], options.factors)
        if (name, rate, seed) not in have
    ]
    found = list(done)
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawning) as pool, track("learn", len(tasks), "run") as progress:
        for points in pool.map(_learn, tasks):
            found += points
            keep(found)
            progress.advance(1, f"{points[-1].arm}: likeness {points[-1].likeness:.2f}, kept {points[-1].kept:.2f}")


def _learn(task: tuple[Path, str, float, int, int, int]) -> list[Point]:
    return learn(*task)


def best_rate(points: Sequence[Point], name: str) -> float:
    """The learning rate at whose end an arm has most of likeness and kept together, over all seeds."""
    by_rate: dict[float, list[float]] = {}
    for point in _last([one for one in points if one.arm == name]):
        by_rate.setdefault(point.rate, []).append(point.likeness + point.kept)
    return max(by_rate, key=lambda rate: statistics.fmean(by_rate[rate]))


def kept_at(points: Sequence[Point], name: str, likeness: float) -> list[float]:
    """Of each seed, the most that an arm keeps at any rate and step at which it has at least this likeness."""
    found = []
    for seed in sorted({point.seed for point in points}):
        reached = [one.kept for one in points if (one.arm, one.seed) == (name, seed) and one.likeness >= likeness]
        if reached:
            found.append(max(reached))
    return found


def base_row(num_scenes: int) -> dict[str, float]:
    """What the model draws before it learns anything."""
    return _measures(_pipeline(), num_scenes, [])


def markdown(report: Mapping[str, Any]) -> str:
    """The tables of docs/methods.md."""
    points = [Point(**point) for point in report["points"]]
    names = list(dict.fromkeys(point.arm for point in points))
    return f"{_ends(points, names, report['base'])}\n\n{_equal(points, names, report['likeness_levels'])}"


def _ends(points: Sequence[Point], names: Sequence[str], base: Mapping[str, float]) -> str:
    """Each arm at the end of its best learning rate."""
    head = ["method", "rate", "trained", "step", *SHOWN]
    reference = _seconds_a_step(points, names[0])
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    rows.append(["the base model", "", "", "", *(_shown([base[field]], field) for field in SHOWN)])
    for name in names:
        ends = [point for point in _last(points) if (point.arm, point.rate) == (name, best_rate(points, name))]
        cost = f"{_seconds_a_step(points, name) / reference:.2f}"
        measured = [_shown([getattr(point, field) for point in ends], field) for field in SHOWN]
        rows.append([name, f"{ends[0].rate:g}", f"{ends[0].num_parameters:,}", cost, *measured])
    return _lines(rows)


def _last(points: Sequence[Point]) -> list[Point]:
    last = max(point.steps for point in points)
    return [point for point in points if point.steps == last]


def _seconds_a_step(points: Sequence[Point], name: str) -> float:
    return statistics.median(point.seconds_a_step for point in points if point.arm == name)


def _shown(values: Sequence[float], field: str) -> str:
    return _spread(values, *SHOWN[field])


def _spread(values: Sequence[float], scale: float, digits: int, unit: str) -> str:
    """The median, and the range where there are several."""
    if len(values) == 1:
        return f"{values[0] * scale:.{digits}f}{unit}"
    return spread_text(spread(values), scale, digits) + unit


def _equal(points: Sequence[Point], names: Sequence[str], levels: Sequence[float]) -> str:
    """What each arm keeps at equal likeness."""
    rows = [["kept at a likeness of at least", *(f"{level:g}" for level in levels)], ["---", *["---:"] * len(levels)]]
    for name in names:
        cells = [kept_at(points, name, level) for level in levels]
        rows.append([name, *(_spread(found, 100, 0, "%") if found else "not reached" for found in cells)])
    return _lines(rows)


def _lines(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--method", choices=tuple(ARMS), action="append", help="may be given several times; all by default")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--factors", type=float, nargs="+", default=[0.33, 1.0, 3.0], help="of each arm's learning rate")
    parser.add_argument("--seeds", type=int, default=2, help="runs with other weights and noise")
    parser.add_argument("--scenes", type=int, default=48, help="with the word, and as many without")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    told = "keep the numbers and the machine's facts here; what FILE has is not measured again"
    parser.add_argument("--json", type=Path, metavar="FILE", help=told)
    options = parser.parse_args(arguments)
    if min(options.steps // 4, options.seeds, options.scenes, options.jobs) < 1:
        parser.error("--steps is at least 4; --seeds, --scenes and --jobs are at least 1")
    options.method = options.method or list(ARMS)
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for and is not in the file yet."""
    asked = {name: getattr(options, name) for name in ("steps", "scenes")}
    report = json.loads(options.json.read_text()) if options.json and options.json.exists() else {"asked": asked, "points": []}
    if report["asked"] != asked:
        raise SystemExit(f"{options.json} was measured with {report['asked']}, not {asked}: name another file.")
    report |= {"machine": setup.machine(CPU), "jobs": options.jobs, "likeness_levels": [0.2, 0.3, 0.4]}

    def keep(points: list[Point]) -> None:
        report.update(points=[asdict(point) for point in points], arms={one.arm: asdict(ARMS[one.arm]) for one in points})
        if options.json:
            storage.commit_json(options.json, report)

    with tempfile.TemporaryDirectory(prefix="ftk-bench-") as folder:
        root = Path(folder)
        set_up(root, options.scenes)
        report.setdefault("base", base_row(options.scenes))
        learn_all(root, options, [Point(**point) for point in report["points"]], keep)
    return report


def main() -> None:
    """Measure, keeping each run's numbers where they are asked for, and print the tables."""
    options = parse_arguments()
    report = run(options)
    print(markdown(report))
    print("\nMedians over the seeds, with least and greatest in brackets; a step beside the first row's, by one thread.")


if __name__ == "__main__":
    main()
