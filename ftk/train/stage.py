"""`ftk train`: open the cache, build the trainer, loop. The denoiser is in memory, and with it only what is trained too.

The VAE joins them for the moment in which sample images are drawn.
"""

import importlib.metadata
import logging
import math
import os
import platform
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ftk
from ftk import devices, storage
from ftk.configs.load import resolved_yaml
from ftk.errors import EnvironmentFault, Preempted
from ftk.run import Run
from ftk.train import checkpoint, launch, memory, ranks, run_summary, sigma_plot
from ftk.train.attempts import Attempt
from ftk.train.build import Build, build_trainer
from ftk.train.delivery import MakeDelivery
from ftk.train.hooks import trackers
from ftk.train.inputs import Inputs, as_begun, open_inputs
from ftk.train.ranks import Ranks

LOGGER = logging.getLogger("ftk")
_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pyarrow")
_FOLDERS = (".", "checkpoints", "adapter", "adapter/images", "best", "best/images", "samples")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """Where the run stands. `loss` is the mean of the last 20 steps; `seconds_per_step` the median.

    `data_wait_share`: of the time of this run's steps, how much was spent waiting for batches.
    """

    step: int
    num_samples_seen: int
    loss: float
    best_step: int | None
    seconds_per_step: float
    data_wait_share: float
    num_bad_steps: int
    num_steps_now: int
    num_processes: int
    num_trainable_parameters: int
    peak_memory_bytes: int
    adapter: str


def run(run: Run, make_delivery: MakeDelivery, fresh: bool = False, allow_change: bool = False) -> TrainReport | None:
    """Train to `train.steps`, from the newest checkpoint if there is one.

    Args:
        make_delivery: writes the weights into the run's folder, `ftk.deliver.run_delivery.RunDelivery` for the command.
        fresh: start over; the run that is there is set aside under another name.
        allow_change: go on from a checkpoint that was trained with other settings.

    Returns:
        The report of the process that writes; None in the others.

    Raises:
        CacheError: the cache is missing, damaged, or was made with something else than this run names.
        CheckpointError: the settings no longer match the checkpoint's.
        EnvironmentFault: the device has no memory left; the message says what to change.
        Preempted: a signal stopped the run after saving, or another process ended.
        NoProgress: another process ended as it did in the attempt before, at the same step.
    """
    run = run.with_config(launch.applied(run.config))
    trackers.check(run.config.train.trackers)
    device, directory = devices.resolve_device(run.config.train.device), run.paths.run
    with ranks.started(device, run.config.train.timeout_seconds) as (mine, device), ExitStack() as held:
        with mine.unhurried():
            if mine.is_main:
                _take(directory, fresh, held)
        attempt = Attempt(directory, mine)
        with attempt.watched():
            build = build_trainer(run, make_delivery, mine, device, allow_change=allow_change)
            attempt.trainer = build.trainer
            with closing(build.inputs.store), closing(build.recorder):
                return _trained(build)


def _take(directory: Path, fresh: bool, held: ExitStack) -> None:
    """Lock the run's folder until `held` is closed, and remove what a killed process left half written."""
    if fresh:
        _set_aside(directory)
    held.enter_context(storage.lock(directory))
    for folder in _FOLDERS:
        storage.sweep(directory / folder)


def _trained(build: Build) -> TrainReport | None:
    """Train; the report of the process that writes."""
    first = build.trainer.step
    _fit(build)
    report = None
    with build.trainer.ranks.unhurried():
        if build.trainer.ranks.is_main:
            report = _report(build, build.trainer.step - first)
            storage.commit_json(build.directory / "report.json", report)
            build.recorder.close()  # services are told the last numbers
    return report


def _fit(build: Build) -> None:
    trainer, directory, steps = build.trainer, build.directory, build.inputs.run.config.train.steps
    if trainer.step >= steps:
        # The hooks start all the same: a kill may have come between the last checkpoint and what follows it.
        LOGGER.info("%s is at step %d already: nothing to do. Raise train.steps to go on.", directory, trainer.step)
    with trainer.ranks.unhurried():
        if trainer.ranks.is_main and trainer.step < steps:
            _write_environment(build)
    try:
        with _stopping_on_signals(trainer.ranks):
            trainer.fit(build.loader.steps(trainer.step, steps))
    except RuntimeError as error:
        if (gone := ranks.others_gone(error)) is not None:
            raise gone from error
        if not devices.is_out_of_memory(error):
            raise
        raise EnvironmentFault(
            f"Step {trainer.step + 1}: {str(error).splitlines()[0]}\n"
            f"{memory.advice(build.inputs.sizes.plan, build.inputs.workload, build.inputs.run.family)}"
        ) from error


def dry_run(run: Run) -> dict[str, Any]:
    """Steps, samples, parameters, the memory plan and the sigmas that will be drawn. Reads no weights, writes nothing."""
    run = run.with_config(launch.applied(run.config))
    trackers.check(run.config.train.trackers)
    device = devices.resolve_device(run.config.train.device)
    inputs = as_begun(open_inputs(run, device, launch.world_size()), Ranks())
    order, sizes, num_steps = inputs.order, inputs.sizes, inputs.run.config.train.steps
    found = checkpoint.latest(run.paths.checkpoints)
    return {
        "step": found.step if found else 0,
        "steps": num_steps,
        "samples_an_epoch": order.samples_an_epoch,
        "epochs": round(order.epochs_of(num_steps), 2),
        "samples_dropped_an_epoch": order.num_dropped,
        "samples_held_out": len(order.held_out),
        "num_frozen_parameters": sizes.num_frozen_parameters,
        "num_trainable_parameters": sizes.num_trainable_parameters,
        **{name: text for name, text in memory.describe(sizes.plan) if name not in ("", "because")},
        "reasons": list(sizes.plan.reasons),
        "sigmas": sigma_plot.text(inputs.sigmas, _tokens(inputs)),
    }


def _tokens(inputs: Inputs) -> dict[str, int]:
    """Tokens of an image of each bucket."""
    sides = inputs.store.table.select(["bucket_width", "bucket_height"]).group_by(["bucket_width", "bucket_height"])
    cells = inputs.run.family.geometry.pixel_multiple**2
    found = [(row["bucket_width"], row["bucket_height"]) for row in sides.aggregate([]).to_pylist()]
    return {f"{width}x{height} px": width * height // cells for width, height in found}


def _report(build: Build, num_steps_now: int) -> TrainReport:
    rows = run_summary.history(build.directory)
    found = run_summary.summary(build.directory, rows, run_summary.validation(build.directory), verify=False)
    now = slice(len(rows) - num_steps_now, None)
    seconds = float(rows.seconds_N[now].sum())
    return TrainReport(
        step=build.trainer.step,
        num_samples_seen=build.trainer.num_samples_seen,
        loss=found.loss.now if found.loss else math.nan,
        best_step=checkpoint.best_step(build.directory / "checkpoints"),
        seconds_per_step=float(np.median(rows.seconds_N)) if len(rows) else 0.0,
        data_wait_share=float(rows.data_seconds_N[now].sum()) / seconds if seconds else 0.0,
        num_bad_steps=found.num_bad_steps,
        num_steps_now=num_steps_now,
        num_processes=build.trainer.ranks.size,
        num_trainable_parameters=build.inputs.sizes.num_trainable_parameters,
        peak_memory_bytes=devices.memory_bytes(build.trainer.device),
        adapter=str(build.directory / "adapter"),
    )


def _set_aside(directory: Path) -> None:
    if not directory.exists():
        return
    with storage.lock(directory):
        number = 1
        while (aside := directory.with_name(f"{directory.name}.old-{number}")).exists():
            number += 1
        directory.rename(aside)
    LOGGER.info("--fresh: the run that was there is set aside as %s", aside)


def _write_environment(build: Build) -> None:
    cuda = torch.cuda.get_device_name(build.trainer.device) if build.trainer.device.type == "cuda" else None
    environment = {
        "ftk": ftk.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(build.trainer.device),
        "cuda_device": cuda,
        "num_processes": build.trainer.ranks.size,
        "threads": torch.get_num_threads(),
        "memory_plan": asdict(build.inputs.sizes.plan),
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }
    storage.commit_json(build.directory / "environment.json", environment)
    storage.commit_bytes(build.directory / "config.yaml", resolved_yaml(build.inputs.run.config).encode())
    picture = sigma_plot.png(build.inputs.sigmas, _tokens(build.inputs))
    storage.commit_bytes(build.directory / run_summary.SIGMAS, picture)


def _leave(terminals: Sequence[int]) -> None:
    """What is written to a terminal that has been closed would be an error in the middle of saving."""
    for descriptor in terminals:
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), descriptor)


@contextmanager
def _stopping_on_signals(mine: Ranks) -> Iterator[None]:
    """SIGTERM, SIGUSR1, Ctrl-C and a closed terminal ask the loop to stop at the step's end; a second Ctrl-C stops at once."""
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def ask(number: int, _: object) -> None:
        mine.stop_requested = True
        if number == signal.SIGHUP:
            _leave(terminals)
        LOGGER.info("signal %s: saving at the end of this step", signal.Signals(number).name)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
    # Under nohup it is ignored, and stays so.
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    try:
        before: dict[int, Any] = {number: signal.signal(number, ask) for number in numbers}
    except ValueError:  # not the main thread: nobody's signals to take
        yield
        return
    try:
        yield
    except Preempted:
        # The process is about to end with the code that says so, and a signal that is repeated may not change it.
        before |= dict.fromkeys((signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP), signal.SIG_IGN)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
