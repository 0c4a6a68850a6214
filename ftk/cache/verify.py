"""`ftk verify`: is a cache as it was committed? Damaged shards are named, and set aside so that they are encoded again."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ftk import storage
from ftk.cache import shards, view
from ftk.cache.shards import KINDS, RECEIPT, SHARD, Damage, Receipt
from ftk.cache.store import CacheStore
from ftk.contracts import CacheManifest
from ftk.errors import CacheError, EnvironmentFault
from ftk.progress import track

_READERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What was looked at and what is wrong; `num_unsealed` shards are whole, but the view does not list them (yet)."""

    directory: str
    deep: bool
    num_shards: int
    num_items: int
    num_bytes: int
    num_unsealed: int
    damages: list[Damage]
    set_aside: list[str]


def run(directory: Path, deep: bool = False) -> VerifyReport:
    """Check a cache: by default sizes, headers and indexes; with `deep` every byte.

    Damaged shards of a sealed or unfinished cache get another suffix: nothing reads them, and `ftk cache` encodes their
    items again. In a directory that cannot be written, or is being written, they are only named.

    Raises:
        CacheError: there is no cache.
    """
    if not any((directory / name).exists() for name in (view.MANIFEST, *KINDS)):
        raise CacheError(f"{directory} holds no cache: no {view.MANIFEST} in it. Name the folder that `ftk cache` wrote.")
    damages: list[Damage] = []
    manifest = _manifest(directory, damages)
    known = view.receipt_digests(directory, manifest) if manifest else {}
    whole: dict[str, Receipt] = {}
    for folder in sorted(path for kind in KINDS for path in (directory / kind).glob("*") if path.is_dir()):
        found, broken = shards.receipts(folder, known)
        damages += broken
        whole |= {f"{folder.parent.name}/{folder.name}/{receipt.name}": receipt for receipt in found}
    damages += _without_receipt(directory, known, {*whole, *(damage.shard for damage in damages)})
    if deep:
        damages += _deep(directory, {shard: receipt for shard, receipt in whole.items()})
    if manifest and not damages:
        damages += _incomplete(directory)
    return VerifyReport(
        directory=str(directory),
        deep=deep,
        num_shards=len(whole),
        num_items=sum(len(receipt.items) for receipt in whole.values()),
        num_bytes=sum(receipt.bytes for receipt in whole.values()),
        num_unsealed=sum(shard not in known for shard in whole),
        damages=damages,
        set_aside=_set_aside(directory, damages),
    )


def _manifest(directory: Path, damages: list[Damage]) -> CacheManifest | None:
    """The manifest, and what is wrong with the tables that it names."""
    while True:
        try:
            manifest = view.read_manifest(directory)
            broken = view.check(directory, manifest) if manifest else []
            # A new view may have taken the place of this one meanwhile.
            if not broken or view.read_manifest(directory) == manifest:
                damages += broken
                return manifest
        except CacheError as error:
            found = " ".join(str(error).split())
            damages.append(Damage(path=str(directory / view.MANIFEST), problem="damaged", expected="its digest", found=found))
            return None


def _without_receipt(directory: Path, known: Mapping[str, str], seen: set[str]) -> list[Damage]:
    """Shards that the view lists and that have no receipt any more."""
    return [
        Damage(path=str(directory / f"{shard}{RECEIPT}"), problem="missing", expected="a receipt", found="no file", shard=shard)
        for shard in known
        if shard not in seen
    ]


def _deep(directory: Path, whole: Mapping[str, Receipt]) -> list[Damage]:
    """Read every byte of every shard, some at a time."""

    def look(shard: str, receipt: Receipt) -> Damage | None:
        damage = shards.check((directory / shard).parent, receipt, deep=True)
        progress.advance(receipt.bytes >> 20)
        return damage

    total = sum(receipt.bytes >> 20 for receipt in whole.values())
    with track("verify", total, "MiB") as progress, ThreadPoolExecutor(_READERS) as pool:
        return [damage for damage in pool.map(look, whole.keys(), whole.values()) if damage]


def _incomplete(directory: Path) -> list[Damage]:
    """Whether every item that a sample names is there."""
    try:
        CacheStore.open(directory).close()
    except CacheError as error:
        return [Damage(path=str(directory), problem="incomplete", expected="all items", found=" ".join(str(error).split()))]
    return []


def _set_aside(directory: Path, damages: Sequence[Damage]) -> list[str]:
    """Rename the damaged file of each shard; what cannot be renamed stays."""
    moved = []
    try:
        with storage.lock(directory):
            for damage in damages:
                for suffix in (SHARD, RECEIPT):
                    path = directory / f"{damage.shard}{suffix}"
                    if damage.shard and str(path) == damage.path and path.exists():
                        moved.append(str(path.rename(shards.aside(path))))
    except (EnvironmentFault, OSError):
        return moved
    return moved
