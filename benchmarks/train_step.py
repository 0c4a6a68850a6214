"""What a step of `ftk train` costs beside the same step without ftk. Three parts:

- overhead: seconds a step against two loops on the same model and batches, whose tensors are in memory already: one by hand
  (`raw`), and that of diffusers' own script (`diffusers`). ftk's side is all of it: cache reader, the loader's thread,
  optimizer, recorder, TensorBoard, the totals by sigma, the check for bad steps; only checkpoints lie outside.
- data: how long a step of samples of Qwen-Image's own size takes to be read and put together, and how long a loop waits for it
  that computes, or sleeps, as long as a GPU does.
- memory: the most that a process holds, ftk's own and one that has never imported ftk.

Blocks of steps take turns within one process; each round gives one ratio, and the median of the ratios is the answer.

Shape legend: B batch, C channels, H W latent cells, L text tokens, D text width.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# First: it settles how many threads torch may use.
import train_setup as setup  # isort: skip
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from train_loops import Sample, make_loop, resident_bytes
from train_setup import SIZES, spread, spread_text, taking_turns

from ftk.deliver.run_delivery import RunDelivery
from ftk.run import Run
from ftk.train import stage
from ftk.train.build import Build, build_trainer
from ftk.train.data import Batch, Step
from ftk.train.hooks.recorder import metrics_table

PEERS = ("raw", "diffusers")
CPU = torch.device("cpu")
# In each block as often as in any other; twice as often as by default.
LOG_EVERY = 5
SETTLING_SECONDS = 0.1
GPU_STEP_SECONDS = 0.35
NUM_SAMPLES = 96
# Short blocks, many rounds: a machine that others share changes its speed within seconds.
STEPS_A_BLOCK = {"tiny": 20, "mid": 5}
ROUNDS = {("tiny", 1): 60, ("tiny", 4): 40, ("mid", 1): 40, ("mid", 4): 16}
WARMUP_STEPS = 10
OVERHEAD_SIZES = ("tiny", "mid")


@dataclass(slots=True, kw_only=True)
class Blocks:
    """Of one side, in the order of the rounds: seconds a step, and CPU seconds a step of all its threads."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)


class Turns:
    """Stands between the loader and `Trainer.fit`: lets whole blocks through, and runs the other sides' between them."""

    def __init__(self, steps: Iterator[Step], build: Build, peers: dict[str, Callable[[Sample], Any]], rounds: int, block: int):
        self.blocks = {name: Blocks() for name in ("ftk", *peers)}
        self.first_steps: set[int] = set()
        self._steps, self._build, self._peers, self._rounds, self._block = steps, build, peers, rounds, block

    def __iter__(self) -> Iterator[Step]:
        """When this is asked for the next step, the trainer and all its hooks are done with the last one."""
        for index in range(WARMUP_STEPS):
            yield next(self._steps)
            for step in self._peers.values():
                step(sample_of(self._build.loader.step(index)))
        for number, name in taking_turns(tuple(self.blocks), self._rounds):
            first = WARMUP_STEPS + number * self._block
            samples = [sample_of(self._build.loader.step(index)) for index in range(first, first + self._block)]
            # The loader's thread fills its queue again, which is no work of the next side's.
            time.sleep(SETTLING_SECONDS)
            cpu, started = time.process_time(), time.perf_counter()
            if name == "ftk":
                self.first_steps.add(first + 1)
                for _ in range(self._block):
                    yield next(self._steps)
            else:
                for sample in samples:
                    self._peers[name](sample)
            self.blocks[name].seconds.append((time.perf_counter() - started) / self._block)
            self.blocks[name].cpu_seconds.append((time.process_time() - cpu) / self._block)


def sample_of(step: Step) -> Sample:
    """The one micro-batch of a step of ftk's, for the other sides."""
    ((_, batch),) = step.batches
    return of_batch(batch)


def of_batch(batch: Batch) -> Sample:
    """The same tensors."""
    text = batch.conditions.texts["embeds"]
    assert text is not None
    return Sample(
        clean_BCHW=batch.latents_BCHW,
        noise_BCHW=batch.noise_BCHW,
        sigma_B=batch.sigma_B,
        text_BLD=text,
        mask_BL=batch.conditions.texts["mask"],
    )


def train_settings(batch_size: int, steps: int, **others: Any) -> dict[str, Any]:
    """Every step is one whole micro-batch: each bucket holds a multiple of the batch size."""
    sizes = {"global_batch_size": batch_size, "micro_batch_size": batch_size, "remainder": "drop"}
    return {"steps": steps, "checkpoint_every": 10 * steps, "log_every": LOG_EVERY, **sizes, **others}


def overhead(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each size with each batch size."""
    return [
        overhead_of(name, batch_size, options)
        for name in options.size or OVERHEAD_SIZES
        for batch_size in options.batch or (1, 4)
    ]


def overhead_of(name: str, batch_size: int, options: argparse.Namespace) -> dict[str, Any]:
    """All sides on one workspace."""
    size, block = SIZES[name], options.block or STEPS_A_BLOCK[name]
    rounds = options.rounds or ROUNDS[name, batch_size]
    steps = WARMUP_STEPS + rounds * block
    with tempfile.TemporaryDirectory(prefix="ftk-bench-") as folder:
        root = Path(folder)
        run = setup.make_workspace(root, size, num_samples=NUM_SAMPLES, train=train_settings(batch_size, steps))
        build = build_trainer(run, RunDelivery)
        with closing(build.inputs.store), closing(build.recorder):
            peers = {
                peer: make_loop(peer, root / "model", setup.RANK, setup.TARGETS, setup.LEARNING_RATE).step for peer in PEERS
            }
            turns = Turns(build.loader.steps(0, steps), build, peers, rounds, block)
            build.trainer.fit(turns)
        waits = waiting(build.directory, turns.first_steps)
    return {"size": name, "batch_size": batch_size, "rounds": rounds, "steps_a_block": block,
            **model_facts(build), "sides": sides(turns.blocks), "data_seconds": waits}  # fmt: skip


def model_facts(build: Build) -> dict[str, Any]:
    """How large it is, and in what precision it computes."""
    trained = build.inputs.sizes.num_trainable_parameters
    every = sum(parameter.numel() for parameter in build.trainer.model.denoiser.parameters())
    dtype = str(build.trainer.dtype).removeprefix("torch.")
    return {"num_base_parameters": every - trained, "num_trained_parameters": trained, "dtype": dtype}


def sides(blocks: dict[str, Blocks]) -> dict[str, Any]:
    """Each side's own times; of the others' also ftk's as a ratio to theirs of the same round."""
    ours = blocks["ftk"]
    found: dict[str, Any] = {}
    for name, theirs in blocks.items():
        found[name] = {"seconds_a_step": spread(theirs.seconds), "cpu_seconds_a_step": spread(theirs.cpu_seconds)}
        if name != "ftk":
            pairs = list(zip(ours.seconds, theirs.seconds, strict=True))
            ratios = [a / b for a, b in pairs]
            cpu_ratios = [a / b for a, b in zip(ours.cpu_seconds, theirs.cpu_seconds, strict=True)]
            found[name] |= {
                "ratio": {**spread(ratios), "quartiles": np.quantile(ratios, (0.25, 0.75)).tolist(), "rounds": ratios},
                "cpu_ratio": spread(cpu_ratios),
                "extra_seconds_a_step": spread([a - b for a, b in pairs]),
            }
    return found


def waiting(directory: Path, first_steps: set[int]) -> dict[str, Any]:
    """What the loop waited for its batches, by the run's metrics; not at the blocks' first steps, before which others ran."""
    table = metrics_table(directory).select(["step", "data_seconds"]).to_pylist()
    counted = [row["data_seconds"] for row in table if row["step"] > WARMUP_STEPS and row["step"] not in first_steps]
    return {**spread(counted), "p99": float(np.quantile(counted, 0.99))}


def data(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Samples of Qwen-Image's own size, from a cache in the page cache."""
    with tempfile.TemporaryDirectory(prefix="ftk-bench-") as folder:
        train = train_settings(1, 1000, precision="bf16")
        # 128 items of 1 MB are a shard of half the size that `ftk cache` makes.
        setup.make_workspace(Path(folder), SIZES["samples"], num_samples=64, train=train, items_a_shard=128)
        return [data_of(Path(folder), batch_size, options) for batch_size in options.batch or (1, 4)]


def data_of(root: Path, batch_size: int, options: argparse.Namespace) -> dict[str, Any]:
    """One batch size; a store of its own, so that the first epoch compares checksums as that of a new process does."""
    build = build_trainer(setup.make_run(root, train_settings(batch_size, 1000, precision="bf16")), RunDelivery)
    steps_an_epoch = build.inputs.order.steps_an_epoch
    with closing(build.inputs.store), closing(build.recorder):
        seconds = [timed(build.loader.step, index) for index in range((1 + options.epochs) * steps_an_epoch)]
        waits = {
            name: loop_waits(build, options.gpu_steps, batch_size * GPU_STEP_SECONDS, pause)
            for name, pause in (("sleeping", time.sleep), ("computing", compute))
        }
    a_sample = [each / batch_size for each in seconds]
    return {
        "batch_size": batch_size,
        "sample": "latents 16x128x128 float16 (mean and std), text 200x3584 bfloat16",
        "first_epoch_seconds_a_sample": spread(a_sample[:steps_an_epoch]),
        "later_seconds_a_sample": spread(a_sample[steps_an_epoch:]),
        "share_of_a_gpu_step": spread([each / batch_size / GPU_STEP_SECONDS for each in seconds[steps_an_epoch:]]),
        "gpu_step_seconds": batch_size * GPU_STEP_SECONDS,
        "waits": waits,
    }


def timed(call: Callable[..., Any], *arguments: Any) -> float:
    """Seconds."""
    started = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started


def loop_waits(build: Build, num_steps: int, gpu_step: float, pause: Callable[[float], None]) -> dict[str, float]:
    """Seconds that a loop waits for each batch but the first, where a step takes as long as on a GPU."""
    found = []
    steps = build.loader.steps(0, num_steps)
    for _ in range(num_steps):
        found.append(timed(next, steps))
        pause(gpu_step)
    steps.close()  # type: ignore[attr-defined]
    return spread(found[1:])


def compute(seconds: float) -> None:
    """Python that never rests: the loader's thread has to ask for the interpreter."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each size with each batch size, in processes of their own that take turns."""
    return [
        memory_of(name, batch_size, options)
        for name in options.size or OVERHEAD_SIZES
        for batch_size in options.batch or (1, 4)
    ]


def memory_of(name: str, batch_size: int, options: argparse.Namespace) -> dict[str, Any]:
    """ftk's own process is `ftk train` without the command line."""
    found: dict[str, list[dict[str, int]]] = {kind: [] for kind in ("ftk", *PEERS)}
    with tempfile.TemporaryDirectory(prefix="ftk-bench-") as folder:
        root = Path(folder)
        settings = train_settings(batch_size, options.memory_steps)
        run = setup.make_workspace(root, SIZES[name], num_samples=NUM_SAMPLES, train=settings)
        write_largest_sample(run, root / "samples.safetensors")
        (root / "settings.json").write_text(json.dumps(settings))
        script = Path(__file__).with_name("train_loops.py")
        steps = ["--steps", str(options.memory_steps)]
        commands = {kind: [str(script), kind, str(root / "model"), str(root / "samples.safetensors"), *steps] for kind in PEERS}
        commands["ftk"] = [__file__, "--train", str(root)]
        for _, kind in taking_turns(tuple(found), options.repeats):
            found[kind].append(in_a_process(commands[kind]))
    measured = {
        kind: {key: spread([each[key] for each in runs]) for key in ("imported_bytes", "peak_bytes")}
        for kind, runs in found.items()
    }
    for kind in PEERS:
        pairs = zip(found["ftk"], found[kind], strict=True)
        measured[kind]["ratio"] = spread([ours["peak_bytes"] / theirs["peak_bytes"] for ours, theirs in pairs])
    return {"size": name, "batch_size": batch_size, "repeats": options.repeats, "sides": measured}


def write_largest_sample(run: Run, path: Path) -> None:
    """Of an epoch's batches the one with most text: the others' memory must not gain from a smaller one."""
    build = build_trainer(run, RunDelivery)
    with closing(build.inputs.store), closing(build.recorder):
        samples = [sample_of(build.loader.step(index)) for index in range(build.inputs.order.steps_an_epoch)]
    largest = max(samples, key=lambda sample: sample.text_BLD.shape[1])
    tensors = {
        "clean": largest.clean_BCHW, "noise": largest.noise_BCHW, "sigma": largest.sigma_B, "text": largest.text_BLD,
        "mask": largest.mask_BL,
    }  # fmt: skip
    save_file({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}, path)


def train(root: Path) -> dict[str, int]:
    """A run from its start, in a process of its own."""
    imported = resident_bytes("VmRSS")
    stage.run(setup.make_run(root, json.loads((root / "settings.json").read_text())), RunDelivery, fresh=True)
    return {"imported_bytes": imported, "peak_bytes": resident_bytes("VmHWM")}


def in_a_process(command: Sequence[str]) -> dict[str, int]:
    """The last line that it prints, as JSON."""
    done = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


PARTS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {"overhead": overhead, "data": data, "memory": memory}


def show(part: str, results: Sequence[dict[str, Any]], console: Console) -> None:
    """One table a part."""
    {"overhead": show_overhead, "data": show_data, "memory": show_memory}[part](results, console)


def show_overhead(results: Sequence[dict[str, Any]], console: Console) -> None:
    """One row a side."""
    table = new_table(
        "ftk's step against the same step without ftk",
        ["", "ms a step", "ftk / it", "its middle half", "by CPU time", "ftk's extra ms"],
    )
    for result in results:
        for name, side in result["sides"].items():
            about = f"{result['size']} b{result['batch_size']} ({result['num_base_parameters'] / 1e6:,.1f} M): {name}"
            ratios = [""] * 4
            if name != "ftk":
                low, high = side["ratio"]["quartiles"]
                ratios = [spread_text(side["ratio"], digits=3), f"{low:.3f} to {high:.3f}"]
                ratios.append(spread_text(side["cpu_ratio"], digits=3))
                ratios.append(spread_text(side["extra_seconds_a_step"], 1e3))
            table.add_row(about, spread_text(side["seconds_a_step"], 1e3), *ratios)
        waited = result["data_seconds"]
        table.add_row("  ftk waits for data", f"{1e3 * waited['median']:.3f} (99 %: {1e3 * waited['p99']:.2f})", "", "", "", "")
    console.print(table)


def show_data(results: Sequence[dict[str, Any]], console: Console) -> None:
    """One row a batch size."""
    columns = ["", "first epoch ms", "later ms", "% of a GPU's step", "waits: sleeping ms", "waits: computing ms"]
    table = new_table(f"A sample read and put together; a GPU's step: {GPU_STEP_SECONDS} s", columns)
    for result in results:
        table.add_row(
            f"b{result['batch_size']}",
            spread_text(result["first_epoch_seconds_a_sample"], 1e3),
            spread_text(result["later_seconds_a_sample"], 1e3),
            spread_text(result["share_of_a_gpu_step"], 100),
            *(spread_text(result["waits"][name], 1e3, 3) for name in ("sleeping", "computing")),
        )
    console.print(table)


def show_memory(results: Sequence[dict[str, Any]], console: Console) -> None:
    """One row a side."""
    table = new_table("The most memory that a process held", ["", "MiB", "after imports", "ftk / it"])
    for result in results:
        for name, side in result["sides"].items():
            table.add_row(
                f"{result['size']} b{result['batch_size']}: {name}",
                spread_text(side["peak_bytes"], 2**-20, 0),
                spread_text(side["imported_bytes"], 2**-20, 0),
                spread_text(side["ratio"], digits=3) if name != "ftk" else "",
            )
    console.print(table)


def new_table(title: str, columns: Sequence[str]) -> Table:
    """The first column is for names."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--size", choices=OVERHEAD_SIZES, action="append", help="of overhead and memory; may be given twice")
    parser.add_argument("--batch", type=int, choices=(1, 4), action="append", help="samples a step; may be given twice")
    parser.add_argument("--rounds", type=int, help="of overhead: turns of each side")
    parser.add_argument("--block", type=int, help=f"steps a turn: a multiple of {LOG_EVERY}")
    parser.add_argument("--epochs", type=int, default=9, help="of data: after the first")
    parser.add_argument("--gpu-steps", type=int, default=20, help="of data: steps that take as long as a GPU's")
    parser.add_argument("--repeats", type=int, default=3, help="of memory: processes of each side")
    parser.add_argument("--memory-steps", type=int, default=20, help="of memory: steps of each process")
    parser.add_argument("--threads", type=int, default=1, help="torch's CPU threads; more are slower when cores are busy")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers and the machine's facts here")
    parser.add_argument("--train", type=Path, metavar="WORKSPACE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if wrong := set(options.part) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(wrong))}; there are {', '.join(PARTS)}")
    if options.block and options.block % LOG_EVERY:
        parser.error(f"--block must be a multiple of {LOG_EVERY}, so that each block holds as many log steps")
    return options


def main() -> None:
    """Measure every part that was asked for."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    if options.train:
        print(json.dumps(train(options.train)))
        return
    console = Console(width=max(Console().width, 170))
    for part in options.part or PARTS:
        machine = setup.machine(CPU)
        found = {"command": shown_command(part, options), "machine": machine, "results": PARTS[part](options)}
        machine["load_after"] = os.getloadavg()[0]
        show(part, found["results"], console)
        console.print(f"Load of the machine: {machine['load']:.1f} before, {machine['load_after']:.1f} at the end.")
        if options.json:
            write(options.json, part, found)
    console.print("Medians, with least and greatest in brackets. A ratio is of blocks, or processes, of the same round.")


def write(path: Path, part: str, found: dict[str, Any]) -> None:
    """The file keeps its other parts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**report, part: found}, indent=2) + "\n")


def shown_command(part: str, options: argparse.Namespace) -> str:
    """What to type for the same measurement."""
    lists = [f" --{name} {value}" for name in ("size", "batch") for value in getattr(options, name) or ()]
    names = ("rounds", "block", "epochs", "repeats", "threads")
    numbers = [f" --{name} {value}" for name in names if (value := getattr(options, name)) is not None]
    return f"python benchmarks/train_step.py {part}" + "".join([*lists, *numbers])


if __name__ == "__main__":
    main()
