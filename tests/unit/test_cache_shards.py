"""Shards of a cache: equal items are equal bytes, a receipt makes them count, and what is not as committed is found."""

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blake3
import pyarrow as pa
import pytest
import torch
import xxhash
from safetensors import safe_open

from ftk import storage
from ftk.cache import shards
from ftk.cache.shards import Damage, Receipt

Items = list[tuple[str, dict[str, torch.Tensor]]]


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _latents(count: int = 3) -> Items:
    return [(f"image{n}", {"mean": _noise(4, 3, 5, seed=n).half(), "std": _noise(4, 3, 5, seed=n + 50)}) for n in range(count)]


def _of_every_kind() -> dict[str, torch.Tensor]:
    return {
        "float32": _noise(3, 2), "float64": _noise(2).double(), "float16": _noise(5).half(),
        "bfloat16": _noise(7, 3).bfloat16(), "int64": torch.tensor([2**62, -1]), "bool": torch.tensor([True, False, True]),
        "uint8": torch.arange(3, dtype=torch.uint8), "empty": torch.zeros(0, 16, dtype=torch.bfloat16),
        "nan": torch.tensor([float("nan"), float("-inf")]),
    }  # fmt: skip


class Killed(BaseException):
    """What no handler catches."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "latents" / "aaaa"


@pytest.fixture
def receipt(folder: Path) -> Receipt:
    return shards.write(folder, _latents())


def _shard(folder: Path, receipt: Receipt) -> Path:
    return folder / f"{receipt.name}.safetensors"


def _flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def _damage_of(folder: Path, known: dict[str, str] | None = None) -> Damage:
    found, (damage,) = shards.receipts(folder, known or {})
    assert not found
    return damage


def _header_bytes(path: Path) -> int:
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    return 8 + int(length)


def test_equal_items_give_equal_files(tmp_path: Path) -> None:
    one, two = (shards.write(tmp_path / place, _latents()) for place in "ab")
    assert one == two
    for suffix in (".safetensors", ".parquet"):
        assert (tmp_path / "a" / (one.name + suffix)).read_bytes() == (tmp_path / "b" / (two.name + suffix)).read_bytes()


def test_what_lies_in_memory_in_another_order_gives_the_same_bytes(folder: Path, receipt: Receipt) -> None:
    before = _shard(folder, receipt).read_bytes(), (folder / f"{receipt.name}.parquet").read_bytes()
    turned = [
        (item, {name: tensors[name].transpose(0, 2).contiguous().transpose(0, 2) for name in reversed(tensors)})
        for item, tensors in _latents()
    ]
    assert not turned[0][1]["mean"].is_contiguous()
    assert shards.write(folder, turned) == receipt
    assert (_shard(folder, receipt).read_bytes(), (folder / f"{receipt.name}.parquet").read_bytes()) == before


def test_sides_of_one_may_have_any_stride(tmp_path: Path) -> None:
    """As in a latent of one cell of a batch in channels-last order."""
    tensor = _noise(2, 3, 1, 1).as_strided((3, 1, 1), (1, 3, 3))
    assert tensor.is_contiguous()
    assert shards.write(tmp_path / "a", [("one", {"mean": tensor})]) == shards.write(
        tmp_path / "b", [("one", {"mean": tensor.flatten().clone().view(3, 1, 1)})]
    )


def test_a_view_is_written_without_the_batch_that_it_is_of(tmp_path: Path) -> None:
    batch = _noise(100, 8)
    receipt = shards.write(tmp_path, [("one", {"mean": batch[3]})])
    assert receipt.bytes < 8 * 4 + 200
    with safe_open(_shard(tmp_path, receipt), "pt") as file:
        assert torch.equal(file.get_tensor("one.mean"), batch[3])


def test_the_name_tells_the_ids_and_their_order_and_nothing_else(tmp_path: Path) -> None:
    items = _latents()
    name = shards.write(tmp_path, items).name
    assert shards.write(tmp_path, [(item, {"mean": torch.ones(1)}) for item, _ in items]).name == name
    assert shards.name_of(iter(["image0", "image1", "image2"])) == name
    others = [["image0", "image1"], ["image1", "image0", "image2"], ["image0image1", "image2"], []]
    assert len({name, *(shards.name_of(ids) for ids in others)}) == 5


def test_every_type_reads_back_as_it_was(tmp_path: Path) -> None:
    tensors = _of_every_kind()
    receipt = shards.write(tmp_path, [("one", tensors)])
    with safe_open(_shard(tmp_path, receipt), "pt") as file:
        assert set(file.keys()) == {f"one.{name}" for name in tensors}
        for name, tensor in tensors.items():
            read = file.get_tensor(f"one.{name}")
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert read.view(torch.uint8).tolist() == tensor.view(torch.uint8).tolist()


def test_the_receipt_tells_what_is_in_the_files(folder: Path) -> None:
    items: Items = [
        ("b", {"std": _noise(2, 3), "mean": _noise(5, 3, seed=1).half()}),
        ("a", {"embeds": _noise(7, 4).bfloat16()}),
    ]
    receipt = shards.write(folder, items)
    mean, std = items[0][1]["mean"].numpy().tobytes(), items[0][1]["std"].numpy().tobytes()
    embeds = items[1][1]["embeds"].view(torch.uint8).numpy().tobytes()
    assert receipt.items.schema.equals(shards.ITEM_SCHEMA)
    assert receipt.items.to_pylist() == [
        {"id": "b", "tensors": "mean std", "length": 5, "bytes": 54, "checksum": xxhash.xxh3_128_digest(mean + std)},
        {"id": "a", "tensors": "embeds", "length": 7, "bytes": 56, "checksum": xxhash.xxh3_128_digest(embeds)},
    ]
    data, table = _shard(folder, receipt).read_bytes(), (folder / f"{receipt.name}.parquet").read_bytes()
    assert receipt.bytes == len(data)
    assert receipt.blake3 == blake3.blake3(data).hexdigest()
    assert receipt.header_blake3 == blake3.blake3(data[: _header_bytes(_shard(folder, receipt))]).hexdigest()
    assert receipt.receipt_bytes == len(table)
    assert receipt.receipt_blake3 == blake3.blake3(table).hexdigest()
    assert shards.read_receipt(folder / f"{receipt.name}.parquet") == receipt


def test_a_shard_does_not_count_before_its_receipt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path, _: pa.Table) -> None:
        assert [one.name for one in folder.iterdir()] == [f"{path.stem}.safetensors"]
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(storage, "commit_table", killed)
        with pytest.raises(Killed):
            shards.write(folder, _latents())
    assert shards.receipts(folder, {}) == ([], [])
    receipt = shards.write(folder, _latents())
    assert shards.receipts(folder, {}) == ([receipt], [])


def test_whole_shards_come_by_name(folder: Path) -> None:
    written = [shards.write(folder, _latents(count)) for count in range(1, 30)]
    known = {f"latents/aaaa/{one.name}": one.receipt_blake3 for one in written}
    assert shards.receipts(folder, known) == (sorted(written, key=lambda one: one.name), [])


def test_files_that_are_no_receipts_are_passed_over(folder: Path, receipt: Receipt) -> None:
    path = folder / f"{receipt.name}.parquet"
    path.rename(shards.aside(path))
    (folder / f"{storage.TEMPORARY_PREFIX}x.parquet-1-ab").write_bytes(b"half")
    assert shards.receipts(folder, {}) == ([], [])
    assert shards.receipts(folder / "nowhere", {}) == ([], [])


@pytest.mark.parametrize(
    ("harm", "problem", "found"),
    [
        (lambda path: path.unlink(), "missing", "no file"),
        (lambda path: path.rename(shards.aside(path)), "missing", "it was set aside by `ftk verify`"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "other size", "1,"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "other size", "1,"),
        (lambda path: path.write_bytes(b""), "other size", "0 bytes"),
        (lambda path: _flip(path, 12), "other header", ""),
        (lambda path: _flip(path, 0), "other header", ""),
    ],
)
def test_a_shard_that_is_not_as_committed_does_not_count(
    folder: Path, receipt: Receipt, harm: Callable[[Path], Any], problem: str, found: str
) -> None:
    others = shards.write(folder, _latents(1))
    path = _shard(folder, receipt)
    harm(path)
    whole, (damage,) = shards.receipts(folder, {})
    assert whole == [others]
    assert (damage.path, damage.problem, damage.shard) == (str(path), problem, f"latents/aaaa/{receipt.name}")
    assert found in damage.found
    expected = receipt.header_blake3 if problem == "other header" else f"{receipt.bytes:,} bytes"
    assert damage.expected == expected
    assert str(damage) == f"{path}: {problem}: expected {expected}, found {damage.found}"


def _without_facts(path: Path) -> None:
    storage.commit_table(path, storage.read_table(path).replace_schema_metadata())


def _with_a_size_in_words(path: Path) -> None:
    table = storage.read_table(path)
    storage.commit_table(path, table.replace_schema_metadata({**table.schema.metadata, b"shard_bytes": b"many"}))


def _with_another_column(path: Path) -> None:
    table = storage.read_table(path)
    storage.commit_table(path, table.append_column("more", pa.nulls(len(table))))


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not a table"),
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes(path.read_bytes()[20:]),
        lambda path: path.write_bytes(path.read_bytes()[:-8] + struct.pack("<I", 2**31 - 1) + b"PAR1"),
        _without_facts,
        _with_a_size_in_words,
        _with_another_column,
    ],
)
def test_a_damaged_receipt_does_not_count(folder: Path, receipt: Receipt, harm: Callable[[Path], Any]) -> None:
    path = folder / f"{receipt.name}.parquet"
    harm(path)
    with pytest.raises(ValueError, match=r"."):
        shards.read_receipt(path)
    damage = _damage_of(folder)
    assert (damage.path, damage.shard) == (str(path), f"latents/aaaa/{receipt.name}")
    assert "\n" not in str(damage)


def test_no_flipped_byte_of_a_receipt_goes_unseen(folder: Path, receipt: Receipt) -> None:
    path = folder / f"{receipt.name}.parquet"
    data = path.read_bytes()
    known = {f"latents/aaaa/{receipt.name}": receipt.receipt_blake3}
    for place in range(0, len(data), 19):
        _flip(path, place, place % 8)
        try:
            assert shards.read_receipt(path).receipt_blake3 != receipt.receipt_blake3
        except ValueError:
            continue
        finally:
            path.write_bytes(data)
    _flip(path, len(data) // 3)
    assert _damage_of(folder, known).path == str(path)


def test_a_receipt_other_than_the_recorded_one_does_not_count(folder: Path, receipt: Receipt) -> None:
    again = shards.write(folder, [(item, {"mean": tensors["mean"]}) for item, tensors in _latents()])
    assert again.name == receipt.name
    damage = _damage_of(folder, {f"latents/aaaa/{receipt.name}": receipt.receipt_blake3})
    assert damage.path == str(folder / f"{receipt.name}.parquet")
    assert (damage.problem, damage.expected, damage.found) == ("other contents", receipt.receipt_blake3, again.receipt_blake3)
    assert shards.receipts(folder, {f"latents/other/{receipt.name}": receipt.receipt_blake3}) == ([again], [])


def test_only_a_deep_check_sees_the_tensors(folder: Path, receipt: Receipt) -> None:
    path = _shard(folder, receipt)
    assert shards.check(folder, receipt, deep=True) is None
    for place in (_header_bytes(path), receipt.bytes // 2, receipt.bytes - 1):
        data = path.read_bytes()
        _flip(path, place, 7)
        assert shards.check(folder, receipt) is None
        damage = shards.check(folder, receipt, deep=True)
        assert damage is not None
        assert (damage.problem, damage.expected) == ("other contents", receipt.blake3)
        assert damage.found == blake3.blake3(path.read_bytes()).hexdigest()
        path.write_bytes(data)


def test_a_flipped_bit_of_a_header_is_seen(folder: Path, receipt: Receipt) -> None:
    path = _shard(folder, receipt)
    data = path.read_bytes()
    for place in (*range(16), *range(16, _header_bytes(path), 11)):
        for bit in range(8) if place < 16 else (place % 8,):
            _flip(path, place, bit)
            damage = shards.check(folder, receipt)
            assert damage is not None
            assert damage.problem == "other header"
            path.write_bytes(data)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_hostile_header_is_damage_and_takes_no_memory(folder: Path, receipt: Receipt, length: int) -> None:
    path = _shard(folder, receipt)
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    tracemalloc.start()
    damage = shards.check(folder, receipt, deep=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert damage is not None
    assert damage.problem == "other header"
    assert peak < shards._MAX_HEADER_BYTES + (8 << 20)


@pytest.mark.parametrize("header", [b"", b"[]", b"not JSON at all", b"\xff" * 40, b'{"a":' * 200])
def test_a_header_that_is_no_header_is_damage(folder: Path, receipt: Receipt, header: bytes) -> None:
    path = _shard(folder, receipt)
    path.write_bytes((struct.pack("<Q", len(header)) + header).ljust(receipt.bytes, b"\0")[: receipt.bytes])
    damage = _damage_of(folder)
    assert damage.problem == "other header"


@pytest.mark.parametrize("data", [b"", b"\1\2\3", struct.pack("<Q", 9)])
def test_a_file_shorter_than_its_header_has_a_digest(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file").write_bytes(data)
    assert shards.header_digest(tmp_path / "file") == blake3.blake3(data).hexdigest()


def test_the_header_and_where_the_data_begin(folder: Path, receipt: Receipt) -> None:
    path = _shard(folder, receipt)
    header, start = shards.read_header(path)
    assert start == _header_bytes(path)
    assert header == json.loads(path.read_bytes()[8:start])
    begin, end = header["image1.mean"]["data_offsets"]
    assert path.read_bytes()[start + begin : start + end] == _latents()[1][1]["mean"].numpy().tobytes()


def test_a_dropped_shard_counts_no_more(folder: Path, receipt: Receipt) -> None:
    other = shards.write(folder, _latents(1))
    shards.drop(folder, receipt.name)
    assert shards.receipts(folder, {}) == ([other], [])
    assert _shard(folder, receipt).exists()
    shards.drop(folder, receipt.name)


def test_a_checksum_is_of_every_byte_in_the_order_of_the_names() -> None:
    tensors = _of_every_kind()
    whole = shards.checksum(tensors)
    data = b"".join(tensors[name].view(torch.uint8).numpy().tobytes() for name in sorted(tensors))
    assert whole == xxhash.xxh3_128_digest(data)
    assert shards.checksum(dict(reversed(tensors.items()))) == whole
    assert shards.checksum({**tensors, "float32": tensors["float32"].t().contiguous().t()}) == whole
    for name, tensor in tensors.items():
        if tensor.numel():
            changed = tensor.clone()
            changed.view(torch.uint8).view(-1)[-1] ^= 1
            assert shards.checksum({**tensors, name: changed}) != whole
    exchanged = {**tensors, "bool": tensors["uint8"], "uint8": tensors["bool"]}
    assert shards.checksum(exchanged) != whole


def test_the_set_aside_name_is_no_shard_and_no_receipt() -> None:
    for name in ("a.safetensors", "a.parquet"):
        assert shards.aside(Path("/cache") / name) == Path(f"/cache/{name}.damaged")
