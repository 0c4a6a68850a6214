"""How long `ftk prepare` plans before its first image, and with how much memory: a table that names a million files.

The files are there: hard links to small images in a thousand folders. Each measurement is a process of its own, which does
what `ftk prepare` does on a fresh workspace before it makes shards: lists the sources, signs every file by its size and
time, cuts units and looks for finished shards. The memory is that process's peak, its imports included.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.table import Table

from ftk.locations import FRESH_SECONDS

TABLES = ("csv", "jsonl", "parquet")
FILES_A_FOLDER = 1000
LINKS_A_FILE = 1000  # of a limit of 65,000 on ext4
ROWS_A_GROUP = 50_000
MAX_SECONDS, MAX_BYTES = 60, 1 << 30


def names(count: int) -> Iterator[str]:
    """Relative paths of images, a thousand a folder."""
    return (f"{number // FILES_A_FOLDER:04d}/{number % FILES_A_FOLDER:04d}.png" for number in range(count))


def link_images(root: Path, count: int) -> None:
    """Make the files that `names` names."""
    for number, name in enumerate(names(count)):
        path = root / name
        if number % FILES_A_FOLDER == 0:
            path.parent.mkdir(parents=True)
        if number % LINKS_A_FILE == 0:
            original = path
            Image.new("RGB", (64, 64), (number // LINKS_A_FILE % 256, number % 251, 0)).save(path)
        else:
            os.link(original, path)


def write_table(root: Path, kind: str, count: int) -> Path:
    """`metadata.KIND`, with the columns of Hugging Face's imagefolder; streamed, for a million rows are much in memory."""
    path = root / f"metadata.{kind}"
    rows = ((name, f"a photograph of thing {number}, in daylight") for number, name in enumerate(names(count)))
    if kind == "parquet":
        schema = pa.schema([("file_name", pa.string()), ("text", pa.string())])
        with pq.ParquetWriter(path, schema) as writer:
            while batch := [row for _, row in zip(range(ROWS_A_GROUP), rows, strict=False)]:
                writer.write_table(pa.table(list(zip(*batch, strict=True)), schema=schema))
        return path
    with path.open("w") as file:
        file.write("file_name,text\n" if kind == "csv" else "")
        for name, text in rows:
            file.write(f'{name},"{text}"\n' if kind == "csv" else json.dumps({"file_name": name, "text": text}) + "\n")
    return path


def write_captions(root: Path, count: int) -> None:
    """A text file beside each image."""
    for number, name in enumerate(names(count)):
        (root / name).with_suffix(".txt").write_text(f"a photograph of thing {number}\n")


def plan_once(source: str, workspace: str) -> dict[str, Any]:
    """The measurement itself; runs in a process of its own."""
    from ftk.configs.load import validate
    from ftk.configs.schema import RunConfig
    from ftk.pipeline import source_units, stage
    from ftk.pipeline.shard_writer import PrepareJob
    from ftk.run import resolve

    tree = {
        "run": "bench",
        "workspace": workspace,
        "model": {"family": "qwen-image", "path": "unused"},
        "data": {"sources": [{"path": source}], "workers": 1},
    }
    run = resolve(validate(RunConfig, tree, "the benchmark's run file"))
    job = PrepareJob(directory=run.paths.prepared, recipes=stage.image_recipes(run), data=run.config.data)
    cpu, started = time.process_time(), time.perf_counter()
    source_units.look(run.config.data)
    planned = stage._planned(job, source_units.find_duplicates(run.config.data), stage.WHOLE)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    assert not any(planned.made)
    images = sum(count or 0 for count in planned.num_records)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": peak_bytes(),
        "units": len(planned.made),
        "images": images,
    }


def stat_once(root: str, count: int) -> dict[str, Any]:
    """The least that signing the files can take: asking for each one's size and time."""
    started = time.perf_counter()
    for name in names(count):
        (Path(root) / name).stat()
    return {"seconds": time.perf_counter() - started}


def peak_bytes() -> int:
    """Of this process alone: its `ru_maxrss` would begin with what its parent held when it was started."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_a_process(*arguments: str) -> dict[str, Any]:
    """What a measurement in a fresh interpreter gives."""
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A table of each kind, then a folder; interleaved, so that a machine that slows down slows all."""
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="ftk-bench-") as folder:
        tables, images = Path(folder) / "tables", Path(folder) / "images"
        link_images(tables, options.rows)
        link_images(images, options.files)
        write_captions(images, options.files)
        sources = {kind: str(write_table(tables, kind, options.rows)) for kind in TABLES} | {"folder": str(images)}
        # Nothing vouches for files that changed a moment ago.
        time.sleep(FRESH_SECONDS + 1)
        for _ in range(options.repeats):
            for kind, source in sources.items():
                found.setdefault(kind, []).append(in_a_process("--plan", source, str(Path(folder) / "work")))
            found.setdefault("stat alone", []).append(in_a_process("--stat", str(tables), str(options.rows)))
    return [summary(kind, runs, options.rows) for kind, runs in found.items()]


def summary(kind: str, runs: Sequence[dict[str, Any]], rows: int) -> dict[str, Any]:
    """Of one source's measurements."""
    found = {key: spread([run[key] for run in runs]) for key in ("seconds", "cpu_seconds", "peak_bytes") if key in runs[0]}
    return {"source": kind, "images": runs[0].get("images", rows), "units": runs[0].get("units"), **found}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine() -> dict[str, Any]:
    """Facts without which the numbers mean nothing."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = {library: importlib.metadata.version(library) for library in ("ftk", "pyarrow")}
    return {"cpu": cpu, "cpu_count": os.cpu_count(), "python": platform.python_version(), **versions}


def show(results: Sequence[dict[str, Any]]) -> None:
    """One row a source."""
    table = Table(title="Planning a fresh workspace", title_justify="left")
    table.add_column("source", no_wrap=True)
    for column in ("images", "units", "seconds", "range", "peak MiB", "target"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        seconds, peak = result["seconds"], result.get("peak_bytes")
        met = peak and seconds["max"] < MAX_SECONDS and peak["max"] < MAX_BYTES
        table.add_row(
            result["source"],
            f"{result['images']:,}",
            f"{result['units']:,}" if peak else "",
            f"{seconds['median']:.1f}",
            f"{seconds['min']:.1f}-{seconds['max']:.1f}",
            f"{peak['max'] / 2**20:,.0f}" if peak else "",
            ("met" if met else "missed") if peak else "",
        )
    console = Console()
    console.print(table)
    console.print(f"Target: under {MAX_SECONDS} s and {MAX_BYTES >> 20:,} MiB. `stat alone`: a loop over the tables' files.")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="of each table; multiples of 1,000")
    parser.add_argument("--files", type=int, default=100_000, help="images of the folder, each with a caption file")
    parser.add_argument("--repeats", type=int, default=3, help="times that each source is planned")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers and the machine's facts here")
    parser.add_argument("--plan", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--stat", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure every kind of source, or, as a process of its own, one."""
    options = parse_arguments()
    if options.plan or options.stat:
        print(json.dumps(plan_once(*options.plan) if options.plan else stat_once(options.stat[0], int(options.stat[1]))))
        return
    results = measure(options)
    show(results)
    if options.json:
        command = f"python benchmarks/plan.py --rows {options.rows} --files {options.files} --repeats {options.repeats}"
        report = {"command": command, "machine": machine(), "results": results}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
