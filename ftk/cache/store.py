"""The one reader of a cache. Items are mapped from their shards and checked on their first use; threads may share a store.

Shape legend: C latent channels, h w latent cells, L text tokens, D text width.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors import SafetensorError, safe_open

from ftk import locations, storage
from ftk.cache import fetch, shards, view
from ftk.contracts import CachedSample, CacheManifest
from ftk.errors import CacheError

_OPEN_TRIES = 3
_LISTED = 10
_ADVICE = "Run `ftk verify --deep` on this cache, then `ftk cache RUN.yaml`: it mends what is damaged and keeps the rest."
# As safetensors names them in a header.
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
           "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}  # fmt: skip

Rows = npt.NDArray[np.int32]


class ShardFiles(Protocol):
    """Where the shards are: in this machine's file system, or fetched from object storage as they are needed."""

    on_removed: Callable[[int], None]
    """Called with each shard whose file is removed to make room for others."""
    max_open: int
    """Shards that a reader may keep open."""

    def path(self, shard: int) -> Path:
        """A local file with the shard of this row of the shards' table."""

    def used(self, shard: int) -> None:
        """The shard is used now."""

    def advice(self, path: Path) -> str:
        """What a user does about a damaged file."""

    def ahead(self, wanted: Sequence[int]) -> None:
        """These shards will be needed soon, in this order."""

    def close(self) -> None:
        """Stop what is under way."""


class LocalShards:
    """Shards in the cache's own directory."""

    max_open = 4096

    def __init__(self, directory: Path, table: pa.Table) -> None:
        self.on_removed: Callable[[int], None] = lambda _: None
        self.directory = directory
        self.table = table

    def path(self, shard: int) -> Path:
        """Where the shard lies."""
        kind, fingerprint, name = (str(self.table[column][shard]) for column in ("kind", "fingerprint", "name"))
        return self.directory / kind / fingerprint / f"{name}{shards.SHARD}"

    def used(self, shard: int) -> None:
        """Nothing to note."""

    def advice(self, path: Path) -> str:
        """Set aside, then encode again."""
        return _ADVICE

    def ahead(self, wanted: Sequence[int]) -> None:
        """Nothing to fetch."""

    def close(self) -> None:
        """Nothing is under way."""

    def damages(self) -> list[shards.Damage]:
        """Shards and receipts that are missing or of another size, without opening any."""
        columns = ("kind", "fingerprint", "name", "bytes", "receipt_bytes")
        found = []
        for kind, fingerprint, name, *sizes in zip(*(self.table[column].to_pylist() for column in columns), strict=True):
            # Text, not paths: there are thousands of files, and making a path takes longer than asking for the size.
            start = f"{self.directory}{os.sep}{kind}{os.sep}{fingerprint}{os.sep}{name}"
            for suffix, expected in zip((shards.SHARD, shards.RECEIPT), sizes, strict=True):
                try:
                    size = os.stat(start + suffix).st_size  # noqa: PTH116
                except FileNotFoundError:
                    size = -1
                if size != expected:
                    found.append(_other_size(Path(start + suffix), expected, size))
        return found


def _other_size(path: Path, expected: int, size: int) -> shards.Damage:
    gone = "it was set aside by `ftk verify`" if shards.aside(path).exists() else "no file"
    found = gone if size < 0 else f"{size:,} bytes"
    return shards.Damage(path=str(path), problem="size", expected=f"{expected:,} bytes", found=found)


class _Mapped:
    """A shard read through mmap: tensors are views of the file's pages."""

    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(str(path), framework="pt")

    def tensor(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor


class _Positioned:
    """A shard read with `pread`: where files can vanish under a reader, a mapped one would kill the process."""

    def __init__(self, path: Path) -> None:
        self._header, self._start = shards.read_header(path)
        self._file = path.open("rb", buffering=0)

    def tensor(self, name: str) -> torch.Tensor:
        entry = self._header[name]
        begin, end = entry["data_offsets"]
        data = torch.empty(end - begin, dtype=torch.uint8)
        left = memoryview(data.numpy())
        while left:
            count = os.preadv(self._file.fileno(), [left], self._start + end - len(left))
            if not count:
                raise OSError(f"it ends within {name}")
            left = left[count:]
        return data.view(getattr(torch, _DTYPES[entry["dtype"]])).reshape(entry["shape"])


@dataclass(slots=True)
class _Items:
    """All items of one kind, by row; `checked` are those whose checksum was seen to hold."""

    ids: pa.ChunkedArray
    tensors: pa.ChunkedArray
    lengths: Rows
    shards: Rows
    checksums: pa.ChunkedArray
    num_bytes: int
    checked: npt.NDArray[np.bool_]
    by_id: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, table: pa.Table) -> "_Items":
        return cls(
            ids=table["id"],
            tensors=table["tensors"],
            lengths=table["length"].to_numpy(),
            shards=table["shard"].to_numpy(),
            checksums=table["checksum"],
            num_bytes=int(pc.sum(table["bytes"]).as_py() or 0),
            checked=np.zeros(len(table), dtype=np.bool_),
        )

    def rows(self, *columns: pa.ChunkedArray | pa.Array) -> list[Rows]:
        """The row of each id of each column; -1 for those that are not there."""
        chunks = [chunk for column in columns for chunk in getattr(column, "chunks", [column])]
        value_set = self.ids.combine_chunks() if self.ids.num_chunks != 1 else self.ids.chunk(0)
        found = pc.index_in(pa.chunked_array(chunks, pa.string()), value_set=value_set)
        rows = pc.fill_null(found, -1).to_numpy().astype(np.int32, copy=False)
        return np.split(rows, np.cumsum([len(column) for column in columns])[:-1])

    def row(self, item: str) -> int:
        """The row of one id; the first call makes the table for all."""
        if not self.by_id:
            self.by_id = {name: row for row, name in enumerate(self.ids.to_pylist())}
        return self.by_id[item]


class CacheStore:
    """Reads a sealed cache, by the number of a sample or by the id of an item, each in constant time.

    Tensors may be views of a mapped file: copy one before changing it. An item's checksum is compared when the item is read
    for the first time by this store.
    """

    def __init__(self, location: str, manifest: CacheManifest, tables: Mapping[str, pa.Table], files: ShardFiles) -> None:
        self.location = location
        self.manifest = manifest
        self.table: pa.Table = tables["samples"].combine_chunks()
        """Every sample: the columns of `ftk.contracts.CachedSample`; those of references where there are some."""
        self.shard_table = tables["shards"]
        self._indexes = {kind: tables[kind].combine_chunks() for kind in shards.KINDS}
        self._items = {kind: _Items.of(table) for kind, table in self._indexes.items()}
        self._files = files
        files.on_removed = self._forget
        self._open: OrderedDict[int, _Mapped | _Positioned] = OrderedDict()
        self._positioned: dict[Path, bool] = {}
        self._lock = threading.Lock()
        self._resolve()

    @classmethod
    def open(cls, location: str | Path, download: fetch.Download | None = None) -> "CacheStore":
        """Open the cache in a directory or at an fsspec URL.

        Args:
            download: where shards of a URL are kept, and how much of them.

        Raises:
            CacheError: it is missing, unfinished or damaged; a table names every file that differs. Every item that a
                sample names is there, so nothing is found missing in the middle of a training.
            EnvironmentFault: object storage cannot be reached.
        """
        if locations.is_url(str(location)):
            return cls(str(location), *fetch.open_remote(str(location), download or fetch.Download()))
        directory = locations.local_path(str(location))
        manifest, tables = _read_view(directory)
        files = LocalShards(directory, tables["shards"])
        _refuse(directory, files.damages())
        return cls(str(directory), manifest, tables, files)

    def _resolve(self) -> None:
        """Turn the ids that samples and the manifest name into rows, with one look-up for each kind."""
        latents, texts, table = self._items["latents"], self._items["texts"], self.table
        has_mask = pc.not_equal(table["mask"], "")
        prompts = [*self.manifest.prompts.values(), *self.manifest.shared_texts.values()]
        named = pa.array(list(dict.fromkeys([self.manifest.empty_text, *prompts])), pa.string())
        masked = table["mask"].filter(has_mask)
        references, empties, shared = (self._optional(name) for name in ("references", "empty_text", "shared_text"))
        has_shared = pc.not_equal(shared, "")
        parts = [ids for each in self.manifest.prompt_images.values() for ids in each.values()]
        prompt_images = pa.array([item for ids in parts for item in ids], pa.string())
        self._latents, masks, self._controls, self._references, prompt_image_rows = latents.rows(
            table["latents"],
            masked,
            pc.list_flatten(table["controls"]),
            pc.list_flatten(references),
            prompt_images,
        )
        preserved = self._preserved_ids()
        self._texts, named_rows, self._empties, shared_rows, self._preserved = texts.rows(
            pc.list_flatten(table["texts"]),
            named,
            empties.filter(pc.not_equal(empties, "")),
            shared.filter(has_shared),
            preserved,
        )
        num_preserved_missing = int((self._preserved < 0).sum()) - (pc.sum(pc.equal(preserved, "")).as_py() or 0)
        self._shared = np.full(len(table), -1, dtype=np.int32)
        self._shared[has_shared.to_numpy()] = shared_rows
        self._first_reference = _starts(references)
        self._prompt_images = dict(zip(prompt_images.to_pylist(), prompt_image_rows.tolist(), strict=True))
        self._masks = np.full(len(table), -1, dtype=np.int32)
        self._masks[has_mask.to_numpy()] = masks
        self._first_control, self._first_text = _starts(table["controls"]), _starts(table["texts"])
        self._named = dict(zip(named.to_pylist(), named_rows.tolist(), strict=True))
        missing = {
            "latents": sum(
                int((rows < 0).sum()) for rows in (self._latents, masks, self._controls, self._references, prompt_image_rows)
            ),
            "texts": sum(int((rows < 0).sum()) for rows in (self._texts, named_rows, self._empties, shared_rows))
            + num_preserved_missing,
        }
        if any(missing.values()):
            listed = ", ".join(f"{count:,} {kind}" for kind, count in missing.items() if count)
            raise CacheError(f"{self.location}: {listed} that samples name are not there. Run `ftk cache RUN.yaml` again.")

    def _preserved_ids(self) -> pa.ChunkedArray:
        """The text that is preserved beside each caption, one after another; none where the cache has no such column."""
        name = view.PRESERVED_FIELD.name
        if name not in self.table.column_names:
            return pa.chunked_array([pa.array([], pa.string())])
        return pc.list_flatten(self.table[name])

    def _optional(self, name: str) -> pa.ChunkedArray:
        """A column of references, as if no sample had any where the cache has no such columns."""
        column = next(each for each in view.REFERENCE_FIELDS if each.name == name)
        if name in self.table.column_names:
            return self.table[name]
        if column.type == pa.string():
            return pa.chunked_array([pa.repeat(pa.scalar("", pa.string()), len(self.table))])
        starts = pa.array(np.zeros(len(self.table) + 1, np.int32))
        return pa.chunked_array([pa.ListArray.from_arrays(starts, pa.array([], column.type.value_type))])

    def __len__(self) -> int:
        return len(self.table)

    @property
    def has_references(self) -> bool:
        """Whether samples may have references."""
        return "references" in self.table.column_names

    def sample(self, number: int) -> CachedSample:
        """One row of `table`."""
        names = [entry.name for entry in fields(CachedSample) if entry.name in self.table.column_names]
        return CachedSample(**{name: self.table[name][number].as_py() for name in names})

    def latents(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior (mean, std) of a sample's image, each [C,h,w], in the denoiser's normalised space."""
        tensors = self._read("latents", int(self._latents[number]))
        return tensors["mean"], tensors["std"]

    def controls(self, number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Posterior (mean, std) of each of a sample's control images that is stored as latents."""
        return [(tensors["mean"], tensors["std"]) for tensors in self.control_items(number) if "mean" in tensors]

    def control_items(self, number: int) -> list[dict[str, torch.Tensor]]:
        """Each of a sample's control images: `mean` and `std` [C,h,w], or `pixels` [3,H,W] in 8 bits."""
        return [self.control_item(number, which) for which in range(self.num_controls(number))]

    def control_item(self, number: int, which: int) -> dict[str, torch.Tensor]:
        """One of them."""
        return self._read("latents", int(self._controls[self._first_control[number] + which]))

    def num_controls(self, number: int) -> int:
        """How many control images a sample has."""
        return int(self._first_control[number + 1] - self._first_control[number])

    def references(self, number: int) -> list[torch.Tensor]:
        """The posterior mean [C,h,w] of each of a sample's references, which edit pipelines take too."""
        rows = self._references[self._first_reference[number] : self._first_reference[number + 1]]
        return [self._read("latents", int(row))["mean"] for row in rows]

    def mask(self, number: int) -> torch.Tensor | None:
        """A sample's mask [h,w] in [0, 1], a mean over each latent cell; None when it has none."""
        row = int(self._masks[number])
        return None if row < 0 else self._read("latents", row)["mask"]

    def text(self, number: int, caption: int = 0) -> dict[str, torch.Tensor]:
        """The family's tensors of one of a sample's captions, unpadded; for Qwen-Image `embeds` [L,D]."""
        if not 0 <= caption < self.num_texts(number):
            raise IndexError(f"sample {number} has {self.num_texts(number)} captions; there is no caption {caption}")
        return self._read_text(int(self._texts[self._first_text[number] + caption]), int(self._shared[number]))

    def num_texts(self, number: int) -> int:
        """How many captions a sample has."""
        return int(self._first_text[number + 1] - self._first_text[number])

    def empty_text(self, number: int = 0) -> dict[str, torch.Tensor]:
        """The empty caption, beside the references of a sample where texts depend on them."""
        if not len(self._empties):
            return self._read("texts", self._named[self.manifest.empty_text])
        return self._read_text(int(self._empties[number]), int(self._shared[number]))

    def preserved_text(self, number: int, caption: int) -> dict[str, torch.Tensor] | None:
        """The text for which the base model's prediction is kept, where a sample trains with one of its captions.

        None: there is none beside this caption; nor is there one of a dropped caption (below 0), unless all have the same.
        """
        if caption < 0 and "prompt" not in self.manifest.preservation:
            return None
        row = int(self._preserved[self._first_text[number] + max(caption, 0)])
        return None if row < 0 else self._read_text(row, int(self._shared[number]))

    @property
    def longest_preserved(self) -> int:
        """The most tokens that a preserved text has."""
        if not len(self._preserved):
            return 0
        lengths, shared = self._items["texts"].lengths, np.repeat(self._shared, np.diff(self._first_text))
        own, before = (np.where(rows < 0, 0, lengths[rows]) for rows in (self._preserved, shared))
        return int(np.where(self._preserved < 0, 0, own + before).max())

    def prompt(self, key: str) -> dict[str, torch.Tensor]:
        """A prompt of the run file, by `PromptConfig.key`; `KeyError` when it is not cached."""
        shared = self.manifest.shared_texts.get(key)
        return self._read_text(self._named[self.manifest.prompts[key]], -1 if shared is None else self._named[shared])

    def prompt_images(self, key: str, part: str) -> list[dict[str, torch.Tensor]]:
        """The `references` or `controls` of a prompt, as items of `latents`."""
        ids = self.manifest.prompt_images.get(key, {}).get(part, [])
        return [self._read("latents", self._prompt_images[item]) for item in ids]

    def item(self, kind: str, item: str) -> dict[str, torch.Tensor]:
        """All tensors of an item of `latents` or `texts`; `KeyError` when there is none."""
        return self._read(kind, self._items[kind].row(item))

    def index(self, kind: str) -> pa.Table:
        """Every item of `latents` or `texts`: the columns of `ftk.cache.view.INDEX_SCHEMA`."""
        return self._indexes[kind]

    def named(self, kind: str) -> pa.Array:
        """The ids that samples, or the manifest, name, each once, in the order of the samples."""
        if kind == "texts":
            beside = [self._optional(name) for name in ("empty_text", "shared_text")]
            columns = [pc.list_flatten(self.table["texts"]), pa.chunked_array([pa.array(list(self._named), pa.string())]),
                       *(column.filter(pc.not_equal(column, "")) for column in beside), self._preserved_ids()]  # fmt: skip
        else:
            masks = self.table["mask"].filter(pc.not_equal(self.table["mask"], ""))
            prompt_images = pa.chunked_array([pa.array(list(self._prompt_images), pa.string())])
            references = pc.list_flatten(self._optional("references"))
            columns = [self.table["latents"], pc.list_flatten(self.table["controls"]), masks, references, prompt_images]
        return pc.unique(pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string()))

    def length(self, kind: str, item: str) -> int:
        """The first dimension of an item's first tensor; of a text its tokens."""
        items = self._items[kind]
        return int(items.lengths[items.row(item)])

    def num_bytes(self) -> int:
        """Bytes of every item of the two kinds."""
        return sum(items.num_bytes for items in self._items.values())

    def ahead(self, numbers: Iterable[int]) -> None:
        """These samples will be read soon, in this order: shards that are elsewhere are fetched meanwhile."""
        wanted: dict[int, None] = {}
        for number in numbers:
            place = slice(self._first_text[number], self._first_text[number + 1])
            texts, preserved = self._texts[place], self._preserved[place]
            controls = self._controls[self._first_control[number] : self._first_control[number + 1]]
            references = self._references[self._first_reference[number] : self._first_reference[number + 1]]
            pictures = [self._latents[number], self._masks[number], *controls, *references]
            wanted |= dict.fromkeys(int(self._items["latents"].shards[row]) for row in pictures if row >= 0)
            rows = (*texts, *preserved, self._shared[number])
            wanted |= dict.fromkeys(int(self._items["texts"].shards[row]) for row in rows if row >= 0)
        self._files.ahead(list(wanted))

    def close(self) -> None:
        """Stop fetching, and close the shards."""
        self._files.close()
        with self._lock:
            self._open.clear()

    def _read_text(self, row: int, shared: int) -> dict[str, torch.Tensor]:
        """A text, with what it shares with others of the same references in front."""
        own = self._read("texts", row)
        if shared < 0:
            return own
        first = self._read("texts", shared)
        return {name: torch.cat([first[name], tensor]) for name, tensor in own.items()}

    def _read(self, kind: str, row: int) -> dict[str, torch.Tensor]:
        items = self._items[kind]
        item, names = items.ids[row].as_py(), items.tensors[row].as_py().split()
        number = int(items.shards[row])
        try:
            shard = self._shard(number)
            tensors = {name: shard.tensor(f"{item}.{name}") for name in names}
            if not items.checked[row]:
                if shards.checksum(tensors) != items.checksums[row].as_py():
                    raise ValueError(f"item {item} does not have its checksum")
                items.checked[row] = True
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            path = self._files.path(number)
            raise CacheError(f"{path} is damaged: {error}. {self._files.advice(path)}") from None
        return tensors

    def _shard(self, number: int) -> _Mapped | _Positioned:
        with self._lock:
            opened = self._open.get(number)
            if opened is not None:
                self._open.move_to_end(number)
        if opened is None:
            opened = self._open_shard(number)
            with self._lock:
                self._open[number] = opened
                while len(self._open) > self._files.max_open:
                    self._open.popitem(last=False)
        self._files.used(number)
        return opened

    def _open_shard(self, number: int) -> _Mapped | _Positioned:
        expected = self.shard_table["header_blake3"][number].as_py()
        for attempt in range(1, _OPEN_TRIES + 1):
            path = self._files.path(number)
            try:
                if (found := shards.header_digest(path)) != expected:
                    raise ValueError(f"its header has the digest {found}, expected {expected}")
                return _Positioned(path) if self._is_positioned(path.parent) else _Mapped(path)
            except FileNotFoundError:
                # Another process that shares the folder has removed it since, to make room.
                if attempt == _OPEN_TRIES:
                    raise
        raise AssertionError

    def _forget(self, number: int) -> None:
        with self._lock:
            self._open.pop(number, None)

    def _is_positioned(self, folder: Path) -> bool:
        if folder not in self._positioned:
            self._positioned[folder] = storage.is_network(folder)
        return self._positioned[folder]


def _starts(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Where each list of a column begins when they stand one after another; one more number for the end."""
    return np.concatenate([[0], np.cumsum(pc.list_value_length(column).to_numpy(), dtype=np.int64)])


def _read_view(directory: Path) -> tuple[CacheManifest, dict[str, pa.Table]]:
    while True:
        manifest = view.read_manifest(directory)
        if manifest is None:
            raise CacheError(f"{directory} holds no finished cache. Run `ftk cache RUN.yaml` first.")
        try:
            return manifest, view.read_tables(directory, manifest)
        except FileNotFoundError:
            # A new view may have taken the place of this one since the manifest was read.
            if view.read_manifest(directory) == manifest:
                _refuse(directory, view.check(directory, manifest))
                raise


def _refuse(directory: Path, damages: list[shards.Damage]) -> None:
    if damages:
        lines = "".join(f"\n  {damage}" for damage in damages[:_LISTED])
        more = f"\n  and {len(damages) - _LISTED:,} more" if len(damages) > _LISTED else ""
        raise CacheError(f"{directory} is damaged:{lines}{more}\n{_ADVICE}")
