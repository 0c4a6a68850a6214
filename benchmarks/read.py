"""How fast ftk's cache gives samples back, against the formats that people use; and how fast a large cache opens.

Every format holds the same tensors. Each has a process of its own, so that no format meets the memory that another has left
behind, and the processes take turns: in a round each opens its files anew, reads every sample once (the first pass), then
four times more (the later pass), always in another random order; with one thread and with two. Every sample ends in a batch
that is allocated already, so the least a format can take is a copy in memory; that copy is measured too, and so is reading
the bytes from one file without any format. All is in the page cache, but for the cold passes, before which a format's files
are dropped from it. ftk compares an item's checksum when it is first read: in the first and the cold passes. The others
compare nothing.
"""

import os

os.environ.update({"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})

import argparse
import functools
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import math
import multiprocessing
import platform
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from ftk import storage
from ftk.cache import shards, view
from ftk.cache.store import CacheStore
from ftk.configs.schema import CacheConfig

LATENT = ((16, 128, 128), torch.float16)
FULL = {"mean": LATENT, "std": LATENT, "text": ((200, 3584), torch.bfloat16)}
PAYLOADS = {"latents and text": FULL, "one latent": {"mean": LATENT}}
BATCH = 8
TIMES_LATER = 4
SAMPLES_A_TAR = 32
THREADS = (1, 2)
BASELINE = "ftk"
LIBRARIES = ("ftk", "torch", "numpy", "pyarrow", "safetensors", "webdataset", "mosaicml-streaming")
PEERS = (
    "pip install --target PEERS --no-deps mosaicml-streaming==0.13.0 brotli python-snappy cramjam zstd catalogue, "
    "then run with --peers PEERS"
)

STARTUP = (10_000, 100_000, 1_000_000)
ITEMS_A_SHARD = {"latents": 250, "texts": 200}
MAX_SECONDS, MAX_BYTES = 3, 1 << 30

Field = tuple[tuple[int, ...], torch.dtype]
Slot = tuple[torch.Tensor, ...]
Fill = Callable[[Sequence[int], Iterator[Slot]], Iterator[tuple[int, Slot]]]
Item = tuple[str, Mapping[str, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What every format stores, and in which folder: `count` samples of these tensors (shape and type by name)."""

    folder: Path
    fields: Mapping[str, Field]
    count: int

    def sample(self, number: int) -> dict[str, torch.Tensor]:
        """Noise; equal for equal numbers."""
        generator = torch.Generator().manual_seed(number)
        return {name: torch.randn(shape, generator=generator).to(dtype) for name, (shape, dtype) in self.fields.items()}

    def arrays(self, number: int) -> dict[str, np.ndarray]:
        """The same for formats of numpy arrays, which knows no bfloat16: its bits."""
        return {
            name: (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
            for name, tensor in self.sample(number).items()
        }

    def batch(self) -> Iterator[Slot]:
        """The places of a batch, over and over."""
        tensors = [torch.zeros((BATCH, *shape), dtype=dtype) for shape, dtype in self.fields.values()]
        return itertools.cycle(list(zip(*tensors, strict=True)))

    @property
    def sample_bytes(self) -> int:
        """Of the tensors of one sample."""
        return sum(map(num_bytes, self.fields.values()))


def num_bytes(field: Field) -> int:
    """Of one tensor."""
    shape, dtype = field
    return math.prod(shape) * dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How samples are written to a folder, and how they are read from there.

    `fill` copies the samples of these numbers into one place after another; one that `is_sequential` gets numbers that
    ascend. `in_memory`: it has no files, and is opened once. `needs`: a module that must be there.
    """

    folder: str
    write: Callable[[Data], None]
    open: Callable[[Data], Fill]
    is_sequential: bool = False
    in_memory: bool = False
    needs: str = ""


def copy(slot: Slot, tensors: Iterable[torch.Tensor]) -> None:
    """Into a place of the batch."""
    for place, tensor in zip(slot, tensors, strict=True):
        place.copy_(tensor)


def copy_arrays(slot: Slot, arrays: Iterable[np.ndarray]) -> None:
    """The same from numpy arrays, which may hold the bits of bfloat16."""
    copy(slot, (torch.from_numpy(array).view(place.dtype) for place, array in zip(slot, arrays, strict=True)))


def one_by_one(read: Callable[[int, Slot], None]) -> Fill:
    """Of a format that can read any sample."""

    def fill(numbers: Sequence[int], slots: Iterator[Slot]) -> Iterator[tuple[int, Slot]]:
        for number in numbers:
            slot = next(slots)
            read(number, slot)
            yield number, slot

    return fill


# What takes part.


def write_nothing(data: Data) -> None:
    """What is read lies in memory."""


def open_memory(data: Data) -> Fill:
    """A copy from memory to memory: the least that reading can take."""
    held = [tuple(data.sample(number).values()) for number in range(data.count)]
    return one_by_one(lambda number, slot: copy(slot, held[number]))


def write_raw(data: Data) -> None:
    """All bytes one after another."""
    with (data.folder / "samples").open("wb") as file:
        for number in range(data.count):
            for array in data.arrays(number).values():
                file.write(array.tobytes())


def open_raw(data: Data) -> Fill:
    """`pread` from one file straight into the batch: the least that reading from the page cache can take."""
    file = (data.folder / "samples").open("rb", buffering=0)

    def read(number: int, slot: Slot) -> None:
        places = [memoryview(place.view(torch.uint8).reshape(-1).numpy()) for place in slot]
        assert os.preadv(file.fileno(), places, number * data.sample_bytes) == data.sample_bytes

    return one_by_one(read)


def item_id(kind: str, number: int) -> str:
    """As ftk names items: 32 hex digits."""
    return storage.digest([kind, number])


def write_cache(folder: Path, items: Mapping[str, Iterator[Item]], items_a_shard: Mapping[str, int], samples: pa.Table) -> None:
    """A sealed cache of ftk's."""
    fingerprints = {kind: storage.digest(["benchmark", kind]) for kind in shards.KINDS}
    receipts: dict[tuple[str, str], list[shards.Receipt]] = {}
    for kind, fingerprint in fingerprints.items():
        written = receipts.setdefault((kind, fingerprint), [])
        while unit := list(itertools.islice(items[kind], items_a_shard[kind])):
            written.append(shards.write(folder / kind / fingerprint, unit))
    facts = {f"{kind}_fingerprint": fingerprint for kind, fingerprint in fingerprints.items()} | {
        **{"family": "qwen-image", "prepared_fingerprint": "", "empty_text": item_id("empty", 0)},
        **{name: {} for name in ("encoders", "normalisation", "prepared_recipe", "prompts")},
    }
    view.commit(folder, {**view.merged(receipts), "samples": samples}, facts)


def samples_table(count: int, text_lengths: Sequence[int]) -> pa.Table:
    """The table of samples; with a caption each when lengths are given."""
    numbers = range(count)
    columns: dict[str, Any] = {
        "key": [f"photos/IMG_{number:06d}" for number in numbers],
        "latents": [item_id("latents", number) for number in numbers],
        "controls": [[]] * count,
        "mask": [""] * count,
        "texts": [[item_id("texts", number)] for number in numbers] if text_lengths else [[]] * count,
        "text_lengths": [[length] for length in text_lengths] if text_lengths else [[]] * count,
        "flipped": [number % 2 == 0 for number in numbers],
        "role": ["instance"] * count,
    }
    rest = [name for name in view.SAMPLE_SCHEMA.names if name not in columns]
    columns |= {name: [1024 if "bucket" in name else 1 + number % 4000 for number in numbers] for name in rest}
    return pa.table(columns, schema=view.SAMPLE_SCHEMA)


def ftk_items(data: Data, kind: str) -> Iterator[Item]:
    """What the cache keeps of each sample under `latents` or under `texts`."""
    for number in range(data.count):
        sample = data.sample(number)
        text = sample.pop("text", None)
        if kind == "latents":
            yield item_id(kind, number), sample
        elif text is not None:
            yield item_id(kind, number), {"embeds": text}


def write_ftk(data: Data) -> None:
    """Shards of the size that `ftk cache` makes by default."""
    num_tokens = data.fields["text"][0][0] if "text" in data.fields else 0
    text_bytes = num_bytes(data.fields["text"]) if num_tokens else data.sample_bytes
    item_bytes = {"texts": text_bytes, "latents": data.sample_bytes - (text_bytes if num_tokens else 0)}
    empty = (item_id("empty", 0), {"embeds": torch.zeros(1, 1, dtype=torch.bfloat16)})
    write_cache(
        data.folder,
        {"latents": ftk_items(data, "latents"), "texts": itertools.chain([empty], ftk_items(data, "texts"))},
        {kind: CacheConfig().shard_bytes // size for kind, size in item_bytes.items()},
        samples_table(data.count, [num_tokens] * data.count if num_tokens else []),
    )


def open_ftk(data: Data) -> Fill:
    """As training reads."""
    store = CacheStore.open(data.folder)

    def read(number: int, slot: Slot) -> None:
        copy(slot, (*store.latents(number), store.text(number)["embeds"]))

    def read_latent(number: int, slot: Slot) -> None:
        copy(slot, store.item("latents", ids[number]).values())

    ids = store.table["latents"].to_pylist()
    return one_by_one(read if "text" in data.fields else read_latent)


def write_tar(data: Data) -> None:
    """What webdataset writes: a `.npy` for each tensor."""
    import webdataset

    pattern = str(data.folder / "%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=SAMPLES_A_TAR, maxsize=1 << 40, verbose=0) as writer:
        for number in range(data.count):
            arrays = {f"{name}.npy": array for name, array in data.arrays(number).items()}
            writer.write({"__key__": f"{number:06d}", **arrays})


def open_tar_in_order(data: Data) -> Fill:
    """webdataset itself, which reads from a tar's begin to its end; a thread has tars of its own."""
    import webdataset

    tars = sorted(data.folder.glob("*.tar"))

    def fill(numbers: Sequence[int], slots: Iterator[Slot]) -> Iterator[tuple[int, Slot]]:
        mine = [str(tars[number // SAMPLES_A_TAR]) for number in numbers if number % SAMPLES_A_TAR == 0]
        for sample in webdataset.WebDataset(mine, shardshuffle=False, empty_check=False).decode() if mine else ():
            slot = next(slots)
            copy_arrays(slot, (sample[f"{name}.npy"] for name in data.fields))
            yield int(sample["__key__"]), slot

    return fill


def open_tar_by_index(data: Data) -> Fill:
    """An index made beforehand, `pread`, and webdataset's decoder: webdataset has no random access."""
    from webdataset.autodecode import npy_loads

    places: dict[str, tuple[Any, int, int]] = {}
    for path in sorted(data.folder.glob("*.tar")):
        file = path.open("rb", buffering=0)
        with tarfile.open(path) as tar:
            places |= {member.name: (file, member.offset_data, member.size) for member in tar}

    def read(number: int, slot: Slot) -> None:
        found = (places[f"{number:06d}.{name}.npy"] for name in data.fields)
        copy_arrays(slot, (npy_loads(os.pread(file.fileno(), size, begin)) for file, begin, size in found))

    return one_by_one(read)


def import_streaming() -> types.ModuleType:
    """MosaicML Streaming, without its image datasets: they import torchvision, which must be of torch's own build."""
    sys.modules.setdefault("streaming.vision", types.ModuleType("streaming.vision"))
    import streaming

    return streaming


def write_mds(data: Data) -> None:
    """Columns of fixed types and shapes, all else by default: shards of 64 MiB, no compression, no hashes."""
    columns = {
        name: f"ndarray:{array.dtype.name}:{','.join(str(size) for size in array.shape)}"
        for name, array in data.arrays(0).items()
    }
    with import_streaming().MDSWriter(out=str(data.folder), columns=columns) as writer:
        for number in range(data.count):
            writer.write(data.arrays(number))


def open_mds(data: Data) -> Fill:
    """`LocalDataset`: decodes as `StreamingDataset` does, and does less besides."""
    dataset = import_streaming().LocalDataset(local=str(data.folder))

    def read(number: int, slot: Slot) -> None:
        sample = dataset[number]
        copy_arrays(slot, (sample[name] for name in data.fields))

    return one_by_one(read)


def write_files(data: Data, suffix: str, save: Callable[[dict[str, torch.Tensor], Path], None]) -> None:
    """A file a sample."""
    for number in range(data.count):
        save(data.sample(number), data.folder / f"{number:06d}{suffix}")


def open_files(data: Data, suffix: str, load: Callable[[Path], dict[str, torch.Tensor]]) -> Fill:
    """A file a sample."""

    def read(number: int, slot: Slot) -> None:
        sample = load(data.folder / f"{number:06d}{suffix}")
        copy(slot, (sample[name] for name in data.fields))

    return one_by_one(read)


FORMATS = {
    "memory copy": Format(folder="none", write=write_nothing, open=open_memory, in_memory=True),
    "raw pread": Format(folder="raw", write=write_raw, open=open_raw),
    BASELINE: Format(folder="ftk", write=write_ftk, open=open_ftk),
    "safetensors a sample": Format(
        folder="safetensors",
        write=functools.partial(write_files, suffix=".safetensors", save=save_file),
        open=functools.partial(open_files, suffix=".safetensors", load=load_file),
    ),
    "torch.save a sample": Format(
        folder="pt",
        write=functools.partial(write_files, suffix=".pt", save=torch.save),
        open=functools.partial(open_files, suffix=".pt", load=functools.partial(torch.load, weights_only=True)),
    ),
    "MDS": Format(folder="mds", write=write_mds, open=open_mds, needs="streaming"),
    "tar by an index": Format(folder="tar", write=write_tar, open=open_tar_by_index, needs="webdataset"),
    "WebDataset, in order": Format(
        folder="tar", write=write_tar, open=open_tar_in_order, is_sequential=True, needs="webdataset"
    ),
}


# A format's own process.


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """What a process does in its turn: open its files, read all samples, and read all once more unless it is cold."""

    threads: int
    seed: int
    is_cold: bool = False


def work(name: str, data: Data, parent: Connection) -> None:
    """Write the samples, see that they come back as they were, and then do the visits that the parent asks for."""
    # The arrays that some formats give cannot be written to, and nobody does.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    written = FORMATS[name]
    if not data.folder.exists():
        data.folder.mkdir(parents=True)
        written.write(data)
        flush(data.folder)
    opened: Fill | None = written.open(data)
    verify(name, data, opened)
    files = [path for path in data.folder.rglob("*") if path.is_file()]
    parent.send({"num_files": len(files), "disk_bytes_a_sample": sum(path.stat().st_size for path in files) / data.count})
    batches = [data.batch() for _ in range(max(THREADS))]
    if not written.in_memory:
        opened = None
    while (visit := parent.recv()) is not None:
        parent.send(do_visit(visit, written, data, batches, opened))


def verify(name: str, data: Data, fill: Fill) -> None:
    """All samples have to be there, and equal."""
    read = fill(range(data.count), data.batch())
    equal = {number: all(map(torch.equal, slot, data.sample(number).values())) for number, slot in read}
    assert equal == dict.fromkeys(range(data.count), True), f"{name} does not give back what was written"


def flush(folder: Path) -> None:
    """To the disk: pages that wait to be written cannot be dropped."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def do_visit(visit: Visit, written: Format, data: Data, batches: Sequence[Iterator[Slot]], fill: Fill | None) -> dict[str, Any]:
    """Seconds, by kind of pass; of a cold one also how much of it came from the disk."""
    if visit.is_cold:
        # Mapped pages stay in the cache until nobody maps them.
        gc.collect()
        for path in data.folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    fill = fill or written.open(data)
    found = {}
    for number, kind in enumerate(("cold",) if visit.is_cold else ("first", "later")):
        generator = np.random.default_rng([visit.seed, number])
        times = TIMES_LATER if kind == "later" else 1
        orders = [np.arange(data.count) if written.is_sequential else generator.permutation(data.count) for _ in range(times)]
        found[kind] = one_pass(fill, np.concatenate(orders), batches[: visit.threads])
    return found


def one_pass(fill: Fill, order: np.ndarray, batches: Sequence[Iterator[Slot]]) -> dict[str, float]:
    """Read all samples, by a thread for each batch."""

    def read(part: np.ndarray, slots: Iterator[Slot]) -> int:
        torch.set_num_threads(1)
        return sum(1 for _ in fill(part.tolist(), slots))

    parts = np.array_split(order, len(batches))
    from_disk, cpu, started = bytes_from_disk(), time.process_time(), time.perf_counter()
    with ThreadPoolExecutor(len(batches)) as pool:
        num_read = sum(pool.map(read, parts, batches))
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    assert num_read == len(order), f"{num_read} of {len(order)} samples were read"
    return {
        "seconds_a_sample": seconds / num_read,
        "cpu_seconds_a_sample": cpu_seconds / num_read,
        "disk_bytes_a_sample": (bytes_from_disk() - from_disk) / num_read,
    }


def bytes_from_disk() -> int:
    """What this process has had the disk read for it; 0 where the system does not say."""
    facts = Path("/proc/self/io")
    lines = facts.read_text().splitlines() if facts.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)


# The race.


def say(text: str) -> None:
    """What goes on."""
    Console(stderr=True).print(text, markup=False, highlight=False)


def present() -> list[str]:
    """The formats whose libraries are there; says which are not."""
    missing = [name for name, each in FORMATS.items() if each.needs and importlib.util.find_spec(each.needs) is None]
    if missing:
        found = f"Left out: {', '.join(missing)}. To add MDS: {PEERS}."
        say(found)
    return [name for name in FORMATS if name not in missing]


def race(payload: str, options: argparse.Namespace) -> dict[str, Any]:
    """All formats of one payload."""
    names, context = present(), multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="ftk-bench-", dir=options.directory) as folder:
        processes, workers, facts = [], {}, {}
        for name in names:
            say(f"{payload}: {name}")
            data = Data(folder=Path(folder) / FORMATS[name].folder, fields=PAYLOADS[payload], count=options.samples)
            pipe, other = context.Pipe()
            processes.append(context.Process(target=work, args=(name, data, other), daemon=True))
            processes[-1].start()
            other.close()
            workers[name], facts[name] = pipe, pipe.recv()
        runs = visits(workers, options)
        for pipe, process in zip(workers.values(), processes, strict=True):
            pipe.send(None)
            process.join()
    return {
        "payload": payload,
        "samples": options.samples,
        "sample_bytes": data.sample_bytes,
        "formats": {name: facts[name] | passes(name, runs, data) for name in names},
    }


def visits(workers: Mapping[str, Any], options: argparse.Namespace) -> dict[tuple[str, int, str], list[dict[str, float]]]:
    """By format, threads and kind of pass: each round's numbers. Whose turn comes first moves on by one a round."""
    found: dict[tuple[str, int, str], list[dict[str, float]]] = {}
    names = list(workers)
    can_drop = hasattr(os, "posix_fadvise")
    # The first round counts for nothing: in it libraries load what they put off.
    rounds = [(number, False) for number in range(options.rounds + 1)]
    rounds += [(len(rounds) + number, True) for number in range(options.cold_rounds * can_drop)]
    for number, is_cold in rounds:
        say(f"{'cold ' * is_cold}round {number} of {len(rounds) - 1}")
        first = number % len(names)
        for threads, name in itertools.product(THREADS, [*names[first:], *names[:first]]):
            if is_cold and FORMATS[name].in_memory:
                continue
            workers[name].send(Visit(threads=threads, seed=number, is_cold=is_cold))
            for kind, measured in workers[name].recv().items():
                found.setdefault((name, threads, kind), []).extend([measured] if number else [])
    return found


def passes(name: str, runs: Mapping[tuple[str, int, str], list[dict[str, float]]], data: Data) -> dict[str, Any]:
    """What one format's passes came to; `ratio`: times ftk's speed in the same kind of pass and round."""
    found: dict[str, Any] = {}
    for (own, threads, kind), measured in runs.items():
        if own != name:
            continue
        both = list(zip(measured, runs[BASELINE, threads, kind], strict=True))
        found[f"{kind}, {threads} thread{'s'[: threads - 1]}"] = {
            "samples_a_second": spread([1 / each["seconds_a_sample"] for each in measured]),
            "gigabytes_a_second": spread([data.sample_bytes / each["seconds_a_sample"] / 1e9 for each in measured]),
            "cpu_microseconds_a_sample": spread([1e6 * each["cpu_seconds_a_sample"] for each in measured]),
            "ratio": spread([base["seconds_a_sample"] / each["seconds_a_sample"] for each, base in both]),
            "cpu_ratio": spread([base["cpu_seconds_a_sample"] / each["cpu_seconds_a_sample"] for each, base in both]),
            "from_disk": spread([each["disk_bytes_a_sample"] / data.sample_bytes for each in measured]),
        }
    return {"passes": found}


# Opening a large cache.


def build(folder: str, count: str) -> dict[str, Any]:
    """A cache of tiny items, in a process of its own: nothing is written through to the disk, which would take most of it."""
    os.fsync = lambda descriptor: None
    num_samples = int(count)
    lengths: list[int] = np.random.default_rng(0).integers(8, 256, num_samples).tolist()
    # Items that differ, so that their checksums do.
    noise = torch.randn(num_samples + 256, generator=torch.Generator().manual_seed(0))
    latent, text = noise.to(torch.float16).reshape(-1, 1, 1), noise.to(torch.bfloat16).reshape(-1, 1)
    latents = (
        (item_id("latents", at), {"mean": latent[at : at + 4].clone(), "std": latent[at + 4 : at + 8].clone()})
        for at in range(num_samples)
    )
    texts = ((item_id("texts", at), {"embeds": text[at : at + length].clone()}) for at, length in enumerate(lengths))
    empty = (item_id("empty", 0), {"embeds": text[:1]})
    started = time.perf_counter()
    items = {"latents": latents, "texts": itertools.chain([empty], texts)}
    write_cache(Path(folder), items, ITEMS_A_SHARD, samples_table(num_samples, lengths))
    view_bytes = sum(path.stat().st_size for path in (Path(folder) / "view").iterdir())
    return {"build_seconds": time.perf_counter() - started, "view_bytes": view_bytes}


def open_once(small: str, folder: str) -> dict[str, Any]:
    """The measurement itself; runs in a process of its own. A small cache first: opening it loads what libraries put off."""
    steps: dict[str, float] = {}

    def measure(step: str, run: Callable[[], Any]) -> Any:
        cpu, started = time.process_time(), time.perf_counter()
        result = run()
        steps[f"{step}_seconds"], steps[f"{step}_cpu_seconds"] = time.perf_counter() - started, time.process_time() - cpu
        steps[f"{step}_peak_bytes"] = resident_bytes("VmHWM")
        steps[f"{step}_resident_bytes"] = resident_bytes("VmRSS")
        return result

    measure("small", lambda: CacheStore.open(small))
    store = measure("open", lambda: CacheStore.open(folder))
    number = len(store) // 3
    measure("first_sample", lambda: (store.sample(number), store.latents(number), store.text(number)))
    columns = ("key", "bucket_width", "bucket_height", "repeats")
    measure("list", lambda: [store.table[column].to_pylist() for column in columns])
    measure("empty_text", store.empty_text)
    return {"shards": len(store.shard_table), "arrow_bytes": pa.total_allocated_bytes(), **steps}


def resident_bytes(fact: str) -> int:
    """Of this process: `VmRSS` is now, `VmHWM` its greatest so far."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith(f"{fact}:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_a_process(*arguments: str) -> dict[str, Any]:
    """What a measurement in a fresh interpreter gives."""
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def startup(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Caches of each size; their openings take turns."""
    with tempfile.TemporaryDirectory(prefix="ftk-bench-", dir=options.directory) as folder:
        say(f"building caches of {', '.join(f'{count:,}' for count in options.startup_samples)} samples")
        built = {
            count: in_a_process("--build", str(Path(folder) / str(count)), str(count)) for count in options.startup_samples
        }
        runs: dict[int, list[dict[str, Any]]] = {count: [] for count in built}
        say("opening")
        small = str(Path(folder) / "small")
        in_a_process("--build", small, "1")
        for _, count in itertools.product(range(options.repeats), built):
            runs[count].append(in_a_process("--open", small, str(Path(folder) / str(count))))
    return [
        {"samples": count, **built[count], **{key: spread([run[key] for run in measured]) for key in measured[0]}}
        for count, measured in runs.items()
    ]


# Reporting.


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine() -> dict[str, Any]:
    """Facts without which the numbers mean nothing. `load`: tasks that ran or waited in the minute before the start."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = "absent"
    facts = {"cpu": cpu, "cpu_count": os.cpu_count(), "memory_bytes": memory, "load": os.getloadavg()[0]}
    return {**facts, "kernel": platform.release(), "python": platform.python_version(), **versions}


def show_race(result: dict[str, Any], console: Console) -> None:
    """A table for each kind of pass, then one of the files."""
    about = f"{result['payload']} ({result['sample_bytes'] / 1e6:.2f} MB a sample, {result['samples']} samples)"
    for kind in next(reversed(result["formats"].values()))["passes"]:
        table = new_table(f"{about}: {kind}", ["samples/s", "range", "GB/s", "×", "range", "CPU µs", "CPU ×", "disk"])
        for name, found in result["formats"].items():
            if kind in found["passes"]:
                table.add_row(name, *pass_cells(found["passes"][kind]))
        console.print(table)
    table = new_table(f"{about}: on disk", ["files", "bytes a sample", "beyond the tensors"])
    for name, found in result["formats"].items():
        stored = found["disk_bytes_a_sample"]
        extra = f"{100 * (stored / result['sample_bytes'] - 1):.2f} %" if stored else ""
        table.add_row(name, f"{found['num_files']:,}", f"{stored:,.0f}", extra)
    console.print(table)


def pass_cells(found: dict[str, Any]) -> list[str]:
    speed, ratio = found["samples_a_second"], found["ratio"]
    return [
        f"{speed['median']:,.0f}",
        f"{speed['min']:,.0f}-{speed['max']:,.0f}",
        f"{found['gigabytes_a_second']['median']:.1f}",
        f"{ratio['median']:.2f}",
        f"{ratio['min']:.2f}-{ratio['max']:.2f}",
        f"{found['cpu_microseconds_a_sample']['median']:,.0f}",
        f"{found['cpu_ratio']['median']:.2f}",
        f"{100 * found['from_disk']['median']:.0f} %",
    ]


def show_startup(results: Sequence[dict[str, Any]], console: Console) -> None:
    """One row a cache."""
    columns = [
        "shards",
        "open s",
        "range",
        "CPU s",
        "peak MiB",
        "grew by",
        "target",
        "sample ms",
        "list s",
        "empty text s",
        "peak MiB",
    ]
    table = new_table("Opening a cache", columns)
    for result in results:
        seconds, peak = result["open_seconds"], result["open_peak_bytes"]
        met = seconds["max"] < MAX_SECONDS and peak["max"] < MAX_BYTES
        table.add_row(
            f"{result['samples']:,}",
            f"{result['shards']['median']:,.0f}",
            f"{seconds['median']:.2f}",
            f"{seconds['min']:.2f}-{seconds['max']:.2f}",
            f"{result['open_cpu_seconds']['median']:.2f}",
            f"{peak['max'] / 2**20:,.0f}",
            f"{(peak['median'] - result['small_resident_bytes']['median']) / 2**20:,.0f}",
            "met" if met else "missed",
            f"{1000 * result['first_sample_seconds']['median']:.1f}",
            f"{result['list_seconds']['median']:.2f}",
            f"{result['empty_text_seconds']['median']:.2f}",
            f"{result['empty_text_peak_bytes']['max'] / 2**20:,.0f}",
        )
    console.print(table)
    console.print(
        f"Target: under {MAX_SECONDS} s and {MAX_BYTES >> 20:,} MiB. The last peak is after all steps; imports are in both."
    )


def new_table(title: str, columns: Sequence[str]) -> Table:
    """The first column is for names."""
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def show(report: dict[str, Any]) -> None:
    """Everything that was measured."""
    console = Console(width=max(Console().width, 128))
    for result in report["races"]:
        show_race(result, console)
    if report["races"]:
        console.print(
            "×: times ftk's speed in the same pass, by the clock and by CPU time; median, least, greatest of the rounds."
        )
        console.print("disk: bytes that came from it, of all. Only ftk compares checksums, in the first and the cold passes.")
    if report["startup"]:
        show_startup(report["startup"], console)
    before, after = (report["machine"][name] for name in ("load", "load_after"))
    console.print(
        f"Load of the machine: {before:.1f} before, {after:.1f} at the end; {THREADS[-1]} or less at the end is this program's."
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--latent-only", action="store_true", help="samples of one latent tensor instead of latents and text")
    parser.add_argument("--startup", action="store_true", help="measure how large caches open instead")
    parser.add_argument("--all", action="store_true", help="measure both kinds of samples, and how large caches open")
    parser.add_argument("--samples", type=int, default=256, help="of each format; all of it has to fit into the page cache")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each format")
    parser.add_argument("--cold-rounds", type=int, default=3, help="turns in which the files are not in the page cache")
    parser.add_argument("--startup-samples", type=int, nargs="+", default=STARTUP, help="sizes of the caches that are opened")
    parser.add_argument("--repeats", type=int, default=3, help="times that each cache is opened")
    parser.add_argument("--peers", metavar="DIR", help="where MosaicML Streaming is installed, if not beside ftk")
    parser.add_argument("--directory", metavar="DIR", help="where the data are put for the time being, on a local disk")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers and the machine's facts here")
    parser.add_argument("--build", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--open", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure what was asked for, or, as a process of its own, a part of it."""
    options = parse_arguments()
    if options.build or options.open:
        print(json.dumps(build(*options.build) if options.build else open_once(*options.open)))
        return
    if options.peers:
        sys.path.append(options.peers)
    report: dict[str, Any] = {"command": shown_command(options), "machine": machine()}
    payloads = list(PAYLOADS) if options.all else [] if options.startup else [list(PAYLOADS)[options.latent_only]]
    report["races"] = [race(payload, options) for payload in payloads]
    report["startup"] = startup(options) if options.all or options.startup else []
    report["machine"]["load_after"] = os.getloadavg()[0]
    show(report)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def shown_command(options: argparse.Namespace) -> str:
    """What to type for the same measurement, without the folders."""
    flags = [f" --{name.replace('_', '-')}" for name in ("latent_only", "startup", "all") if getattr(options, name)]
    values = [
        f" --{name.replace('_', '-')} {getattr(options, name)}" for name in ("samples", "rounds", "cold_rounds", "repeats")
    ]
    return "python benchmarks/read.py" + "".join(flags + values) + " --peers PEERS" * (options.peers is not None)


if __name__ == "__main__":
    main()
