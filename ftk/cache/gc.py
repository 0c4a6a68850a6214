"""`ftk gc`: remove from a cache what no sample names. Nothing else ever removes an item that is whole."""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ftk import storage
from ftk.cache import shards, view
from ftk.cache.shards import KINDS, RECEIPT, SHARD, Item
from ftk.cache.store import CacheStore
from ftk.contracts import CacheManifest
from ftk.errors import CacheError
from ftk.progress import track

_MAX_SHARD_BYTES = 256 << 20
_SMALL = 0.5
_WHAT = {
    "encoders": "folders of encoders that the cache no longer uses",
    "items": "items that no sample names",
    "small": "small shards, packed together",
    "files": "damaged files set aside, shards without a receipt, temporary files, tables of older views",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """One kind of garbage: how many files, folders or items, and the bytes that go with it."""

    what: str
    count: int
    num_bytes: int
    examples: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class GcReport:
    """What can be, or was, removed; shards with something to remove are written anew without it."""

    directory: str
    garbage: list[Garbage]
    num_shards_rewritten: int
    num_bytes: int
    removed: bool


@dataclass(slots=True)
class _Plan:
    """`repacked` holds, for each kind, the shards to write anew (rows of the shards' table) and the items to keep."""

    store: CacheStore
    folders: list[Path] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    dead: dict[str, pa.Table] = field(default_factory=dict)
    repacked: dict[str, tuple[list[int], list[str]]] = field(default_factory=dict)
    small: dict[str, int] = field(default_factory=dict)
    shard_bytes: dict[str, int] = field(default_factory=dict)


def run(directory: Path, remove: bool) -> GcReport:
    """Find what no sample names; with `remove`, remove it. A kill in between loses nothing: the next run goes on.

    Raises:
        CacheError: the cache is unfinished or damaged: what its samples name cannot be told.
        EnvironmentFault: another process writes to it.
    """
    if not (directory / view.MANIFEST).exists():
        raise CacheError(f"{directory} holds no finished cache: no {view.MANIFEST} in it. Name the folder of a cache.")
    with storage.lock(directory):
        plan = _plan(directory)
        report = _report(directory, plan, removed=remove)
        if remove and report.garbage:
            _remove(directory, plan)
    return report


def _plan(directory: Path) -> _Plan:
    store = CacheStore.open(directory)
    manifest = store.manifest
    plan = _Plan(store)
    used = {directory / "latents" / manifest.latents_fingerprint, directory / "texts" / manifest.texts_fingerprint}
    for kind in KINDS:
        plan.folders += [path for path in sorted((directory / kind).glob("*")) if path.is_dir() and path not in used]
        _find_items(plan, kind)
    tables = {view.table_path(directory, name, digest) for name, digest in manifest.tables.items()}
    plan.files = [path for path in sorted((directory / "view").glob("*")) if path not in tables]
    plan.files += sorted(directory.glob(f"{storage.TEMPORARY_PREFIX}*"))
    listed = {f"{row['kind']}/{row['fingerprint']}/{row['name']}" for row in store.shard_table.to_pylist()}
    for folder in sorted(used):
        for path in sorted(folder.glob("*") if folder.is_dir() else ()):
            name = f"{folder.parent.name}/{folder.name}/{path.name.removesuffix(SHARD).removesuffix(RECEIPT)}"
            if name not in listed:
                plan.files.append(path)
    return plan


def _find_items(plan: _Plan, kind: str) -> None:
    """Which items are named, and which shards hold others or are small."""
    items, shard_table = plan.store.index(kind), plan.store.shard_table
    live = pc.is_in(items["id"], value_set=plan.store.named(kind))
    plan.dead[kind] = items.filter(pc.invert(live))
    mine = pc.indices_nonzero(pc.equal(shard_table["kind"], kind)).to_pylist()
    wanting = set(plan.dead[kind]["shard"].to_pylist())
    # Items of a shard that another shard holds too are listed once: the second shard is only partly named.
    listed = np.bincount(items["shard"].to_numpy(), minlength=len(shard_table))
    wanting |= {shard for shard in mine if listed[shard] < shard_table["items"][shard].as_py()}
    sizes = {shard: shard_table["bytes"][shard].as_py() for shard in mine}
    plan.shard_bytes[kind] = min(_MAX_SHARD_BYTES, max(sizes.values(), default=0))
    small = [shard for shard in mine if sizes[shard] < _SMALL * plan.shard_bytes[kind]]
    plan.small[kind] = len(small) if len(small) > 1 else 0
    wanting |= set(small) if len(small) > 1 else set()
    kept = items.filter(pc.and_(live, pc.is_in(items["shard"], value_set=pa.array(sorted(wanting), pa.int32()))))
    plan.repacked[kind] = (sorted(wanting), _in_order(plan.store, kind, kept["id"]))


def _in_order(store: CacheStore, kind: str, ids: pa.ChunkedArray) -> list[str]:
    order = pc.index_in(ids, value_set=store.named(kind)).to_numpy()
    names: list[str] = ids.take(pa.array(np.argsort(order, kind="stable"))).to_pylist()
    return names


def _report(directory: Path, plan: _Plan, removed: bool) -> GcReport:
    def folder_bytes(paths: Iterable[Path]) -> int:
        return sum(file.stat().st_size for path in paths for file in ([path] if path.is_file() else path.rglob("*")))

    dead = pa.concat_tables(list(plan.dead.values()))
    num_small = sum(plan.small.values())
    found = {
        "encoders": (
            len(plan.folders),
            folder_bytes(plan.folders),
            [str(path.relative_to(directory)) for path in plan.folders],
        ),
        "items": (len(dead), int(pc.sum(dead["bytes"]).as_py() or 0), dead["id"].slice(0, 3).to_pylist()),
        "small": (num_small, 0, []),
        "files": (len(plan.files), folder_bytes(plan.files), [str(path.relative_to(directory)) for path in plan.files]),
    }
    garbage = [
        Garbage(what=_WHAT[name], count=count, num_bytes=num_bytes, examples=examples[:3])
        for name, (count, num_bytes, examples) in found.items()
        if count
    ]
    return GcReport(
        directory=str(directory),
        garbage=garbage,
        num_shards_rewritten=sum(len(shard_rows) for shard_rows, _ in plan.repacked.values()),
        num_bytes=sum(one.num_bytes for one in garbage),
        removed=removed,
    )


def _remove(directory: Path, plan: _Plan) -> None:
    """Write what is kept of the shards to be removed, swap the view, and only then remove them."""
    manifest = plan.store.manifest
    folders = {
        "latents": directory / "latents" / manifest.latents_fingerprint,
        "texts": directory / "texts" / manifest.texts_fingerprint,
    }
    old: list[Path] = []
    receipts = {}
    for kind, folder in folders.items():
        shard_rows, kept = plan.repacked[kind]
        written = {shards.write(folder, items).name for items in _packed(plan, kind, kept)}
        names = {plan.store.shard_table["name"][shard].as_py() for shard in shard_rows} - written
        found, _ = shards.receipts(folder, {})
        receipts[kind, folder.name] = [receipt for receipt in found if receipt.name not in names]
        # The receipt first: a shard without one counts for nothing.
        old += [folder / f"{name}{suffix}" for name in sorted(names) for suffix in (RECEIPT, SHARD)]
    view.commit(directory, {**view.merged(receipts), "samples": plan.store.table.cast(view.SAMPLE_SCHEMA)}, _facts(manifest))
    plan.store.close()
    for path in (*old, *plan.files):
        path.unlink(missing_ok=True)
    for path in plan.folders:
        shutil.rmtree(path)
    for kind, folder in folders.items():
        storage.fsync_directory(folder if folder.is_dir() else directory / kind)


def _packed(plan: _Plan, kind: str, kept: Sequence[str]) -> Iterator[list[Item]]:
    pending: list[Item] = []
    filled = 0
    with track(f"gc {kind}", len(kept), "item") as progress:
        for name in kept:
            tensors = plan.store.item(kind, name)
            size = sum(tensor.nbytes for tensor in tensors.values())
            if pending and filled + size > plan.shard_bytes[kind]:
                yield pending
                pending, filled = [], 0
            pending.append((name, tensors))
            filled += size
            progress.advance(1)
    if pending:
        yield pending


def _facts(manifest: CacheManifest) -> dict[str, Any]:
    given = {"schema_version", "num_samples", "tables", "digest"}
    return {entry.name: getattr(manifest, entry.name) for entry in fields(manifest) if entry.name not in given}
