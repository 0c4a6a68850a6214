"""`ftk gc`: remove from a cache what no sample names. Nothing else ever removes an item that is whole."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ftk import storage
from ftk.cache import shards, view
from ftk.cache.shards import KINDS, RECEIPT, SHARD
from ftk.cache.store import CacheStore
from ftk.contracts import CacheManifest
from ftk.errors import CacheError
from ftk.progress import track

_MAX_SHARD_BYTES = 256 << 20
_SMALL = 0.5
_EXAMPLES = 3
_WHAT = {
    "encoders": "folders of encoders that the cache no longer uses",
    "items": "items that no sample names",
    "twice": "items that another shard holds too",
    "small": "small shards, packed together",
    "files": "files that the view does not list: set aside as damaged, left by a run that did not end, tables of older views",
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


@dataclass(slots=True, kw_only=True)
class _Kind:
    """One kind's items that no sample names, items that a second shard holds too, and the shards to write anew."""

    dead: pa.Table
    num_twice: int
    num_small: int
    rewritten: list[str]
    packed: list[list[str]]


@dataclass(slots=True)
class _Plan:
    """What is to go."""

    store: CacheStore
    folders: list[Path] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    kinds: dict[str, _Kind] = field(default_factory=dict)


def run(directory: Path, remove: bool) -> GcReport:
    """Find what no sample names; with `remove`, remove it. A kill in between loses nothing: the next run goes on.

    Raises:
        CacheError: the cache is unfinished or damaged: what its samples name cannot be told.
        EnvironmentFault: another process writes to it.
    """
    if not (directory / view.MANIFEST).exists():
        raise CacheError(f"{directory} holds no finished cache: no {view.MANIFEST} in it. Name the folder of a cache.")
    with storage.lock(directory) if remove else storage.reading(directory):
        plan = _plan(directory)
        report = _report(directory, plan, removed=remove)
        if remove and report.garbage:
            _remove(directory, plan)
    return report


def _plan(directory: Path) -> _Plan:
    store = CacheStore.open(directory)
    plan = _Plan(store)
    used = _folders(directory, store)
    for kind in KINDS:
        # What a link points to is not the cache's.
        folders = (path for path in sorted((directory / kind).glob("*")) if path.is_dir() and not path.is_symlink())
        plan.folders += [path for path in folders if path != used[kind]]
        plan.kinds[kind] = _find_items(store, kind)
        plan.files += _unlisted(store, kind, used[kind])
    tables = {view.table_path(directory, name, digest) for name, digest in store.manifest.tables.items()}
    plan.files += [path for path in sorted((directory / "view").glob("*")) if path not in tables]
    plan.files += sorted(directory.glob(f"{storage.TEMPORARY_PREFIX}*"))
    return plan


def _folders(directory: Path, store: CacheStore) -> dict[str, Path]:
    """The folder of each kind that the view uses."""
    manifest = store.manifest
    return {
        "latents": directory / "latents" / manifest.latents_fingerprint,
        "texts": directory / "texts" / manifest.texts_fingerprint,
    }


def _names(store: CacheStore, kind: str) -> list[str]:
    """The shards of a kind that the view lists."""
    names: list[str] = store.shard_table.filter(pc.equal(store.shard_table["kind"], kind))["name"].to_pylist()
    return names


def _unlisted(store: CacheStore, kind: str, folder: Path) -> list[Path]:
    """Files that the view does not list; in the order of their names, so a receipt goes before its shard."""
    files = {f"{name}{suffix}" for name in _names(store, kind) for suffix in (SHARD, RECEIPT)}
    return [path for path in sorted(folder.glob("*") if folder.is_dir() else ()) if path.name not in files]


def _find_items(store: CacheStore, kind: str) -> _Kind:
    """Which items are named, and which shards hold others or are small."""
    items, table = store.index(kind), store.shard_table
    live = pc.is_in(items["id"], value_set=store.named(kind))
    dead, kept = items.filter(pc.invert(live)), items.filter(live)
    mine = pc.indices_nonzero(pc.equal(table["kind"], kind)).to_pylist()
    sizes = np.bincount(items["shard"].to_numpy(), weights=items["bytes"].to_numpy(), minlength=len(table))
    live_sizes = np.bincount(kept["shard"].to_numpy(), weights=kept["bytes"].to_numpy(), minlength=len(table))
    # An item that two shards hold is listed once.
    listed = np.bincount(items["shard"].to_numpy(), minlength=len(table))
    twice = {shard: int(table["items"][shard].as_py() - listed[shard]) for shard in mine}
    target = min(_MAX_SHARD_BYTES, max((sizes[shard] for shard in mine), default=0))
    small = [shard for shard in mine if live_sizes[shard] < _SMALL * target]
    rewritten = set(dead["shard"].to_pylist()) | {shard for shard, count in twice.items() if count}
    if rewritten or len(small) > 1:
        rewritten |= set(small)
    kept = kept.filter(pc.is_in(kept["shard"], value_set=pa.array(sorted(rewritten), pa.int32())))
    return _Kind(
        dead=dead,
        num_twice=sum(twice.values()),
        num_small=len(rewritten.intersection(small)),
        rewritten=[table["name"][shard].as_py() for shard in sorted(rewritten)],
        packed=_packed(_in_order(store, kind, kept), target),
    )


def _packed(items: pa.Table, target: float) -> list[list[str]]:
    """The items of each new shard: filled in order, then small ones put together, so that at most one small one is left."""
    sizes = zip(items["id"].to_pylist(), items["bytes"].to_pylist(), strict=True)
    filled = _filled((([name], size) for name, size in sizes), target)
    large = [one for one in filled if one[1] >= _SMALL * target]
    small = [one for one in filled if one[1] < _SMALL * target]
    return [names for names, _ in [*large, *_filled(small, target)]]


def _filled(parts: Iterable[tuple[list[str], float]], target: float) -> list[tuple[list[str], float]]:
    filled: list[tuple[list[str], float]] = []
    for names, size in parts:
        if filled and filled[-1][1] + size <= target:
            filled[-1][0].extend(names)
            filled[-1] = (filled[-1][0], filled[-1][1] + size)
        else:
            filled.append((list(names), size))
    return filled


def _in_order(store: CacheStore, kind: str, items: pa.Table) -> pa.Table:
    order = pc.index_in(items["id"], value_set=store.named(kind)).to_numpy()
    return items.take(pa.array(np.argsort(order, kind="stable")))


def _report(directory: Path, plan: _Plan, removed: bool) -> GcReport:
    def num_bytes(paths: Iterable[Path]) -> int:
        return sum(file.stat().st_size for path in paths for file in ([path] if path.is_file() else path.rglob("*")))

    def names(paths: Iterable[Path]) -> list[str]:
        return [str(path.relative_to(directory)) for path in paths]

    dead = pa.concat_tables([kind.dead for kind in plan.kinds.values()])
    found = {
        "encoders": (len(plan.folders), num_bytes(plan.folders), names(plan.folders)),
        "items": (len(dead), int(pc.sum(dead["bytes"]).as_py() or 0), dead["id"].slice(0, _EXAMPLES).to_pylist()),
        "twice": (sum(kind.num_twice for kind in plan.kinds.values()), 0, []),
        "small": (sum(kind.num_small for kind in plan.kinds.values()), 0, []),
        "files": (len(plan.files), num_bytes(plan.files), names(plan.files)),
    }
    garbage = [
        Garbage(what=_WHAT[name], count=count, num_bytes=size, examples=examples[:_EXAMPLES])
        for name, (count, size, examples) in found.items()
        if count
    ]
    return GcReport(
        directory=str(directory),
        garbage=garbage,
        num_shards_rewritten=sum(len(kind.rewritten) for kind in plan.kinds.values()),
        num_bytes=sum(one.num_bytes for one in garbage),
        removed=removed,
    )


def _remove(directory: Path, plan: _Plan) -> None:
    """Write what is kept of the shards to be removed, swap the view, and only then remove them."""
    store = plan.store
    folders = _folders(directory, store)
    old: list[Path] = []
    new: set[Path] = set()
    receipts = {}
    for name, folder in folders.items():
        kind = plan.kinds[name]
        with track(f"gc {name}", len(kind.packed), "shard") as progress:
            written = set()
            for ids in kind.packed:
                written.add(shards.write(folder, [(item, store.item(name, item)) for item in ids]).name)
                progress.advance(1)
        new |= {folder / f"{shard}{suffix}" for shard in written for suffix in (RECEIPT, SHARD)}
        gone = set(kind.rewritten) - written
        listed = (set(_names(store, name)) | written) - gone
        found, _ = shards.receipts(folder, {})
        receipts[name, folder.name] = [receipt for receipt in found if receipt.name in listed]
        # The receipt first: a shard without one counts for nothing.
        old += [folder / f"{shard}{suffix}" for shard in sorted(gone) for suffix in (RECEIPT, SHARD)]
    schema = view.sample_schema(store.table["repeats"].type, has_references=store.has_references)
    tables = {**view.merged(receipts), "samples": store.table.cast(schema)}
    manifest = view.commit(directory, tables, _facts(store.manifest))
    # A collection that was killed may have left these tables, unnamed then and listed as garbage: now they are the view.
    new |= {view.table_path(directory, name, digest) for name, digest in manifest.tables.items()}
    store.close()
    for path in (*old, *plan.files):
        if path not in new:
            path.unlink(missing_ok=True)
    for path in plan.folders:
        shutil.rmtree(path)
    for folder in folders.values():
        if folder.is_dir():
            storage.fsync_directory(folder)


def _facts(manifest: CacheManifest) -> dict[str, Any]:
    given = {"schema_version", "num_samples", "tables", "digest"}
    return {entry.name: getattr(manifest, entry.name) for entry in fields(manifest) if entry.name not in given}
