"""Whether a long run takes more memory than a short one: peaks of `prepare`, `cache` and `train` on few and on many pictures.

Pictures are noise in many aspect ratios, some six times as large as the buckets that they become; each has its own caption.
The model is the tiny Qwen-Image. Each stage is a process of its own. Every 0.2 s its memory is read, with that of its child
processes: anonymous memory (`RssAnon` of /proc), and all that is resident (`VmRSS`), which also counts pages of libraries and
of mapped files, in each process that maps them. The largest value of each run and the ratio are printed; a flat program has a
ratio of 1. Few pictures must fill batches of every size and a few shards of the cache, so these are small: 8 images and 16 MiB.
Linux only.

    python benchmarks/memory_growth.py --edge 64 --stages prepare cache --json FILE
"""

import argparse
import importlib.metadata
import json
import os
import platform
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

STAGES = ("prepare", "cache", "train")
FIELDS = {"RssAnon": "anonymous", "VmRSS": "resident"}
POLL_SECONDS = 0.2
MICRO_BATCH = 4
RUN = """
run: growth
workspace: {directory}/work
model: {{family: qwen-image, path: {model}}}
data: {{sources: [{{path: {directory}/pictures}}], resolutions: [{edge}]}}
cache: {{device: cpu, image_batch: 8, shard_bytes: 16777216}}
train: {{steps: {steps}, global_batch_size: 4, micro_batch_size: 4, precision: fp32, device: cpu, checkpoint_every: 1000}}
"""


def make_pictures(folder: Path, count: int, edge: int) -> None:
    """JPEGs of 4.5 to 7.5 times the area of a bucket, each with a caption of its own."""
    folder.mkdir(parents=True)
    draw, noise = random.Random(0), np.random.default_rng(0)
    for number in range(count):
        aspect, area = draw.uniform(0.5, 2.0), draw.uniform(4.5, 7.5) * edge**2
        width, height = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        coarse = noise.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number:06d}.jpg", quality=85)
        (folder / f"{number:06d}.txt").write_text(f"picture {number} of {' '.join(['something'] * draw.randint(1, 30))}\n")


def memory_kib(process: psutil.Process) -> dict[str, int]:
    """Each of `FIELDS`, summed over a process and its children; those that have ended count nothing."""
    total = dict.fromkeys(FIELDS.values(), 0)
    for each in [process, *process.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{each.pid}/status").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            field, _, value = line.partition(":")
            if field in FIELDS:
                total[FIELDS[field]] += int(value.split()[0])
    return total


def peak_of(arguments: list[str]) -> dict[str, int]:
    """The most memory, in KiB, that a command holds while it runs."""
    running = subprocess.Popen([sys.executable, "-m", "ftk", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    process, peak = psutil.Process(running.pid), dict.fromkeys(FIELDS.values(), 0)
    while running.poll() is None:
        try:
            peak = {name: max(peak[name], kib) for name, kib in memory_kib(process).items()}
        except psutil.NoSuchProcess:
            break
        time.sleep(POLL_SECONDS)
    _, errors = running.communicate()
    if running.returncode:
        raise SystemExit(f"ftk {' '.join(arguments)} ended with {running.returncode}:\n{errors.decode()[-2000:]}")
    return peak


def measure(count: int, edge: int, model: Path, stages: Sequence[str]) -> dict[str, dict[str, int]]:
    """Peaks of each stage on `count` pictures; a stage needs what those before it make."""
    with tempfile.TemporaryDirectory(prefix="ftk-growth-") as name:
        directory = Path(name)
        make_pictures(directory / "pictures", count, edge)
        run_file = directory / "run.yaml"
        run_file.write_text(RUN.format(directory=directory, model=model, edge=edge, steps=max(1, count // MICRO_BATCH)))
        return {stage: peak_of([stage, str(run_file)]) for stage in stages}


def machine() -> dict[str, Any]:
    """Facts without which the numbers mean nothing."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    versions = {library: importlib.metadata.version(library) for library in ("ftk", "torch", "pyarrow")}
    return {"cpu": cpu, "cpu_count": os.cpu_count(), "threads": threads, "python": platform.python_version(), **versions}


def main() -> None:
    """Measure, print a table, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, default=3000)
    parser.add_argument("--many", type=int, default=30000)
    parser.add_argument("--edge", type=int, default=256, help="side of a square bucket, in pixels")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ftk-growth-model-") as name:
        model = Path(name) / "tiny"
        subprocess.run([sys.executable, "-m", "ftk", "tiny", "qwen-image", str(model)], check=True, stdout=subprocess.DEVNULL)
        few, many = (measure(count, options.edge, model, options.stages) for count in (options.few, options.many))
    results = [
        {
            "stage": stage,
            "memory": name,
            "few_mib": round(few[stage][name] / 1024),
            "many_mib": round(many[stage][name] / 1024),
            "ratio": round(many[stage][name] / few[stage][name], 3),
        }
        for stage in options.stages
        for name in FIELDS.values()
    ]
    print(f"{'stage':10}{'memory':12}{options.few:>12,}{options.many:>12,}{'ratio':>8}   (MiB)")
    for row in results:
        print(f"{row['stage']:10}{row['memory']:12}{row['few_mib']:>12,}{row['many_mib']:>12,}{row['ratio']:>8.2f}")
    if options.json:
        pictures = {"few": options.few, "many": options.many, "edge_px": options.edge}
        report = {"command": shlex.join(["python", *sys.argv]), "machine": machine(), "pictures": pictures, "results": results}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
