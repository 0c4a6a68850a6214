"""What a reader opens: `cache.json` and the four tables that it names. Derived from receipts, cheap to build anew.

A table's name holds the digest of its bytes, so a new view never touches the files of the old one: the swap is that of
`cache.json`, and a cache is readable at every instant.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import blake3
import pyarrow as pa
import pyarrow.compute as pc

from ftk import storage
from ftk.cache.shards import ITEM_SCHEMA, KINDS, Damage, Receipt
from ftk.contracts import CACHE_SCHEMA, CacheManifest
from ftk.errors import CacheError

MANIFEST = "cache.json"
SAMPLE_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("latents", pa.string()),
        pa.field("controls", pa.list_(pa.string())),
        pa.field("mask", pa.string()),
        pa.field("texts", pa.list_(pa.string())),
        pa.field("text_lengths", pa.list_(pa.int32())),
        *(pa.field(name, pa.int32()) for name in ("width", "height", "bucket_width", "bucket_height")),
        *(pa.field(name, pa.int32()) for name in ("resize_width", "resize_height", "crop_x", "crop_y")),
        pa.field("flipped", pa.bool_()),
        pa.field("repeats", pa.int32()),
        pa.field("role", pa.string()),
    ]
)
REFERENCE_FIELDS = [
    pa.field("references", pa.list_(pa.string())),
    pa.field("reference_widths", pa.list_(pa.int32())),
    pa.field("reference_heights", pa.list_(pa.int32())),
    pa.field("empty_text", pa.string()),
    pa.field("shared_text", pa.string()),
]
"""Columns of the samples' table of caches with references; others do not have them."""


PRESERVED_FIELD = pa.field("preserved_texts", pa.list_(pa.string()))
"""Column of the samples' table of caches for runs with `train.loss.preservation`."""


def sample_schema(repeats: pa.DataType, *, has_references: bool, has_preserved: bool = False) -> pa.Schema:
    """Of a table of samples. `repeats` are int32, and float64 in the cache of a dataset where some are not whole."""
    fields = [pa.field("repeats", repeats) if field.name == "repeats" else field for field in SAMPLE_SCHEMA]
    return pa.schema([*fields, *(REFERENCE_FIELDS if has_references else []), *([PRESERVED_FIELD] if has_preserved else [])])


INDEX_SCHEMA = pa.schema([*ITEM_SCHEMA, pa.field("shard", pa.int32())])
"""All items of one kind; `shard` is a row of the shards' table."""
SHARD_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("kind", "fingerprint", "name")),
        *(pa.field(name, pa.int64()) for name in ("items", "bytes", "receipt_bytes")),
        *(pa.field(name, pa.string()) for name in ("blake3", "header_blake3", "receipt_blake3")),
    ]
)
_SCHEMAS = {"samples": SAMPLE_SCHEMA, "latents": INDEX_SCHEMA, "texts": INDEX_SCHEMA, "shards": SHARD_SCHEMA}
_RECEIPT_FACTS = ("name", "bytes", "blake3", "header_blake3", "receipt_bytes", "receipt_blake3")
_DIGEST_CHARS = 16
# Columns whose few values take no memory a row.
_REPEATED = ["tensors", "role"]


class NewerCacheError(CacheError):
    """A newer ftk made this cache: not to be touched."""


def table_path(directory: Path, name: str, digest: str) -> Path:
    """Where a table of the view lies."""
    return directory / "view" / f"{name}-{digest[:_DIGEST_CHARS]}.parquet"


def merged(receipts: Mapping[tuple[str, str], list[Receipt]]) -> dict[str, pa.Table]:
    """The tables `latents`, `texts` and `shards` of the receipts of each (kind, fingerprint).

    An item that lies in several shards, because its first shard was damaged for a while, is listed once.
    """
    tables: dict[str, pa.Table] = {}
    shard_rows: list[dict[str, Any]] = []
    for (kind, fingerprint), found in receipts.items():
        parts = []
        for receipt in found:
            number = pa.repeat(pa.scalar(len(shard_rows), pa.int32()), len(receipt.items))
            parts.append(receipt.items.append_column("shard", number))
            facts = {name: getattr(receipt, name) for name in _RECEIPT_FACTS}
            shard_rows.append({"kind": kind, "fingerprint": fingerprint, "items": len(receipt.items), **facts})
        whole = pa.concat_tables([INDEX_SCHEMA.empty_table(), *(part.cast(INDEX_SCHEMA) for part in parts)])
        tables[kind] = _first_of_each(whole)
    tables["shards"] = pa.Table.from_pylist(shard_rows, schema=SHARD_SCHEMA)
    return tables


def _first_of_each(items: pa.Table) -> pa.Table:
    numbered = items.append_column("row", pa.array(range(len(items)), pa.int64()))
    first = numbered.group_by("id", use_threads=False).aggregate([("row", "min")])["row_min"]
    return items if len(first) == len(items) else items.take(first.sort())


def commit(directory: Path, tables: Mapping[str, pa.Table], facts: Mapping[str, Any]) -> CacheManifest:
    """Commit the tables, then the manifest that names them, then remove the tables of the view before.

    Args:
        tables: `samples`, `latents`, `texts` and `shards`.
        facts: the manifest's other fields.
    """
    digests = {}
    for name, table in tables.items():
        data = storage.table_bytes(table)
        digests[name] = blake3.blake3(data).hexdigest()
        storage.commit_bytes(table_path(directory, name, digests[name]), data)
    manifest = CacheManifest(
        schema_version=CACHE_SCHEMA, num_samples=len(tables["samples"]), tables=dict(sorted(digests.items())), **facts
    )
    manifest = dataclasses.replace(manifest, digest=_digest(manifest))
    storage.commit_json(directory / MANIFEST, _plain(manifest))
    named = {table_path(directory, name, digest) for name, digest in digests.items()}
    for path in (directory / "view").glob("*.parquet"):
        if path not in named:
            path.unlink(missing_ok=True)
    return manifest


def _digest(manifest: CacheManifest) -> str:
    return blake3.blake3(storage.json_bytes(_plain(dataclasses.replace(manifest, digest="")))).hexdigest()


def _plain(manifest: CacheManifest) -> dict[str, Any]:
    """What the file holds. Without what only some caches have it has the same bytes as one of a version that knew none."""
    plain = dataclasses.asdict(manifest)
    optional = ("prompt_images", "shared_texts", "preservation")
    return {name: value for name, value in plain.items() if value or name not in optional}


def read_manifest(directory: Path) -> CacheManifest | None:
    """`cache.json`, or None when there is none; `CacheError` when it is damaged or of another version."""
    path = directory / MANIFEST
    advice = "Run `ftk cache RUN.yaml`: it writes the file anew and keeps what is encoded."
    try:
        data = path.read_bytes()
        plain = json.loads(data)
        version = plain.get("schema_version")
        manifest = storage.checked(CacheManifest, plain) if version == CACHE_SCHEMA else None
        is_whole = (
            manifest is not None and manifest.digest == _digest(manifest) and storage.json_bytes(_plain(manifest)) == data
        )
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CacheError(f"{path} is damaged: {error}. {advice}") from None
    if isinstance(version, int) and version > CACHE_SCHEMA:
        raise NewerCacheError(f"{path} has schema version {version}; this ftk reads {CACHE_SCHEMA}. Install a newer ftk.")
    if isinstance(version, int) and version < CACHE_SCHEMA:
        raise CacheError(f"{path} has schema version {version}; this ftk reads {CACHE_SCHEMA}. Run `ftk cache RUN.yaml`.")
    if not is_whole or manifest is None:
        raise CacheError(f"{path} is damaged: it does not have its digest. {advice}")
    _check_names(path, manifest)
    return manifest


def _check_names(path: Path, manifest: CacheManifest) -> None:
    """Refuse a manifest whose names would lead elsewhere: a digest says that a file is whole, not who wrote it."""
    try:
        if set(manifest.tables) != set(_SCHEMAS):
            raise ValueError(f"its tables are {sorted(manifest.tables)}, not {sorted(_SCHEMAS)}")
        for name in (manifest.latents_fingerprint, manifest.texts_fingerprint, *manifest.tables.values()):
            storage.plain_name(name)
    except (ValueError, TypeError) as error:
        raise CacheError(f"{path} is forged: {error}. Run `ftk cache RUN.yaml`: it writes the file anew.") from None


def read_tables(directory: Path, manifest: CacheManifest) -> dict[str, pa.Table]:
    """The tables of a view.

    Raises:
        CacheError: one is not as committed.
        FileNotFoundError: one is not there.
    """
    tables = {}
    for name, digest in manifest.tables.items():
        path = table_path(directory, name, digest)
        data = path.read_bytes()
        if (found := blake3.blake3(data).hexdigest()) != digest:
            raise CacheError(
                f"{path} is damaged: expected BLAKE3 {digest}, found {found}. Run `ftk cache RUN.yaml`: it writes the "
                f"table anew and keeps what is encoded."
            )
        tables[name] = storage.read_table(pa.BufferReader(data), dictionary=_REPEATED)
        optional = {column.name for column in (*REFERENCE_FIELDS, PRESERVED_FIELD)} if name == "samples" else set()
        if [column for column in tables[name].column_names if column not in optional] != _SCHEMAS[name].names:
            raise CacheError(f"{path} has other columns than this ftk reads. Run `ftk cache RUN.yaml`: it is written anew.")
    _check_shards(directory, tables)
    return tables


def _check_shards(directory: Path, tables: Mapping[str, pa.Table]) -> None:
    """Refuse tables that name files outside of the cache, or shards that are not listed."""
    table = tables["shards"]
    problem = shards_problem(table)
    for kind in KINDS:
        rows = tables[kind]["shard"]
        if not problem and len(rows) and (rows.null_count or pc.min(rows).as_py() < 0 or pc.max(rows).as_py() >= len(table)):
            problem = f"an item of {kind} is in a shard that the table of shards does not list"
    if problem:
        raise CacheError(f"{directory} is forged: {problem}. Run `ftk cache RUN.yaml`: it writes the tables anew.")


def shards_problem(table: pa.Table) -> str | None:
    """What keeps a table of shards from naming files of a cache; None when nothing does."""
    for row in table.select(["kind", "fingerprint", "name"]).to_pylist():
        if row["kind"] not in KINDS or not (storage.is_plain_name(row["fingerprint"]) and storage.is_plain_name(row["name"])):
            return f"{row['kind']}/{row['fingerprint']}/{row['name']} is no shard of a cache"
    return None


def receipt_digests(directory: Path, manifest: CacheManifest) -> dict[str, str]:
    """The BLAKE3 of every receipt by `kind/fingerprint/name`; empty when the shards' table is damaged, missing or forged."""
    path = table_path(directory, "shards", manifest.tables["shards"])
    if not path.is_file() or storage.blake3_file(path) != manifest.tables["shards"]:
        return {}
    table = storage.read_table(path, ["kind", "fingerprint", "name", "receipt_blake3"])
    rows = [] if shards_problem(table) else table.to_pylist()
    return {f"{row['kind']}/{row['fingerprint']}/{row['name']}": row["receipt_blake3"] for row in rows}


def check(directory: Path, manifest: CacheManifest) -> list[Damage]:
    """The tables of the view that are not as committed."""
    damages = []
    for name, digest in manifest.tables.items():
        path = table_path(directory, name, digest)
        found = storage.blake3_file(path) if path.is_file() else "no file"
        if found != digest:
            damages.append(Damage(path=str(path), problem="not as committed", expected=digest, found=found))
        elif name == "shards" and (problem := shards_problem(storage.read_table(path))):
            damages.append(Damage(path=str(path), problem="forged", expected="shards of this cache", found=problem))
    return damages
