"""How soon `ftk train` is back at its first step: a cache of a million samples, a tiny model, a checkpoint in the second epoch.

Each run is a process of its own, timed from its start; the same code as in the command runs in it, without the command line.
Its parts are timed where they happen. What the model takes to load is shown apart: it hangs on the model, not on the cache.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

GOAL_SECONDS = 5.0
PARTS = {
    "imports": "torch, diffusers, pyarrow and ftk are imported",
    "cache": "the cache is opened and compared with the run file",
    "order": "the order of the samples is planned",
    "workload": "the largest micro-batch is found",
    "model": "the denoiser is loaded, with its adapter",
    "restore": "the checkpoint is verified and loaded",
    "batch": "the epoch is planned, the first batch put together",
    "step": "the first step",
    "rest": "everything else",
}
FROM_THE_CACHE = ("cache", "order", "workload", "batch")
"""What the goal is about: it grows with the number of samples."""
SETTINGS: dict[str, dict[str, Any]] = {
    "by bucket": {},
    "by text length": {"group_by": "text_length", "caption_dropout": 0.1},
}


def resume(root: Path, setting: str, started: float) -> dict[str, float]:
    """The measurement: from `started`, by the monotonic clock, to the end of the first step, where the process ends."""
    with _timed() as (seconds, measured):
        with measured("imports", started):
            import train_setup as setup

            from ftk.deliver.run_delivery import RunDelivery
            from ftk.train import build, data, inputs, loop, memory, stage
        run = setup.make_run(root, settings_of(setting))
        wrapped = [
            (inputs, "open_cache", "cache"),
            (inputs, "build_order", "order"),
            (memory, "cached_workload", "workload"),
            (build, "_load", "model"),
            (build, "_restore", "restore"),
        ]
        for owner, name, part in wrapped:
            patch.object(owner, name, _measuring(getattr(owner, name), part, measured)).start()
        steps = data.Loader.steps

        def first_of_steps(*arguments: Any) -> Iterator[Any]:
            loaded = steps(*arguments)
            with measured("batch"):
                first = next(loaded)
            yield first

        patch.object(data.Loader, "steps", first_of_steps).start()
        update = loop.Trainer.update

        def first_update(*arguments: Any) -> None:
            with measured("step"):
                update(*arguments)
            raise FirstStepDoneError

        patch.object(loop.Trainer, "update", first_update).start()
        try:
            stage.run(run, RunDelivery)
        except FirstStepDoneError:
            total = time.monotonic() - started
        in_order = {part: seconds[part][0] for part in PARTS if part != "rest"}
        return {**in_order, "rest": total - sum(in_order.values()), "total": total}


class FirstStepDoneError(Exception):
    """Ends the run before it saves anything."""


@contextmanager
def _timed() -> Iterator[tuple[dict[str, list[float]], Callable[..., Any]]]:
    """(seconds of each part, each time that it ran; what measures one)."""
    seconds: dict[str, list[float]] = {}

    @contextmanager
    def measured(part: str, started: float | None = None) -> Iterator[None]:
        started = time.monotonic() if started is None else started
        yield
        seconds.setdefault(part, []).append(time.monotonic() - started)

    yield seconds, measured


def _measuring(call: Callable[..., Any], part: str, measured: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def run(*arguments: Any, **named: Any) -> Any:
        with measured(part):
            return call(*arguments, **named)

    return run


def settings_of(setting: str) -> dict[str, Any]:
    """More steps than any of these runs will do."""
    return {"steps": 100_000_000, "checkpoint_every": 10_000_000, **SETTINGS[setting]}


def make(root: Path, num_samples: int) -> dict[str, int]:
    """The workspace; in a process of its own, since nothing is written through to the disk: that would take most of it."""
    import train_setup as setup

    os.fsync = lambda descriptor: None
    setup.make_workspace(root, setup.SIZES["many"], num_samples=num_samples, train=settings_of("by bucket"), items_a_shard=500)
    return {"samples": num_samples}


def save(root: Path, setting: str, step: int) -> dict[str, float]:
    """A checkpoint with moments, which says that it is of a late step; that of another setting is removed."""
    import shutil

    import train_setup as setup

    from ftk.deliver.run_delivery import RunDelivery
    from ftk.train.build import build_trainer
    from ftk.train.hooks.checkpoints import Checkpoints

    run = setup.make_run(root, settings_of(setting))
    shutil.rmtree(root / "runs", ignore_errors=True)
    build = build_trainer(run, RunDelivery)
    with closing(build.inputs.store), closing(build.recorder):
        build.trainer.update(build.loader.step(0))
        build.trainer.step = build.trainer.num_samples_seen = step
        (hook,) = (hook for hook in build.trainer.hooks if isinstance(hook, Checkpoints))
        hook.save(build.trainer)
    return {"step": step}


def in_a_process(*arguments: str) -> dict[str, float]:
    """What a fresh interpreter prints at its end."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@contextmanager
def workspace(options: argparse.Namespace) -> Iterator[str]:
    """One for the time being, or the one that is kept."""
    with ExitStack() as stack:
        folder = options.keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="ftk-bench-", dir=options.directory))
        if not (Path(folder) / "cache" / "cache.json").exists():
            print(f"building a cache of {options.samples:,} samples", file=sys.stderr)
            in_a_process("--make", str(folder), str(options.samples))
        yield str(folder)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All settings, whose runs take turns."""
    from train_setup import spread

    runs: dict[str, list[dict[str, float]]] = {setting: [] for setting in SETTINGS}
    with workspace(options) as folder:
        for setting in SETTINGS:
            print(setting, file=sys.stderr)
            in_a_process("--save", folder, setting, str(options.samples + options.samples // 2))
            # The first one counts for nothing: it brings the files into the page cache.
            for number in range(options.repeats + 1):
                run = in_a_process("--resume", folder, setting, str(time.monotonic()))
                runs[setting] += [run] if number else []
    results = {}
    for setting, measured in runs.items():
        own = [sum(run[part] for part in FROM_THE_CACHE) for run in measured]
        parts = {part: spread([run[part] for run in measured]) for part in (*PARTS, "total")}
        results[setting] = {"from_the_cache": spread(own), "goal_seconds": GOAL_SECONDS, "parts": parts}
    return {"samples": options.samples, "repeats": options.repeats, "results": results}


def show(report: dict[str, Any]) -> None:
    """One row a part."""
    from rich.console import Console
    from rich.table import Table
    from train_setup import spread_text

    results = report["results"]
    table = Table(title=f"Seconds until the first step after a resume; {report['samples']:,} samples", title_justify="left")
    table.add_column("")
    for setting in results:
        table.add_column(setting, justify="right", no_wrap=True)
    for part, what in PARTS.items():
        table.add_row(what, *(spread_text(result["parts"][part]) for result in results.values()))
    table.add_row("all", *(spread_text(result["parts"]["total"]) for result in results.values()))
    met = ["met" if result["from_the_cache"]["max"] < GOAL_SECONDS else "missed" for result in results.values()]
    title = f"cache, order, largest micro-batch and first batch; goal: {GOAL_SECONDS:g}"
    table.add_row(title, *(f"{spread_text(r['from_the_cache'])}: {m}" for r, m in zip(results.values(), met, strict=True)))
    Console(width=max(Console().width, 128)).print(table)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=1_000_000, help="of the cache")
    parser.add_argument("--repeats", type=int, default=5, help="runs that count, of each setting")
    parser.add_argument("--directory", metavar="DIR", help="where the cache is put for the time being, on a local disk")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="put the cache there to stay, or take the one that is there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers and the machine's facts here")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--save", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--resume", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, or, as a process of its own, do a part of it. The least possible is imported before."""
    options = parse_arguments()
    if options.resume:
        root, setting, started = options.resume
        print(json.dumps(resume(Path(root), setting, float(started))), flush=True)
        os._exit(0)  # what is under way in threads is not waited for
    if options.make:
        print(json.dumps(make(Path(options.make[0]), int(options.make[1]))))
        return
    if options.save:
        print(json.dumps(save(Path(options.save[0]), options.save[1], int(options.save[2]))))
        return
    import torch
    import train_setup as setup

    machine = setup.machine(torch.device("cpu"))
    command = f"python benchmarks/train_resume.py --samples {options.samples} --repeats {options.repeats}"
    report = {"command": command, "machine": machine, **measure(options)}
    report["machine"]["load_after"] = os.getloadavg()[0]
    show(report)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
