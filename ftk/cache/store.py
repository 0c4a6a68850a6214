"""The cache on disk: shards of safetensors with a Parquet index each, written once, and the one reader training uses.

A shard counts once its index is there: the index is committed after the shard and holds the shard's size and BLAKE3 and
an XXH3 for each item. Everything is named relative to the cache's directory, so a cache can be moved or copied.
"""

import logging
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import blake3
import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ftk import storage
from ftk.contracts import CACHE_SCHEMA, CachedSample, CacheManifest
from ftk.errors import CacheError

LOGGER = logging.getLogger("ftk")

MANIFEST = "cache.json"
SAMPLES = "samples.parquet"
_INDEX_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("tensors", pa.list_(pa.string())),
        pa.field("length", pa.int32()),
        pa.field("bytes", pa.int64()),
        pa.field("checksum", pa.string()),
    ]
)
_SAMPLE_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("latents", pa.string()),
        pa.field("texts", pa.list_(pa.string())),
        pa.field("bucket_width", pa.int32()),
        pa.field("bucket_height", pa.int32()),
        pa.field("repeats", pa.int32()),
        pa.field("role", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Where one item lies. `length` is the first dimension of its first tensor: for texts, the number of tokens."""

    shard: Path
    tensors: tuple[str, ...]
    length: int
    bytes: int
    checksum: str


def write_shard(directory: Path, number: int, items: list[tuple[str, dict[str, torch.Tensor]]]) -> int:
    """Commit one shard, then the index that makes it count; returns the shard's bytes."""
    tensors = {f"{item}.{name}": tensor.contiguous() for item, parts in items for name, tensor in parts.items()}
    payload = save(tensors)
    rows = [
        {
            "id": item,
            "tensors": sorted(parts),
            "length": parts[min(parts)].shape[0],
            "bytes": sum(tensor.nbytes for tensor in parts.values()),
            "checksum": _checksum(parts),
        }
        for item, parts in items
    ]
    receipt = {"shard_bytes": str(len(payload)), "shard_blake3": blake3.blake3(payload).hexdigest()}
    table = pa.Table.from_pylist(rows, schema=_INDEX_SCHEMA.with_metadata(receipt))
    storage.commit_bytes(directory / f"{number:05d}.safetensors", payload)
    storage.commit_table(directory / f"{number:05d}.parquet", table)
    return len(payload)


def read_index(directory: Path, damaged: Literal["raise", "skip", "drop"] = "raise") -> dict[str, Entry]:
    """Every item of one fingerprint's folder.

    Args:
        damaged: what becomes of a shard that is not the one its index was written for, or of an index that cannot be read:
            raise `CacheError`, skip its items, or drop its index as well, so that its items are encoded again.
    """
    entries: dict[str, Entry] = {}
    for index in sorted(directory.glob("[0-9]*.parquet")):
        try:
            entries |= _read_one_index(index)
        except CacheError as error:
            if damaged == "raise":
                raise
            LOGGER.warning("%s", error)
            if damaged == "drop":
                index.unlink()
    return entries


def _read_one_index(index: Path) -> dict[str, Entry]:
    shard = index.with_suffix(".safetensors")
    advice = "`ftk cache RUN.yaml` encodes that shard's items again."
    try:
        table = storage.read_table(index)
    except (pa.ArrowException, OSError) as error:
        raise CacheError(f"{index} is damaged: {error}. {advice}") from None
    expected = int((table.schema.metadata or {}).get(b"shard_bytes", b"-1"))
    found = shard.stat().st_size if shard.exists() else None
    if found != expected:
        size = "no file" if found is None else f"{found:,}"
        raise CacheError(f"{shard} is damaged: expected {expected:,} bytes, found {size}. {advice}")
    return {
        row["id"]: Entry(
            shard=shard,
            tensors=tuple(row["tensors"]),
            length=row["length"],
            bytes=row["bytes"],
            checksum=row["checksum"],
        )
        for row in table.to_pylist()
    }


def next_number(directory: Path) -> int:
    """The first shard number above all indexed ones: shards are appended, never rewritten."""
    numbers = [int(index.stem) for index in directory.glob("[0-9]*.parquet")]
    return max(numbers, default=-1) + 1


def read_manifest(directory: Path) -> CacheManifest | None:
    """`cache.json`, or None when there is none; `CacheError` when it is damaged or of another version."""
    path = directory / MANIFEST
    try:
        plain = storage.read_json(path)
        version = plain.get("schema_version")
        if version == CACHE_SCHEMA:
            return CacheManifest(**plain)
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, TypeError) as error:
        advice = "Delete it and run `ftk cache RUN.yaml`: encoded items are kept."
        raise CacheError(f"{path} is damaged: {error}. {advice}") from None
    raise CacheError(f"{path} has schema version {version}; this ftk reads version {CACHE_SCHEMA}. Use a new workspace.")


def commit_samples(directory: Path, samples: list[CachedSample], manifest: Mapping[str, Any]) -> CacheManifest:
    """Swap in the view of samples, then the manifest that names its hash."""
    path = directory / SAMPLES
    storage.commit_table(path, pa.Table.from_pylist([asdict(sample) for sample in samples], schema=_SAMPLE_SCHEMA))
    complete = CacheManifest(
        schema_version=CACHE_SCHEMA,
        num_samples=len(samples),
        samples_blake3=storage.blake3_file(path),
        **manifest,
    )
    storage.commit_json(directory / MANIFEST, complete)
    return complete


class CacheStore:
    """Reads a sealed cache. Items are mapped from their shard and checked against their checksum; threads may share it."""

    def __init__(self, directory: Path, manifest: CacheManifest, samples: list[CachedSample]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.samples = samples
        self._latents = read_index(directory / "latents" / manifest.latents_fingerprint)
        self._texts = read_index(directory / "texts" / manifest.texts_fingerprint)
        self._open: dict[Path, Any] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, directory: Path) -> "CacheStore":
        """Open a cache; `CacheError` names what is missing or damaged.

        Every item that a sample names must be indexed, so nothing is found missing in the middle of a training.
        """
        manifest = read_manifest(directory)
        path = directory / SAMPLES
        if manifest is None or not path.exists():
            raise CacheError(f"{directory} holds no finished cache. Run `ftk cache RUN.yaml` first.")
        if storage.blake3_file(path) != manifest.samples_blake3:
            raise CacheError(f"{path} is not the one that {MANIFEST} names. Run `ftk cache RUN.yaml`: it rebuilds the view.")
        samples = [CachedSample(**row) for row in storage.read_table(path).to_pylist()]
        store = cls(directory, manifest, samples)
        store._check_complete()
        return store

    def _check_complete(self) -> None:
        missing = [s.key for s in self.samples if s.latents not in self._latents or any(t not in self._texts for t in s.texts)]
        prompts = [text for text in self.manifest.prompts.values() if text not in self._texts]
        if missing or prompts or self.manifest.empty_text not in self._texts:
            named = ", ".join(missing[:3]) or "a prompt"
            raise CacheError(
                f"{self.directory}: items of {len(missing) or 'some'} samples are not there ({named}). "
                f"Run `ftk cache RUN.yaml`: it encodes what is missing."
            )

    def latents(self, item: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior (mean, std), each [C,h,w], in the denoiser's normalised space."""
        tensors = self._read(self._latents[item], item)
        return tensors["mean"], tensors["std"]

    def text(self, item: str) -> dict[str, torch.Tensor]:
        """The family's tensors of one caption, unpadded."""
        return self._read(self._texts[item], item)

    def text_length(self, item: str) -> int:
        """Tokens of one caption."""
        return self._texts[item].length

    def num_bytes(self) -> int:
        """Bytes of every item in the two folders that the manifest names."""
        return sum(entry.bytes for entries in (self._latents, self._texts) for entry in entries.values())

    def _read(self, entry: Entry, item: str) -> dict[str, torch.Tensor]:
        try:
            with self._lock:
                if entry.shard not in self._open:
                    self._open[entry.shard] = safe_open(str(entry.shard), framework="pt")
                shard = self._open[entry.shard]
            tensors = {name: shard.get_tensor(f"{item}.{name}") for name in entry.tensors}
        except (SafetensorError, OSError) as error:
            raise CacheError(
                f"{entry.shard} is damaged: {error}. Delete it and run `ftk cache RUN.yaml`: its items are encoded again."
            ) from None
        if _checksum(tensors) != entry.checksum:
            raise CacheError(
                f"{entry.shard} is damaged: item {item} does not have its checksum. Delete that file and run "
                f"`ftk cache RUN.yaml`: its items are encoded again."
            )
        return tensors


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    ordered = [tensors[name].contiguous().view(torch.uint8).numpy() for name in sorted(tensors)]
    return storage.item_checksum(*(memoryview(array).cast("B") if array.size else b"" for array in ordered))
