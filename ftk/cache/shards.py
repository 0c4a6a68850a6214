"""One encoder's folder of the cache: shards of safetensors, each with the receipt that makes it count.

`NAME.safetensors` holds the tensors `<id>.<tensor>`; `NAME.parquet`, its receipt, is committed after it and lists the items
with a checksum each. A shard is named by the ids in it, so whoever writes it, however often, writes the same name and bytes.
"""

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3
import pyarrow as pa
import torch
from safetensors.torch import save

from ftk import storage

Item = tuple[str, Mapping[str, torch.Tensor]]
KINDS = ("latents", "texts")
SHARD, RECEIPT, SET_ASIDE = ".safetensors", ".parquet", ".damaged"
ITEM_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("tensors", pa.string()),
        pa.field("length", pa.int32()),
        pa.field("bytes", pa.int64()),
        pa.field("checksum", pa.binary(16)),
    ]
)
"""`tensors`: names, sorted, with spaces between. `length`: the first dimension of the first of them; for texts, tokens.
`checksum`: XXH3-128 of their bytes, one after another."""

_SET_ASIDE_BY = "it was set aside by `ftk verify`"
_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100 << 20
_READERS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """A committed shard: its items, its size and the receipt's, and BLAKE3 of the shard, its header, and the receipt."""

    name: str
    items: pa.Table
    bytes: int
    blake3: str
    header_blake3: str
    receipt_bytes: int
    receipt_blake3: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """What is wrong with a file of a cache; `shard` is its folder and name when it belongs to one."""

    path: str
    problem: str
    expected: str
    found: str
    shard: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}: expected {self.expected}, found {self.found}"


def name_of(ids: Iterable[str]) -> str:
    """The name of the shard that holds these items, in this order."""
    return storage.digest(list(ids), 16)


def write(folder: Path, items: Sequence[Item]) -> Receipt:
    """Commit a shard, then its receipt."""
    payload = save({f"{item}.{name}": tensor.contiguous() for item, tensors in items for name, tensor in tensors.items()})
    (header_bytes,) = _LENGTH.unpack_from(payload)
    header = payload[: _LENGTH.size + header_bytes]
    rows = [
        {
            "id": item,
            "tensors": " ".join(sorted(tensors)),
            "length": tensors[min(tensors)].shape[0],
            "bytes": sum(tensor.nbytes for tensor in tensors.values()),
            "checksum": checksum(tensors),
        }
        for item, tensors in items
    ]
    facts = {
        "shard_bytes": str(len(payload)),
        "shard_blake3": blake3.blake3(payload).hexdigest(),
        "header_blake3": blake3.blake3(header).hexdigest(),
    }
    name = name_of(item for item, _ in items)
    receipt = folder / f"{name}{RECEIPT}"
    storage.commit_bytes(folder / f"{name}{SHARD}", payload)
    table = pa.Table.from_pylist(rows, schema=ITEM_SCHEMA)
    storage.commit_table(receipt, table.replace_schema_metadata({**facts, "digest": _digest(table, facts)}))
    return read_receipt(receipt)


def read_receipt(path: Path) -> Receipt:
    """What a receipt says; `ValueError` when it is damaged."""
    try:
        data = path.read_bytes()
        items = storage.read_table(pa.BufferReader(data))
        facts = {key.decode(): value.decode() for key, value in (items.schema.metadata or {}).items()}
        if not items.schema.equals(ITEM_SCHEMA):
            raise ValueError("other columns than a receipt has")
        if facts.pop("digest", None) != _digest(items, facts):
            raise ValueError("it does not have its digest")
        return Receipt(
            name=path.stem,
            items=items.replace_schema_metadata(),
            bytes=int(facts["shard_bytes"]),
            blake3=facts["shard_blake3"],
            header_blake3=facts["header_blake3"],
            receipt_bytes=len(data),
            receipt_blake3=blake3.blake3(data).hexdigest(),
        )
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"it cannot be read ({' '.join(str(error).split())[:120]})") from None


def _digest(items: pa.Table, facts: Mapping[str, str]) -> str:
    """Of all that a receipt says: Parquet itself notices no flipped bit."""
    columns = {name: items[name].to_pylist() for name in items.column_names}
    return storage.digest([dict(facts), {**columns, "checksum": [(one or b"").hex() for one in columns["checksum"]]}])


def receipts(folder: Path, known: Mapping[str, str]) -> tuple[list[Receipt], list[Damage]]:
    """The shards of a folder by name, and those that do not count because a size, header or receipt is not as committed.

    Args:
        known: the BLAKE3 of receipts by `kind/fingerprint/name`, where a view has recorded it.
    """

    def look(path: Path) -> tuple[Receipt | None, Damage | None]:
        shard = f"{folder.parent.name}/{folder.name}/{path.stem}"
        try:
            receipt = read_receipt(path)
        except ValueError as error:
            return None, Damage(path=str(path), problem=str(error), expected="a receipt", found="damage", shard=shard)
        expected = known.get(shard, receipt.receipt_blake3)
        if receipt.receipt_blake3 != expected:
            found = receipt.receipt_blake3
            return None, Damage(path=str(path), problem="other contents", expected=expected, found=found, shard=shard)
        damage = check(folder, receipt)
        return (None, damage) if damage else (receipt, None)

    paths = sorted(folder.glob(f"*{RECEIPT}")) if folder.is_dir() else []
    there = set(paths)
    with ThreadPoolExecutor(_READERS) as pool:
        looked = list(pool.map(look, paths))
    damages = [damage for _, damage in looked if damage]
    for shard in sorted(known):
        path = folder / f"{Path(shard).name}{RECEIPT}"
        if Path(shard).parts[:2] == (folder.parent.name, folder.name) and path not in there:
            found = _SET_ASIDE_BY if aside(path).exists() else "no file"
            damages.append(Damage(path=str(path), problem="missing", expected="a receipt", found=found, shard=shard))
    return [receipt for receipt, _ in looked if receipt], damages


def check(folder: Path, receipt: Receipt, deep: bool = False) -> Damage | None:
    """What is wrong with a shard: its size and header; with `deep` every byte of it."""
    path = folder / f"{receipt.name}{SHARD}"
    shard = f"{folder.parent.name}/{folder.name}/{receipt.name}"

    def damage(problem: str, expected: str, found: str) -> Damage:
        return Damage(path=str(path), problem=problem, expected=expected, found=found, shard=shard)

    if not path.is_file():
        found = _SET_ASIDE_BY if aside(path).exists() else "no file"
        return damage("missing", f"{receipt.bytes:,} bytes", found)
    if (size := path.stat().st_size) != receipt.bytes:
        return damage("other size", f"{receipt.bytes:,} bytes", f"{size:,} bytes")
    if (found := header_digest(path)) != receipt.header_blake3:
        return damage("other header", receipt.header_blake3, found)
    if deep and (found := storage.blake3_file(path)) != receipt.blake3:
        return damage("other contents", receipt.blake3, found)
    return None


def aside(path: Path) -> Path:
    """The name under which `ftk verify` keeps a damaged file."""
    return path.with_name(path.name + SET_ASIDE)


def header_digest(path: Path) -> str:
    """BLAKE3 of a safetensors file's header, its length field included."""
    with path.open("rb") as file:
        length = file.read(_LENGTH.size)
        num_bytes = _LENGTH.unpack(length)[0] if len(length) == _LENGTH.size else 0
        return blake3.blake3(length + file.read(min(num_bytes, _MAX_HEADER_BYTES))).hexdigest()


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, and where its data begin. The digest of the header is to be checked before."""
    with path.open("rb") as file:
        (num_bytes,) = _LENGTH.unpack(file.read(_LENGTH.size))
        return json.loads(file.read(num_bytes)), _LENGTH.size + num_bytes


def drop(folder: Path, name: str) -> None:
    """Make a shard count no more, so that its items are encoded again."""
    (folder / f"{name}{RECEIPT}").unlink(missing_ok=True)
    if folder.is_dir():
        storage.fsync_directory(folder)


def checksum(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """XXH3-128 of an item's tensors in the order of their names."""
    ordered = [tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy() for name in sorted(tensors)]
    return storage.item_checksum(*(memoryview(array).cast("B") if array.size else b"" for array in ordered))
