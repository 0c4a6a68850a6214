"""The table source: rows of every format, their columns, files and faults, and what is refused."""

import csv
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftk import locations
from ftk.configs.schema import SourceConfig
from ftk.contracts import Reject, RejectReason
from ftk.errors import ConfigError, EnvironmentFault, SourceError
from ftk.pipeline.sources import base
from ftk.pipeline.sources.base import Partition, Record
from ftk.pipeline.sources.table import SOURCE, TableSettings

Row = dict[str, Any]
FORMATS = ["jsonl", "ndjson", "csv", "tsv", "parquet"]


def _bytes_of(rows: list[Row], suffix: str) -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    if suffix in ("jsonl", "ndjson"):
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "surrogatepass")
    if suffix == "parquet":
        buffer = io.BytesIO()
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), buffer, row_group_size=2)
        return buffer.getvalue()
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, delimiter="\t" if suffix == "tsv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ["a.jpg", "sub/b.jpg", "c.jpg", "d.jpg", "e.jpg"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def _table(folder: Path, rows: list[Row], suffix: str = "jsonl", name: str = "metadata") -> Path:
    path = folder / f"{name}.{suffix}"
    path.write_bytes(_bytes_of(rows, suffix))
    return path


def _partitions(path: Path | str, shard_samples: int = 2, **settings: Any) -> list[Partition]:
    config = SourceConfig(path=str(path), **settings)
    return list(SOURCE.partitions(config, TableSettings(**config.settings), shard_samples))


def _records(path: Path | str, shard_samples: int = 2, **settings: Any) -> list[Record | Reject]:
    config = SourceConfig(path=str(path), **settings)
    partitions = pickle.loads(pickle.dumps(_partitions(path, shard_samples, **settings)))
    items = [list(SOURCE.read(config, TableSettings(**config.settings), partition)) for partition in partitions]
    assert [len(each) for each in items] == [partition.num_records for partition in partitions]
    return [item for each in items for item in each]


def _good(path: Path | str, **settings: Any) -> list[Record]:
    items = _records(path, **settings)
    assert not [item for item in items if isinstance(item, Reject)]
    return [item for item in items if isinstance(item, Record)]


def _bad(path: Path | str, **settings: Any) -> Reject:
    (item,) = _records(path, **settings)
    assert isinstance(item, Reject)
    return item


# Formats.


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_records(photos: Path, suffix: str) -> None:
    captions = ["a cat", 'a "red", fat cat', "größe\n猫 🐈", " a\tcat ", "x" * 200_000]
    names = ["a.jpg", "sub/b.jpg", "c.jpg", "d.jpg", "e.jpg"]
    path = _table(photos, [{"file_name": n, "id": "5", "text": c} for n, c in zip(names, captions, strict=True)], suffix)
    assert SOURCE.accepts(str(path).upper())
    *records, long = _records(path)
    assert [(r.identity, r.captions, r.image.read().decode()) for r in records if isinstance(r, Record)] == [
        (name, (caption.strip(),), name) for name, caption in zip(names[:-1], captions, strict=False)
    ]
    assert isinstance(long, Reject)
    assert (long.path, long.reason) == ("e.jpg", RejectReason.CAPTION_NOT_TEXT)
    assert "longer than 64 KiB" in long.detail
    assert [partition.num_records for partition in _partitions(path)] == [2, 2, 1]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_byte_order_mark_and_blank_lines_are_nothing(photos: Path, suffix: str) -> None:
    data = _bytes_of([{"file_name": "a.jpg", "text": "a cat"}, {"file_name": "c.jpg", "text": "a dog"}], suffix)
    lines = data.decode().splitlines()
    (photos / f"t.{suffix}").write_bytes("\r\n\r\n".join(lines).encode("utf-8-sig"))
    assert [record.identity for record in _good(photos / f"t.{suffix}")] == ["a.jpg", "c.jpg"]


def test_a_table_knows_its_own() -> None:
    for path in ["a.csv", "s3://b/x.JSONL", "https://h/x.parquet?sig=5", "t-{00..09}.tsv", "*.ndjson"]:
        assert SOURCE.accepts(path)
    for path in ["photos", "a.tar", "https://h/x?y=.csv", "photos.csv/"]:
        assert not SOURCE.accepts(path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.jsonl", b'{"file_name": "a.jpg"}\n{"file_name"\n', "line 2 is not JSON"),
        ("t.jsonl", b'{"file_name": "a.jpg"}\n\n["a.jpg"]\n', "line 3 holds list, not an object"),
        ("t.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("t.jsonl", b'{"file_name": "a.jpg"}\n{"text": "caf\xe9"}\n', "line 2 is not UTF-8 at its byte 13"),
        ("t.jsonl", b'{"file_name": "' + b"x" * (17 << 20), "line 1 is longer than 16 MiB"),
        ("t.csv", b"file_name,text\na.jpg,a cat, a dog\n", "line 2 has 3 fields where the header has 2"),
        ("t.csv", b'file_name,text\na.jpg,"two\nlines"\nc.jpg\n', "line 4 has 1 fields where the header has 2"),
        ("t.csv", b'file_name,text\na.jpg,"a cat\nc.jpg,a dog\n', "line 2 is not CSV: unexpected end of data"),
        ("t.csv", b'file_name,text\na.jpg,"a" cat\n', "line 2 is not CSV"),
        ("t.csv", "file_name,text\na.jpg,größe\n".encode("latin-1"), "line 2 is not UTF-8 at its byte 8"),
        ("t.csv", "file_name,text\n".encode("utf-16"), "line 1 is not UTF-8"),
        ("t.csv", b"file_name,text,text\n", "line 1 names the column 'text' twice"),
        ("t.parquet", b"no parquet at all", "is damaged, or no Parquet file"),
        ("t.parquet", b"", "is damaged, or no Parquet file"),
        ("t.jsonl", b"\n", "has no rows"),
        ("t.csv", b"", "has no rows"),
        ("t.csv", b"file_name,text\n", "has no rows"),
    ],
)
def test_a_malformed_table_is_refused_with_its_line(photos: Path, name: str, data: bytes, message: str) -> None:
    (photos / name).write_bytes(data)
    with pytest.raises(SourceError, match=rf"{name}.*{message}"):
        _records(photos / name, caption="a photo")


def test_a_damaged_parquet_file_is_refused(photos: Path) -> None:
    path = _table(photos, [{"file_name": "a.jpg", "text": f"caption {index}" * 50} for index in range(50)], "parquet")
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"metadata\.parquet is damaged|metadata\.parquet cannot be read"):
        _records(path)


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), os.mkfifo], ids=["folder", "fifo"])
def test_what_is_no_file_is_no_table(photos: Path, make: Callable[[Path], None]) -> None:
    make(photos / "t.csv")
    with pytest.raises(SourceError, match=r"t\.csv cannot be read: is a (folder|FIFO), not a file"):
        _records(photos / "t.csv")


def test_a_missing_table_names_the_nearest(photos: Path) -> None:
    _table(photos, [{"file_name": "a.jpg"}])
    with pytest.raises(SourceError, match=r"meta\.jsonl does not exist\. Did you mean `.*metadata\.jsonl`\?"):
        _records(photos / "meta.jsonl")
    with pytest.raises(SourceError, match=r"no table matches .*none\*\.jsonl"):
        _records(photos / "none*.jsonl")
    with pytest.raises(SourceError, match=r"list\.txt is no table \(known: \.jsonl"):
        _records(photos / "list.txt", format="table")


def test_several_tables_follow_each_other(photos: Path) -> None:
    for name, image in [("t-01", "c.jpg"), ("t-00", "a.jpg"), ("t-02", "d.jpg")]:
        _table(photos, [{"file_name": image, "text": name}], name=name)
    assert [record.identity for record in _good(photos / "t-*.jsonl")] == ["a.jpg", "c.jpg", "d.jpg"]
    assert [record.identity for record in _good(photos / "t-{02..01}.jsonl")] == ["d.jpg", "c.jpg"]


# Columns.


def test_columns_are_found_by_their_usual_names(photos: Path) -> None:
    rows = [{"ID": 5, "Image": "a.jpg", "Caption": "a cat", "Prompt": "a dog"}]
    assert _good(_table(photos, rows))[0].captions == ("a cat",)
    rows = [{"path": "c.jpg", "file_name": "a.jpg", "text": "a cat", "TEXT": "a dog"}]
    (record,) = _good(_table(photos, rows))
    assert (record.identity, record.captions) == ("a.jpg", ("a cat",))
    (record,) = _good(_table(photos, rows), image="path", captions=("TEXT", "text"))
    assert (record.identity, record.captions) == ("c.jpg", ("a dog", "a cat"))


def test_a_row_may_leave_a_column_out(photos: Path) -> None:
    rows = [{"file_name": "a.jpg", "caption": "a cat"}, {"file_name": "c.jpg", "text": "a dog"}]
    first, second = _records(_table(photos, rows), captions=("text", "caption"))
    assert isinstance(first, Record)
    assert first.captions == ("a cat",)
    assert isinstance(second, Record)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image": "file"}, r"`image: file`: .*no such column\. Did you mean `file_nam`\? Its columns: file_nam, txt, m"),
        ({"image": "file_nam", "captions": ("tex",)}, r"`captions\.0: tex`.*Did you mean `txt`\?"),
        ({"image": "file_nam", "captions": ("txt",), "mask": "n"}, r"`mask: n`"),
        ({"image": "file_nam", "captions": ("txt",), "controls": ("m", "zebra")}, r"`controls\.1: zebra`"),
        ({}, r"no column file_name, image, path or url\. Name the one of the images with `image:`.*Its columns: file_nam"),
        (
            {"image": "file_nam"},
            r"no column text, caption, prompt or captions\. Name those of the captions with `captions: \[NAME\]`",
        ),
    ],
)
def test_an_unknown_column_is_refused_with_the_nearest(photos: Path, settings: Row, message: str) -> None:
    for suffix in FORMATS:
        with pytest.raises(SourceError, match=message):
            _records(_table(photos, [{"file_nam": "a.jpg", "txt": "a cat", "m": "a.jpg"}], suffix), **settings)


# Captions.


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_lists_of_captions_are_captions(photos: Path, suffix: str) -> None:
    rows = [{"file_name": "a.jpg", "text": ["a cat", "", "a pet"], "prompt": "p"}, {"file_name": "c.jpg", "text": ["a dog"]}]
    path = _table(photos, rows, suffix)
    assert [record.captions for record in _good(path)] == [("a cat", "a pet"), ("a dog",)]
    both = [record.captions for record in _good(path, captions=("prompt", "text"))]
    assert both == [("p", "a cat", "a pet"), ("a dog",)]


@pytest.mark.parametrize(
    ("value", "reason", "fallback"),
    [
        (None, RejectReason.CAPTION_MISSING, True),
        ([], RejectReason.CAPTION_MISSING, True),
        (" ", RejectReason.CAPTION_EMPTY, True),
        (["", None], RejectReason.CAPTION_EMPTY, True),
        (5, RejectReason.CAPTION_NOT_TEXT, False),
        ("a\0b", RejectReason.CAPTION_NOT_TEXT, False),
        ("half \ud83d", RejectReason.CAPTION_NOT_TEXT, False),
        ({"text": "a cat"}, RejectReason.CAPTION_NOT_TEXT, False),
    ],
)
def test_a_row_without_caption_is_rejected_or_takes_the_sources(
    photos: Path, value: object, reason: RejectReason, fallback: bool
) -> None:
    (photos / "t.jsonl").write_text(json.dumps({"file_name": "a.jpg", "text": value}) + "\n")
    reject = _bad(photos / "t.jsonl")
    assert (reject.source, reject.path, reject.reason) == (photos.name, "a.jpg", reason)
    assert "text in line 1 of t.jsonl" in reject.detail
    (item,) = _records(photos / "t.jsonl", caption="a photo")
    assert isinstance(item, Record) == fallback


def test_one_caption_may_serve_for_all(photos: Path) -> None:
    assert _good(_table(photos, [{"file_name": "a.jpg"}]), caption="a photo")[0].captions == ("a photo",)
    with pytest.raises(ConfigError, match="`caption` is empty"):
        _records(_table(photos, [{"file_name": "a.jpg"}]), caption="")


# Files.


def test_file_names_start_at_the_table_or_the_given_root(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    rows = [{"file_name": "sub/b.jpg", "text": "a cat"}]
    assert _good(_table(photos, rows))[0].image.read() == b"sub/b.jpg"
    assert _good(_table(elsewhere, rows), root=str(photos))[0].image.read() == b"sub/b.jpg"
    assert _bad(_table(elsewhere, rows)).reason == RejectReason.FILE_MISSING
    for name in [str(photos / "a.jpg"), f"../{photos.name}/a.jpg", (photos / "a.jpg").as_uri()]:
        (record,) = _good(_table(elsewhere, [{"file_name": name, "text": "a cat"}]))
        assert (record.identity, record.image.read()) == (name, b"a.jpg")


def test_a_table_named_without_a_folder_lies_here(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _table(photos, [{"file_name": "a.jpg", "text": "a cat"}])
    monkeypatch.chdir(photos)
    assert _good("metadata.jsonl")[0].image.read() == b"a.jpg"


@pytest.mark.parametrize("name", ["none.jpg", "a.jpg/b.jpg", "no/such/folder.jpg"])
def test_a_missing_file_is_rejected(photos: Path, name: str) -> None:
    reject = _bad(_table(photos, [{"file_name": name, "text": "a cat"}]))
    assert (reject.path, reject.reason) == (name, RejectReason.FILE_MISSING)
    assert reject.detail == f"{name} does not exist beside the table"


@pytest.mark.parametrize("value", [None, "", " ", 5, ["a.jpg"], "a\0.jpg", "\ud800.jpg"])
def test_a_row_without_file_name_is_rejected_by_its_number(photos: Path, value: object) -> None:
    rows = [{"file_name": "a.jpg", "text": "a cat"}, {"file_name": value, "text": "a cat"}]
    (photos / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    good, reject = _records(photos / "t.jsonl")
    assert isinstance(good, Record)
    assert isinstance(reject, Reject)
    assert (reject.path, reject.reason) == ("t/1", RejectReason.FILE_MISSING)
    assert "file_name in line 2 of t.jsonl is " in reject.detail
    reject.detail.encode()


def test_a_name_given_twice_is_yielded_twice(photos: Path) -> None:
    path = _table(photos, [{"file_name": "a.jpg", "text": "a cat"}, {"file_name": "a.jpg", "text": "a dog"}], "csv")
    assert [record.captions for record in _good(path)] == [("a cat",), ("a dog",)]


def test_names_of_any_bytes_are_found(photos: Path) -> None:
    names = ["two\nlines.jpg", "e\u0301.jpg", "\u00e9.jpg", os.fsdecode(b"caf\xe9.jpg"), "~odd.jpg"]
    for name in names:
        (photos / name).write_bytes(os.fsencode(name))
    (photos / "t.jsonl").write_text("\n".join(json.dumps({"file_name": name, "text": "a cat"}) for name in names))
    records = _good(photos / "t.jsonl")
    assert [(record.identity, record.image.read()) for record in records] == [(name, os.fsencode(name)) for name in names]


def test_masks_and_controls_are_columns(photos: Path) -> None:
    rows = [{"file_name": "a.jpg", "text": "a cat", "m": "c.jpg", "edge": "d.jpg", "depth": "sub/b.jpg"}]
    for suffix in FORMATS:
        (record,) = _good(_table(photos, rows, suffix), mask="m", controls=("depth", "edge"))
        assert record.mask is not None
        assert record.mask.read() == b"c.jpg"
        assert [control.read() for control in record.controls] == [b"sub/b.jpg", b"d.jpg"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"m": None, "edge": "c.jpg"}, RejectReason.MASK_MISSING),
        ({"m": "none.jpg", "edge": "c.jpg"}, RejectReason.MASK_MISSING),
        ({"m": "c.jpg", "edge": ""}, RejectReason.CONTROL_MISSING),
        ({"m": "c.jpg", "edge": "none.jpg"}, RejectReason.CONTROL_MISSING),
    ],
)
def test_a_row_without_its_mask_or_control_is_rejected(photos: Path, row: Row, reason: RejectReason) -> None:
    path = _table(photos, [{"file_name": "a.jpg", "text": "a cat", **row}])
    assert _bad(path, mask="m", controls=("edge",)).reason == reason


def test_the_signature_changes_with_every_row_and_file(photos: Path) -> None:
    rows = [{"file_name": name, "text": "a cat", "m": name} for name in ["a.jpg", "c.jpg", "d.jpg", "none.jpg"]]
    path = _table(photos, rows)
    first, second = (partition.signature for partition in _partitions(path, mask="m"))
    assert first is not None
    assert [partition.signature for partition in _partitions(path, mask="m")] == [first, second]
    os.utime(path)
    assert [partition.signature for partition in _partitions(path, mask="m")] == [first, second]
    (photos / "none.jpg").write_text("here now")
    assert [
        partition.signature == old for partition, old in zip(_partitions(path, mask="m"), (first, second), strict=True)
    ] == [
        True,
        False,
    ]
    rows[0]["text"] = "a dog"
    assert _partitions(_table(photos, rows), mask="m")[0].signature != first


# Bytes in Parquet.


def _bytes_table(path: Path, rows: list[Row], kind: pa.DataType, row_group_size: int = 2) -> Path:
    columns: Row = {name: [row.get(name) for row in rows] for name in rows[0]}
    columns["image"] = pa.array(columns["image"], kind)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), STRUCT, pa.struct({"bytes": pa.large_binary()})])
def test_images_lie_in_the_table_itself(tmp_path: Path, kind: pa.DataType) -> None:
    struct = pa.types.is_struct(kind)
    datas = [f"image {index}".encode() for index in range(5)]
    rows = [{"image": {"bytes": data} if struct else data, "text": f"caption {data!r}"} for data in datas]
    path = _bytes_table(tmp_path / "train-00.parquet", rows, kind)
    records = _good(path, shard_samples=1)
    assert [record.identity for record in records] == [f"train-00/{index}" for index in range(5)]
    assert [record.image.read() for record in records] == datas
    assert [record.captions for record in records] == [(f"caption {data!r}",) for data in datas]


def test_an_images_own_name_is_kept_beside_its_row(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": b"x", "path": path}, "text": "a cat"} for path in ["x.jpg", None, ""]]
    path = _bytes_table(tmp_path / "t.parquet", rows, STRUCT)
    assert [record.identity for record in _good(path)] == ["t/0-x.jpg", "t/1", "t/2"]


def test_whole_row_groups_make_a_partition(tmp_path: Path) -> None:
    rows = [{"image": b"x", "text": "a cat"}] * 11
    path = _bytes_table(tmp_path / "t.parquet", rows, pa.binary(), row_group_size=2)
    for shard_samples, expected in [(1, [2, 2, 2, 2, 2, 1]), (5, [4, 4, 3]), (256, [11])]:
        partitions = _partitions(path, shard_samples)
        assert [partition.num_records for partition in partitions] == expected
        assert len({partition.signature for partition in partitions}) == len(expected)
        assert None not in {partition.signature for partition in partitions}
    os.utime(path)
    assert _partitions(path, 256)[0].signature != partitions[0].signature


def test_tables_of_one_name_give_their_rows_different_names(tmp_path: Path) -> None:
    for folder in ["x", "y"]:
        (tmp_path / folder).mkdir()
        _bytes_table(tmp_path / folder / "t.parquet", [{"image": b"x", "text": folder}], pa.binary())
    records = _good(tmp_path / "*" / "t.parquet")
    assert [(record.identity, record.captions) for record in records] == [
        ("x/t.parquet/0", ("x",)),
        ("y/t.parquet/0", ("y",)),
    ]


def test_a_row_may_name_a_file_instead_and_then_nothing_vouches_for_it(photos: Path) -> None:
    rows = [
        {"image": {"bytes": b"x", "path": "x.jpg"}, "text": "a cat"},
        {"image": {"bytes": None, "path": "a.jpg"}, "text": "a dog"},
        {"image": {"bytes": None, "path": "none.jpg"}, "text": "a bird"},
        {"image": None, "text": "a fish"},
    ]
    path = _bytes_table(photos / "t.parquet", rows, STRUCT, row_group_size=1)
    assert [partition.signature is None for partition in _partitions(path, 1)] == [False, True, True, True]
    one, two, *rejects = _records(path, 1)
    assert isinstance(one, Record)
    assert isinstance(two, Record)
    assert [one.image.read(), two.image.read()] == [b"x", b"a.jpg"]
    assert [(reject.path, reject.reason) for reject in rejects if isinstance(reject, Reject)] == [
        ("t/2-none.jpg", RejectReason.FILE_MISSING),
        ("t/3", RejectReason.FILE_MISSING),
    ]


def test_masks_and_controls_may_be_bytes_too(photos: Path) -> None:
    row = {"image": b"x", "text": "a cat", "m": {"bytes": b"mask", "path": None}, "c": b"control", "d": "a.jpg"}
    path = _bytes_table(photos / "t.parquet", [row, {**row, "m": None}, {**row, "d": "none.jpg"}], pa.binary())
    good, no_mask, no_control = _records(path, mask="m", controls=("c", "d"))
    assert isinstance(good, Record)
    assert good.mask is not None
    assert [good.mask.read(), *(control.read() for control in good.controls)] == [b"mask", b"control", b"a.jpg"]
    assert isinstance(no_mask, Reject)
    assert isinstance(no_control, Reject)
    assert (no_mask.reason, no_control.reason) == (RejectReason.MASK_MISSING, RejectReason.CONTROL_MISSING)


def test_only_the_needed_columns_are_read(tmp_path: Path) -> None:
    import tracemalloc

    rows = [{"image": b"x", "text": "a cat", "embedding": os.urandom(1 << 20)} for _ in range(32)]
    path = _bytes_table(tmp_path / "t.parquet", rows, pa.binary(), row_group_size=32)
    before = pa.total_allocated_bytes()
    peak = 0
    tracemalloc.start()
    for _ in SOURCE.read(SourceConfig(path=str(path)), TableSettings(), _partitions(path, 256)[0]):
        peak = max(peak, pa.total_allocated_bytes() - before + tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert peak < 16 << 20


# Locations that are URLs.


@pytest.fixture
def memory() -> Any:
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_table_may_lie_at_a_url(memory: Any, suffix: str) -> None:
    memory.pipe("/data/images/a.jpg", b"image")
    rows = [
        {"file_name": name, "text": "a cat"} for name in ["images/a.jpg", "../data/images/a.jpg", "memory://data/images/a.jpg"]
    ]
    memory.pipe(f"/data/t.{suffix}", _bytes_of(rows, suffix))
    records = _good(f"memory://data/*.{suffix}")
    assert [record.image.read() for record in records] == [b"image"] * 3
    with pytest.raises(SourceError, match=r"memory://data/u\.\w+ does not exist"):
        _records(f"memory://data/u.{suffix}")


def test_files_beside_a_table_in_a_store_are_vouched_for_by_a_listing_and_others_by_their_urls(
    memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ["x/a.jpg", "x/b.jpg", "y/c.jpg"]:
        memory.pipe(f"/data/{name}", b"image")
    names = ["x/a.jpg", "x/b.jpg", "x/none.jpg", "y/c.jpg", "x/.hid.jpg", "http://127.0.0.1:1/a.jpg"]
    memory.pipe("/data/t.jsonl", _bytes_of([{"file_name": name, "text": "a cat"} for name in names], "jsonl"))
    listed: list[str] = []
    list_files = locations.list_files
    monkeypatch.setattr(locations, "list_files", lambda root: listed.append(root) or list_files(root))
    signatures = [partition.signature for partition in _partitions("memory://data/t.jsonl", 1)]
    assert None not in signatures
    assert listed == ["memory://data/x", "memory://data/y", "memory://data/x"]
    memory.pipe("/data/x/b.jpg", b"changed")
    after = [partition.signature for partition in _partitions("memory://data/t.jsonl", 1)]
    assert [old == new for old, new in zip(signatures, after, strict=True)] == [True, False, True, True, True, True]


def test_a_failing_disk_is_no_reject(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _table(photos, [{"file_name": "a.jpg", "text": "a cat"}])
    stat = Path.stat

    def failing(self: Path, **options: Any) -> os.stat_result:
        if self.name == "a.jpg":
            raise OSError(5, "Input/output error")
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", failing)
    with pytest.raises(EnvironmentFault, match=r"a\.jpg cannot be read: Input/output error"):
        _partitions(path)


def test_rows_that_name_one_file_have_identities_of_their_own_in_whatever_partition(photos: Path) -> None:
    rows = [{"file_name": "a.jpg", "text": f"caption {number}"} for number in range(3)]
    path = _table(photos, rows)
    config = SourceConfig(path=str(path))
    settings = TableSettings()
    records = [
        record for partition in SOURCE.partitions(config, settings, 1) for record in SOURCE.read(config, settings, partition)
    ]
    assert [record.identity for record in records if isinstance(record, Record)] == ["a.jpg", "a.jpg#2", "a.jpg#3"]


def test_a_parquet_table_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    table = pa.table([["a.jpg"], ["b.jpg"], ["text"]], names=["image", "image", "text"])
    pq.write_table(table, tmp_path / "t.parquet")
    config = SourceConfig(path=str(tmp_path / "t.parquet"))
    with pytest.raises(SourceError, match="has two columns called 'image'"):
        list(SOURCE.partitions(config, TableSettings(), 10))


# Lists of control images, and none.


def _controls(item: Record | Reject) -> list[str]:
    assert isinstance(item, Record), item
    return [blob.name for blob in item.controls]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_a_list_of_control_images_is_several(photos: Path, suffix: str) -> None:
    cells: list[Any] = [["a.jpg", "c.jpg"], ["a.jpg"], [], None]
    rows = [{"file_name": "d.jpg", "text": "a cat", "edit_image": cell} for cell in cells]
    if suffix == "csv":
        rows = [{**row, "edit_image": row["edit_image"] and json.dumps(row["edit_image"])} for row in rows]
    path = _table(photos, rows, suffix)
    items = _records(path, controls=("edit_image",), optional=True)
    assert [_controls(item) for item in items] == [["a.jpg", "c.jpg"], ["a.jpg"], [], []]
    first, second, *others = _records(path, controls=("edit_image",))
    assert [_controls(first), _controls(second)] == [["a.jpg", "c.jpg"], ["a.jpg"]]
    for item in others:
        assert isinstance(item, Reject)
        assert (item.reason, item.detail) == (RejectReason.CONTROL_MISSING, "the row has nothing under edit_image")


def test_a_table_of_musubi_tuner_is_read_as_it_is(photos: Path) -> None:
    rows = [
        {"image_path": "a.jpg", "caption": "one", "control_path_0": "c.jpg", "control_path_1": "a.jpg"},
        {"image_path": "c.jpg", "caption": "two", "control_path_0": "a.jpg"},
    ]
    columns = ["control_path_0", "control_path_1"]
    config = SourceConfig(path=str(_table(photos, rows)), image="image_path", references=columns, optional=True)
    source, settings = base.parse(config)
    (partition,) = source.partitions(config, settings, 10)
    records = [item for item in source.read(config, settings, partition) if isinstance(item, Record)]
    assert [[Path(blob.location).name for blob in record.controls] for record in records] == [["c.jpg", "a.jpg"], ["a.jpg"]]
    assert [record.captions for record in records] == [("one",), ("two",)]


def test_references_after_lists_of_controls_are_counted_by_themselves(photos: Path) -> None:
    rows = [
        {"file_name": "a.jpg", "text": "t", "edge": ["c.jpg", "d.jpg"], "before": ["e.jpg"]},
        {"file_name": "a.jpg", "text": "t", "edge": "c.jpg", "before": ["d.jpg", "e.jpg"]},
        {"file_name": "a.jpg", "text": "t", "edge": None, "before": []},
    ]
    config = SourceConfig(path=str(_table(photos, rows)), controls=["edge"], references=["before"], optional=True)
    source, settings = base.parse(config)
    (partition,) = source.partitions(config, settings, 5)
    found = [item for item in source.read(config, settings, partition) if isinstance(item, Record)]
    assert [_controls(item) for item in found] == [["c.jpg", "d.jpg", "e.jpg"], ["c.jpg", "d.jpg", "e.jpg"], []]
    assert [item.num_references for item in found] == [None, 2, 0]


@pytest.mark.parametrize("value", [["c.jpg", None], ["c.jpg", 5], {"a": "c.jpg"}, 5, True, [["c.jpg"]], ["c.jpg", ""]])
def test_what_is_no_list_of_names_is_rejected_even_where_control_images_are_optional(photos: Path, value: Any) -> None:
    (photos / "t.jsonl").write_text(json.dumps({"file_name": "a.jpg", "text": "a cat", "edge": value}))
    reject = _bad(photos / "t.jsonl", controls=("edge",), optional=True)
    assert reject.reason is RejectReason.CONTROL_MISSING
    assert "edge in line 1 of t.jsonl is " in reject.detail


def test_a_control_image_that_is_named_must_be_there(photos: Path) -> None:
    path = _table(photos, [{"file_name": "a.jpg", "text": "a cat", "edge": ["c.jpg", "none.jpg"]}])
    assert _bad(path, controls=("edge",), optional=True).detail == "none.jpg, under edge, does not exist"


def test_lists_of_image_bytes_in_parquet(photos: Path) -> None:
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows: list[Any] = [[{"bytes": b"1", "path": None}, {"bytes": b"2", "path": "x"}], [], None]
    columns = {
        "image": pa.array([{"bytes": b"i", "path": None}] * 3, struct),
        "edit_image": pa.array(rows, pa.list_(struct)),
        "text": ["a cat"] * 3,
    }
    pq.write_table(pa.table(columns), photos / "t.parquet", row_group_size=2)
    items = _records(photos / "t.parquet", controls=("edit_image",), optional=True)
    assert [[blob.data for blob in item.controls] for item in items if isinstance(item, Record)] == [[b"1", b"2"], [], []]
    assert [type(item) for item in _records(photos / "t.parquet", controls=("edit_image",))] == [Record, Reject, Reject]


def test_optional_without_anything_that_may_lack_is_refused(photos: Path) -> None:
    path = _table(photos, [{"file_name": "a.jpg", "text": "a cat"}])
    with pytest.raises(ConfigError, match="`optional` has no effect without `controls` or `references`"):
        base.parse(SourceConfig(path=str(path), optional=True))


# Names without suffixes.


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_id_stands_for_the_image_of_this_name(photos: Path, suffix: str) -> None:
    for name in ["000123.jpg", "sub/7.webp", "sub/7.txt", "plain"]:
        (photos / name).write_text(name)
    rows = [{"image": name, "text": "a cat"} for name in ["000123", "sub/7", "plain", "a.jpg"]]
    records = _good(_table(photos, rows, suffix))
    assert [record.identity for record in records] == ["000123.jpg", "sub/7.webp", "plain", "a.jpg"]
    assert [record.image.read().decode() for record in records] == ["000123.jpg", "sub/7.webp", "plain", "a.jpg"]


def test_a_number_stands_for_the_image_of_this_name(photos: Path) -> None:
    (photos / "123.jpg").write_text("123")
    (photos / "t.jsonl").write_text('{"image": 123, "text": "a cat"}\n{"image": 124, "text": "a cat"}')
    good, bad = _records(photos / "t.jsonl")
    assert isinstance(good, Record)
    assert good.identity == "123.jpg"
    assert isinstance(bad, Reject)
    assert "image in line 2 of t.jsonl is 124, not a file name" in bad.detail


def test_an_id_that_fits_no_image_or_several_is_rejected_with_what_was_tried(photos: Path) -> None:
    for name in ["two.jpg", "two.png"]:
        (photos / name).write_text(name)
    none, two = _records(_table(photos, [{"image": "none", "text": "a"}, {"image": "two", "text": "a"}]))
    assert isinstance(none, Reject)
    assert none.detail == "none does not exist beside the table, and neither does an image of this name with a suffix"
    assert isinstance(two, Reject)
    assert two.detail == "two is not a file beside the table, and two.jpg and two.png fit it: write the name with its suffix"


def test_an_id_in_a_store_is_looked_up_in_its_listing(memory: Any) -> None:
    memory.pipe("/data/x/7.jpg", b"seven")
    memory.pipe("/data/t.jsonl", _bytes_of([{"image": "x/7", "text": "a cat"}], "jsonl"))
    (record,) = _good("memory://data/t.jsonl")
    assert (record.identity, record.image.read()) == ("x/7.jpg", b"seven")


# Captions.


def test_the_column_captions_is_one_of_captions(photos: Path) -> None:
    rows = [{"image": "a.jpg", "captions": ["a cat", "a pet"]}, {"image": "c.jpg", "captions": "a dog"}]
    assert [record.captions for record in _good(_table(photos, rows))] == [("a cat", "a pet"), ("a dog",)]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@pytest.mark.parametrize("value", ["nan", "NaN", "None", "null", "<NA>", float("nan"), None])
def test_missing_values_of_other_programs_are_no_captions(photos: Path, suffix: str, value: Any) -> None:
    path = _table(photos, [{"image": "a.jpg", "text": value, "other": "x"}], suffix)
    assert _bad(path).reason in (RejectReason.CAPTION_MISSING, RejectReason.CAPTION_EMPTY)
    (record,) = _good(path, caption="a photo")
    assert (record.captions, record.is_fallback) == (("a photo",), True)
    assert _good(path, captions=("text", "other"))[0].captions == ("x",)


def test_not_a_number_in_a_column_of_numbers_is_no_caption(photos: Path) -> None:
    path = photos / "t.parquet"
    pq.write_table(pa.table({"image": ["a.jpg", "c.jpg"], "text": pa.array([float("nan"), 1.0])}), path)
    nothing, number = _records(path)
    assert isinstance(nothing, Reject)
    assert isinstance(number, Reject)
    assert (nothing.reason, number.reason) == (RejectReason.CAPTION_MISSING, RejectReason.CAPTION_NOT_TEXT)


def test_labels_of_datasets_are_captions(photos: Path) -> None:
    features = {"label": {"names": ["a cat", "a dog"], "_type": "ClassLabel"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    table = pa.table({"image": ["a.jpg", "c.jpg", "d.jpg", "e.jpg"], "label": [1, 0, -1, 9]})
    pq.write_table(table.replace_schema_metadata(metadata), photos / "t.parquet")
    items = _records(photos / "t.parquet", captions=("label",))
    assert [item.captions for item in items[:2] if isinstance(item, Record)] == [("a dog",), ("a cat",)]
    assert [item.reason.value for item in items[2:] if isinstance(item, Reject)] == ["caption_missing", "caption_not_text"]


# Any rows at all.

_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["a.jpg", "a", "nan", "[1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["bytes", "path", "x"]), inner, max_size=2),
    max_leaves=4,
)
_ROWS = st.lists(st.dictionaries(st.sampled_from(["image", "text", "mask", "edge"]), _VALUES), min_size=1, max_size=4)


@given(rows=_ROWS, optional=st.booleans())
def test_rows_of_any_values_give_records_and_rejects(
    rows: list[Row], optional: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-rows"
    folder.mkdir(exist_ok=True)
    (folder / "a.jpg").write_bytes(b"a")
    lines = [{"image": "a.jpg", "text": "t", "mask": "a.jpg", "edge": "a.jpg"}, *rows]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    items = _records(folder / "t.jsonl", mask="mask", controls=("edge",), optional=optional)
    assert len(items) == len(lines)
    for item in items:
        text = item.path + item.detail if isinstance(item, Reject) else item.identity
        assert text.encode("utf-8", "surrogateescape")


@given(
    data=st.binary(max_size=60) | st.text(alphabet='ab,"\n\r\t{}[]:0\\', max_size=60).map(str.encode),
    suffix=st.sampled_from(FORMATS),
)
def test_a_table_of_any_bytes_gives_records_and_rejects_or_a_message_with_its_path(
    data: bytes, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any-bytes.{suffix}"
    path.write_bytes({"csv": b"image,text\n", "tsv": b"image\ttext\n"}.get(suffix, b"") + data)
    try:
        items = _records(path, caption="a photo")
    except SourceError as error:
        message = str(error)
    else:
        message = path.name if all(isinstance(item, Record | Reject) for item in items) else ""
    assert path.name in message
