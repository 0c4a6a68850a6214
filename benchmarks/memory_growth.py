"""Whether a long run takes more memory than a short one: peaks of `prepare`, `cache` and `train` on few and on many pictures.

Pictures are noise of about 0.4 MP in some twenty aspect ratios, which become buckets of 256 px; the model is the tiny
Qwen-Image. Each stage is a process of its own. Every 0.2 s its anonymous memory is read, with that of its child processes:
`RssAnon` of /proc, which does not count what a mapped cache shares with the page cache. The largest value of each run and the
ratio are printed; a flat program has a ratio of 1. Few pictures must be enough to fill the batches of every size and a shard of
the cache, which takes thousands: below that, memory grows up to what these take. Linux only.

    python benchmarks/memory_growth.py --few 5000 --many 15000 --out results.json
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

STAGES = ("prepare", "cache", "train")
POLL_SECONDS = 0.2
MICRO_BATCH = 4
RUN = """
run: growth
workspace: {directory}/work
model: {{family: qwen-image, path: {model}}}
data: {{sources: [{{path: {directory}/pictures}}], resolutions: [256]}}
cache: {{device: cpu, memory_gib: 1}}
train: {{steps: {steps}, global_batch_size: 4, micro_batch_size: 4, precision: fp32, device: cpu, checkpoint_every: 1000}}
"""


def make_pictures(folder: Path, count: int) -> None:
    """JPEGs of 0.3 to 0.5 MP, each with a caption of its own."""
    folder.mkdir(parents=True)
    draw, noise = random.Random(0), np.random.default_rng(0)
    for number in range(count):
        aspect, area = draw.uniform(0.5, 2.0), draw.uniform(3e5, 5e5)
        width, height = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        coarse = noise.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number:06d}.jpg", quality=85)
        (folder / f"{number:06d}.txt").write_text(f"picture {number} of {' '.join(['something'] * draw.randint(1, 30))}\n")


def anonymous_bytes(process: psutil.Process) -> int:
    """Anonymous resident memory of a process and its children; 0 for those that have ended."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{each.pid}/status").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
    return total


def peak_of(arguments: list[str]) -> int:
    """The largest anonymous memory, in bytes, that a command holds while it runs."""
    running = subprocess.Popen([sys.executable, "-m", "ftk", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    process, peak = psutil.Process(running.pid), 0
    while running.poll() is None:
        try:
            peak = max(peak, anonymous_bytes(process))
        except psutil.NoSuchProcess:
            break
        time.sleep(POLL_SECONDS)
    _, errors = running.communicate()
    if running.returncode:
        raise SystemExit(f"ftk {' '.join(arguments)} ended with {running.returncode}:\n{errors.decode()[-2000:]}")
    return peak


def measure(count: int, model: Path, stages: Sequence[str]) -> dict[str, int]:
    """Peak bytes of each stage on `count` pictures; a stage needs what those before it make."""
    with tempfile.TemporaryDirectory(prefix="ftk-growth-") as name:
        directory = Path(name)
        make_pictures(directory / "pictures", count)
        run_file = directory / "run.yaml"
        run_file.write_text(RUN.format(directory=directory, model=model, steps=max(1, count // MICRO_BATCH)))
        return {stage: peak_of([stage, str(run_file)]) for stage in stages}


def main() -> None:
    """Measure, print a table, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, default=5000)
    parser.add_argument("--many", type=int, default=15000)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ftk-growth-model-") as name:
        model = Path(name) / "tiny"
        subprocess.run([sys.executable, "-m", "ftk", "tiny", "qwen-image", str(model)], check=True, stdout=subprocess.DEVNULL)
        few, many = (measure(count, model, options.stages) for count in (options.few, options.many))
    report = {
        "few": options.few,
        "many": options.many,
        "stages": {
            stage: {
                "few_mib": round(few[stage] / 2**20),
                "many_mib": round(many[stage] / 2**20),
                "ratio": round(many[stage] / few[stage], 3),
            }
            for stage in options.stages
        },
    }
    print(f"{'stage':10}{options.few:>12,}{options.many:>12,}{'ratio':>8}   (MiB)")
    for stage, row in report["stages"].items():
        print(f"{stage:10}{row['few_mib']:>12,}{row['many_mib']:>12,}{row['ratio']:>8.2f}")
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
