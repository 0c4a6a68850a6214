"""What should take no time that anybody notices: `ftk --help`, looking up an item, opening the order of a million samples, ...

The tests count what these do (modules loaded, instructions, messages), which is the same on every machine. The times are here.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.table import Table

SHOWN = {
    "help": ("ftk --help, a process of its own", 1.0, "s"),
    "lookup": ("an item of a cache by its id", 1e6, "µs"),
    "open_order": ("the order of all samples is opened, CPU time", 1.0, "s"),
    "late_step": ("step 1,000,000 of 24 samples, CPU time", 1.0, "s"),
    "record": ("a step between two log steps is recorded", 1e6, "µs"),
    "transfer": ("a payload goes to a worker process and back", 1e3, "ms"),
    "bomb": ("a picture of 50,000 x 50,000 pixels is rejected", 1e3, "ms"),
    "demo": ("ftk demo", 1.0, "s"),
}


def timed(act: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that a call takes."""
    started = clock()
    act()
    return clock() - started


def help_seconds(_: argparse.Namespace) -> float:
    """`ftk --help`, the interpreter's own start included."""
    return timed(lambda: subprocess.run([sys.executable, "-m", "ftk", "--help"], stdout=subprocess.DEVNULL, check=True))


def lookup_seconds(options: argparse.Namespace) -> float:
    """One id of many, after the first look-up, which makes the table."""
    import pyarrow as pa

    from ftk.cache import store

    number = options.items
    columns = {
        "id": [f"item{row}" for row in range(number)], "tensors": ["mean"] * number,
        "length": pa.array(range(number), pa.int32()), "bytes": pa.array([1] * number, pa.int64()),
        "checksum": pa.array([b"\0" * 16] * number, pa.binary(16)), "shard": pa.array([0] * number, pa.int32()),
    }  # fmt: skip
    items = store._Items.of(pa.table(columns).combine_chunks())
    items.row("item0")
    asked = [f"item{row}" for row in range(number - min(number, 5000), number)]
    return timed(lambda: [items.row(item) for item in asked]) / len(asked)


def order_of(num_samples: int, lengths: Sequence[int], **settings: Any) -> Callable[[], Any]:
    """What opens the order of so many samples, each with captions of these lengths."""
    import pyarrow as pa

    from ftk.configs.schema import TrainConfig
    from ftk.train.order import Order

    columns = {
        "key": [f"folder-of-photos-{row:07}-{row * 2654435761 % 2**48:012x}" for row in range(num_samples)],
        "bucket_width": pa.array([512 + 64 * (row % 8) for row in range(num_samples)], pa.int32()),
        "bucket_height": pa.array([512] * num_samples, pa.int32()),
        "repeats": pa.array([1] * num_samples, pa.int32()),
        "role": pa.array(["class" if row % 3 == 2 else "instance" for row in range(num_samples)]).dictionary_encode(),
        "text_lengths": pa.array([list(lengths)] * num_samples, pa.list_(pa.int32())),
    }
    table = pa.table(columns)
    return lambda: Order(table, TrainConfig(group_by="text_length", **settings), empty_length=5)


def open_order_seconds(options: argparse.Namespace) -> float:
    """From the cache's table to the first step."""
    make = order_of(options.samples, (20, 200), global_batch_size=8, micro_batch_size=4)
    return timed(lambda: make().step(0), time.process_time)


def late_step_seconds(_: argparse.Namespace) -> float:
    """A step of epoch 100,000 or so."""
    order = order_of(24, (4, 5, 6, 7), global_batch_size=4, micro_batch_size=2, class_ratio=0.4)()
    return timed(lambda: order.step(1_000_000), time.process_time)


def record_seconds(options: argparse.Namespace) -> float:
    """The recorder's share of a step."""
    import torch

    from ftk.configs.schema import TrainConfig
    from ftk.train.hooks.recorder import Recorder
    from ftk.train.loop import NUM_BANDS, StepResult
    from ftk.train.ranks import Ranks

    config = TrainConfig(steps=100, log_every=10**9)
    trainer: Any = SimpleNamespace(step=0, device=torch.device("cpu"), config=config, ranks=Ranks())
    result = StepResult(
        step=1, loss=torch.tensor(0.5), grad_norm=torch.tensor(1.0), is_bad=torch.tensor(False),
        band_loss_K=torch.zeros(NUM_BANDS), band_count_K=torch.ones(NUM_BANDS), learning_rate=1e-4, num_samples=2,
        data_seconds=0.0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="ftk-bench-") as folder:
        recorder = Recorder(Path(folder), config, ())
        recorder.on_start(trainer)
        seconds = timed(lambda: [recorder.on_step(trainer, result) for _ in range(options.steps)]) / options.steps
        recorder.close()
    return seconds


def same(payload: bytes) -> bytes:
    """What the worker does."""
    return payload


def transfer_seconds(options: argparse.Namespace) -> float:
    """One of 16 payloads, one after the other, on a worker that has started."""
    from ftk.pipeline.engine import WorkerPool

    payload = os.urandom(options.payload_mib << 20)
    with WorkerPool(1, 60.0, 2**32) as pool:
        list(pool.map(same, [b""]))
        return timed(lambda: list(pool.map(same, (payload for _ in range(16))))) / 16


def bomb_seconds(_: argparse.Namespace) -> float:
    """A PNG whose header promises more than `max_pixels`."""
    from ftk.configs.load import validate
    from ftk.configs.schema import DataConfig
    from ftk.pipeline import images
    from ftk.pipeline.sources.base import Blob

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
    data = validate(DataConfig, {"sources": [{"path": "unread"}]}, "the benchmark's settings")
    settings = data.model_dump(include={name for name in images.ImageRecipe.__slots__ if name != "sizes"})
    recipe = images.ImageRecipe(sizes=(((64, 64),),), **settings)
    task = images.ImageTask(
        image=Blob(location="bomb.png", data=b"\x89PNG\r\n\x1a\n" + body), mask=None, controls=(), recipe=recipe
    )
    seconds = timed(lambda: images.prepare_image(task))
    problem = images.prepare_image(task)
    assert isinstance(problem, images.ImageProblem), problem
    return seconds


def demo_seconds(_: argparse.Namespace) -> float:
    """The whole command, in a fresh folder."""
    with tempfile.TemporaryDirectory(prefix="ftk-bench-") as folder:
        command = [sys.executable, "-m", "ftk", "demo", "--workspace", folder, "--json"]
        return timed(lambda: subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True))


PARTS: dict[str, Callable[[argparse.Namespace], float]] = {
    "help": help_seconds, "lookup": lookup_seconds, "open_order": open_order_seconds, "late_step": late_step_seconds,
    "record": record_seconds, "transfer": transfer_seconds, "bomb": bomb_seconds, "demo": demo_seconds,
}  # fmt: skip


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median, least and greatest seconds of each part; the demo once, for it takes a minute or two."""
    results = {}
    for name in options.parts or PARTS:
        values = [PARTS[name](options) for _ in range(1 if name == "demo" else options.repeats)]
        results[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return results


def machine() -> dict[str, Any]:
    """Facts without which the numbers mean nothing."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "cpu": cpu, "cpu_count": os.cpu_count(), "python": platform.python_version(), "ftk": importlib.metadata.version("ftk")
    }  # fmt: skip


def show(results: dict[str, dict[str, float]]) -> None:
    """One row a part."""
    table = Table(title="Overheads", title_justify="left")
    for column in ("part", "median", "range"):
        table.add_column(column, justify="left" if column == "part" else "right", no_wrap=True)
    for name, seconds in results.items():
        about, scale, unit = SHOWN[name]
        median, least, most = (seconds[key] * scale for key in ("median", "min", "max"))
        table.add_row(about, f"{median:.2f} {unit}", f"{least:.2f}-{most:.2f}")
    Console().print(table)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all of them by default")
    parser.add_argument("--items", type=int, default=300_000, help="of the cache that is looked into")
    parser.add_argument("--samples", type=int, default=1_000_000, help="whose order is opened")
    parser.add_argument("--steps", type=int, default=1000, help="that are recorded")
    parser.add_argument("--payload-mib", type=int, default=8, help="size of what goes to a worker and back")
    parser.add_argument("--repeats", type=int, default=5, help="times that each part is measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers and the machine's facts here")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    return options


def main() -> None:
    """Measure, show, and keep the numbers where asked."""
    options = parse_arguments()
    results = measure(options)
    show(results)
    if options.json:
        command = f"python benchmarks/overheads.py {' '.join(options.parts)}".strip()
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"command": command, "machine": machine(), "results": results}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
