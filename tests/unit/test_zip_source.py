"""Zips of images: captions beside the images or in a table, names, damage, bounds, and any name at all."""

import io
import json
import pickle
import re
import struct
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftk.configs.schema import SourceConfig
from ftk.contracts import Reject, RejectReason
from ftk.errors import FtkError, SourceError
from ftk.pipeline import captions
from ftk.pipeline.shard_writer import sample_key
from ftk.pipeline.sources import base, webdataset
from ftk.pipeline.sources.base import Record

Members = dict[str, bytes | str] | list[tuple[str, bytes | str]]


def _zip(path: Path, members: Members, **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in members.items() if isinstance(members, dict) else members:
            archive.writestr(name, data)
    return path


def _read(path: Path | str, shard_samples: int = 2, **settings: Any) -> list[Record | Reject]:
    config = SourceConfig(path=str(path), **settings)
    source, parsed = base.parse(config)
    partitions = pickle.loads(pickle.dumps(list(source.partitions(config, parsed, shard_samples))))
    items = [list(source.read(config, parsed, partition)) for partition in partitions]
    assert [len(each) for each in items] == [partition.num_records for partition in partitions]
    return [item for each in items for item in each]


def _records(*arguments: Any, **settings: Any) -> list[Record]:
    items = _read(*arguments, **settings)
    assert not [item for item in items if isinstance(item, Reject)], items
    return [item for item in items if isinstance(item, Record)]


def _rejects(*arguments: Any, **settings: Any) -> dict[str, tuple[RejectReason, str]]:
    return {item.path: (item.reason, item.detail) for item in _read(*arguments, **settings) if isinstance(item, Reject)}


FOLDER = {
    "b.jpg": b"b", "b.txt": "a cat", "sub/deep/c.PNG": b"c", "sub/deep/c.json": '{"caption": ["a dog", "a pet"]}',
    "sub/a.webp": b"a", "sub/A.TXT": "a bird", "Z.png": b"z", "Z.png.caption": "a fish", "notes.md": "no image",
}  # fmt: skip


def test_images_with_captions_beside_them_are_read_as_those_of_the_folder_that_was_packed(tmp_path: Path) -> None:
    archive = _zip(tmp_path / "photos.zip", FOLDER, compression=zipfile.ZIP_DEFLATED)
    records = _records(archive)
    for name, data in FOLDER.items():
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    unpacked = _records(tmp_path / "photos")
    assert [record.identity for record in records] == [f"photos.zip/{record.identity}" for record in unpacked]
    assert [record.captions for record in records] == [record.captions for record in unpacked]
    assert [record.image.read() for record in records] == [record.image.read() for record in unpacked]


def test_caption_files_of_no_image_are_noted(tmp_path: Path) -> None:
    config = SourceConfig(path=str(_zip(tmp_path / "a.zip", {"a.jpg": b"a", "a.txt": "a", "b.jpg": b"b", "c.txt": "c"})))
    source, settings = base.parse(config)
    *_, last = source.partitions(config, settings, 1)
    assert [each.path for each in last.notes.unmatched_captions] == ["c.txt"]


def test_settings_of_caption_files(tmp_path: Path) -> None:
    archive = _zip(tmp_path / "a.zip", {"a.jpg": b"a", "a.tags": "one\ntwo", "b.jpg": b"b"})
    records = _records(archive, caption_suffix="tags", caption_lines=True, caption="a photo")
    assert [(record.captions, record.is_fallback) for record in records] == [(("one", "two"), False), (("a photo",), True)]
    assert _rejects(archive)["a.zip/b.jpg"] == (
        RejectReason.CAPTION_MISSING,
        "no b.txt, b.caption, b.json in the zip, and the source has no `caption:` to fall back on",
    )


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_table_in_the_zip_names_its_members(tmp_path: Path, suffix: str) -> None:
    rows = [["img/a.jpg", "a cat", "m.png"], ["img/b.jpg", "a dog", "m.png"], ["img/a.jpg", "a pet", "m.png"]]
    names = ["file_name", "text", "mask"]
    text = "\n".join([",".join(names), *map(",".join, rows)])
    if suffix == "jsonl":
        text = "\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows)
    members = {f"top/metadata.{suffix}": text, "top/img/a.jpg": b"a", "top/img\\b.jpg": b"b", "top/m.png": b"m"}
    records = _records(_zip(tmp_path / "t.zip", members), mask="mask")
    assert [record.identity for record in records] == ["t.zip/top/img/a.jpg", "t.zip/top/img/b.jpg", "t.zip/top/img/a.jpg#2"]
    assert [record.captions for record in records] == [("a cat",), ("a dog",), ("a pet",)]
    assert [record.image.read() for record in records] == [b"a", b"b", b"a"]
    assert {record.mask.read() for record in records if record.mask} == {b"m"}


def test_a_table_can_name_members_alone(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    outside = [str(tmp_path / "secret.png"), "../secret.png", "/etc/passwd", "https://h/a.png", "none.png", "sub"]
    rows = [{"file_name": name, "text": "a cat"} for name in outside] + [{"file_name": None, "text": "a cat"}]
    archive = _zip(tmp_path / "t.zip", {"metadata.jsonl": "\n".join(map(json.dumps, rows)), "sub/": b"", "a.png": b""})
    rejects = _rejects(archive)
    assert len(rejects) == 7
    assert {reason for reason, _ in rejects.values()} == {RejectReason.FILE_MISSING}
    assert "not a member of the zip" in rejects["t.zip/none.png"][1]
    assert "file_name in line 7" in rejects["t.zip/metadata.jsonl/6"][1]


def test_lists_of_controls_and_references_in_a_zip(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "text": "t", "edge": ["b.png", "c.png"]}, {"image": "b.png", "text": "t", "edge": []}]
    members = {"metadata.jsonl": "\n".join(map(json.dumps, rows)), "a.png": b"a", "b.png": b"b", "c.png": b"c"}
    archive = _zip(tmp_path / "t.zip", members)
    assert "nothing under edge" in _rejects(archive, controls=["edge"])["t.zip/b.png"][1]
    records = _records(archive, controls=["edge"], optional=True)
    assert [[blob.data for blob in record.controls] for record in records] == [[b"b", b"c"], []]


def test_members_that_cannot_be_read_are_rejects_and_the_others_are_read(tmp_path: Path) -> None:
    path = _zip(tmp_path / "a.zip", [(f"{name}.png", name.encode() * 400) for name in "abcde"])
    data = bytearray(path.read_bytes())
    directory = [match.start() for match in re.finditer(b"PK\x01\x02", data)]
    data[data.index(b"aaaa") + 5] ^= 1
    data[directory[1] + 8] |= 1  # b: encrypted
    struct.pack_into("<H", data, directory[2] + 10, 99)  # c: an unknown method
    struct.pack_into("<I", data, directory[3] + 24, webdataset.MAX_MEMBER_BYTES + 1)  # d: claims to be huge
    path.write_bytes(data)
    items = _read(path, caption="a photo")
    rejects = {item.path[-5]: item for item in items if isinstance(item, Reject)}
    assert {item.reason for item in rejects.values()} == {RejectReason.UNREADABLE}
    assert sorted(rejects) == ["a", "b", "c", "d"]
    assert "CRC" in rejects["a"].detail
    assert "encrypted: pack it again without a password" in rejects["b"].detail
    assert "packed in a way that is not read" in rejects["c"].detail
    assert "536,870,913 bytes, more than" in rejects["d"].detail


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "MAX_MEMBER_BYTES", 1 << 20)
    path = _zip(tmp_path / "a.zip", {"a.png": bytes(8 << 20), "b.png": b"b"}, compression=zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    # Both headers lie about the size: what is read is what they say, and its checksum is wrong.
    for offset, mark in ((22, b"PK\x03\x04"), (24, b"PK\x01\x02")):
        struct.pack_into("<I", data, data.index(mark) + offset, 1 << 10)
    for each in (path.read_bytes(), bytes(data)):
        path.write_bytes(each)
        bomb, good = _read(path, caption="a photo")
        assert isinstance(bomb, Reject)
        assert isinstance(good, Record)


def test_text_that_is_too_long_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "MAX_JSON_BYTES", 1000)
    ((reason, detail),) = _rejects(_zip(tmp_path / "a.zip", {"a.png": b"a", "a.txt": "x" * 1001})).values()
    assert (reason, "1,001 bytes, more than" in detail) == (RejectReason.CAPTION_MISSING, True)


def test_two_members_of_one_name_are_one_sample_and_one_reject(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = _zip(tmp_path / "a.zip", [("a.png", b"1"), ("a.png", b"2")])
    first, second = _read(path, caption="a photo")
    assert isinstance(first, Record)
    assert first.image.read() == b"1"
    assert isinstance(second, Reject)
    assert second.reason is RejectReason.NAME_TAKEN


def test_zip64_and_hidden_members_and_folders(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("a.png", "w", force_zip64=True) as file:
            file.write(b"a")
        for name in ("__MACOSX/._a.png", ".hidden/b.png", "sub/", "sub/.c.png"):
            archive.writestr(name, b"")
    assert [record.identity for record in _records(path, caption="a photo")] == ["a.zip/a.png"]


def test_several_zips_follow_each_other(tmp_path: Path) -> None:
    for name in ("b", "a"):
        _zip(tmp_path / f"{name}.zip", {"1.png": name.encode()})
    records = _records(tmp_path / "*.zip", caption="a photo")
    assert [record.identity for record in records] == ["a.zip/1.png", "b.zip/1.png"]


@pytest.mark.parametrize(
    ("data", "settings", "said"),
    [
        (b"no zip", {}, r"a\.zip is damaged, or not a zip: File is not a zip file\. Download it again"),
        (None, {}, r"a\.zip: No such file or directory"),
        ({}, {}, r"a\.zip holds no images\. Found: nothing\."),
        ({"a.txt": b"", "b/c.gif.bak": b""}, {}, r"holds no images\. Found: a\.txt, b/c\.gif\.bak\."),
        ({"a.png": b""}, {"captions": ["text"]}, r"`captions` has no effect without a metadata\.jsonl"),
        (
            {"metadata.jsonl": b'{"file_name": "a.png"}'},
            {"caption_lines": True},
            r"`caption_lines` has no effect where a table",
        ),
        ({"metadata.jsonl": b'{"file_name": "a.png"}'}, {}, r"metadata\.jsonl has no column text, caption"),
        ({"metadata.jsonl": b'{"file_name'}, {}, r"metadata\.jsonl: line 1 is not JSON"),
    ],
)
def test_what_is_no_zip_of_images_is_refused_with_its_path(tmp_path: Path, data: Any, settings: Any, said: str) -> None:
    if isinstance(data, dict):
        _zip(tmp_path / "a.zip", data)
    elif data is not None:
        (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(SourceError, match=said):
        _read(tmp_path / "a.zip", **settings)


def test_a_cut_zip_is_refused(tmp_path: Path) -> None:
    path = _zip(tmp_path / "a.zip", {"a.png": bytes(5000)})
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(SourceError, match=r"a\.zip is damaged, or not a zip"):
        _read(path, caption="a photo")


_PARTS = st.sampled_from(["..", ".", "", "/", "\\", "C:", "a", "ü", "a.b", "\n", "x" * 300]) | st.text(max_size=6)
_NAMES = st.lists(_PARTS, min_size=1, max_size=4).map("/".join).filter(lambda name: name.isascii() or name.isprintable())


@given(names=st.lists(_NAMES, min_size=1, max_size=4, unique=True))
def test_whatever_a_member_is_called_it_gives_a_sample_of_a_safe_key_or_a_reject(
    names: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in dict.fromkeys(zipfile.ZipInfo(f"{name}.png").filename for name in names):
            archive.writestr(name, b"data")
    path = tmp_path_factory.getbasetemp() / "any.zip"
    path.write_bytes(buffer.getvalue())
    with zipfile.ZipFile(path) as archive:
        held = [info.filename.replace("\\", "/") for info in archive.infolist()]
    shown = [name for name in held if not any(part.startswith(".") and part.strip(".") for part in name.split("/"))]
    if not shown:
        with pytest.raises(SourceError, match="holds no images"):
            _read(path, caption="a photo")
        return
    items = _read(path, caption="a photo")
    assert len(items) == len(shown)
    keys = [sample_key("any", item.identity, ()) for item in items if isinstance(item, Record)]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", key) for key in keys)
    assert max(Counter(keys).values(), default=1) == 1
    assert all(item.reason is RejectReason.NAME_TAKEN for item in items if isinstance(item, Reject))


@given(data=st.binary(max_size=200), at=st.integers(0, 400))
def test_a_zip_of_any_damage_gives_records_rejects_or_a_message(
    data: bytes, at: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.zip"
    whole = bytearray(_zip(path, {"a.png": b"a" * 60, "b.png": b"b" * 60, "b.txt": "b"}).read_bytes())
    whole[at : at + len(data)] = data
    path.write_bytes(whole)
    items = _read_or_message(path)
    assert "damaged.zip" in items if isinstance(items, str) else len(items) <= 2


def _read_or_message(path: Path) -> list[Record | Reject] | str:
    try:
        return _read(path, caption="a photo")
    except FtkError as error:
        return str(error)


_CELLS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["a.png", "../a.png", "nan"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["bytes", "path"]), inner, max_size=2),
    max_leaves=4,
)


@given(rows=st.lists(st.dictionaries(st.sampled_from(["image", "text", "edge"]), _CELLS), min_size=1, max_size=4))
def test_a_table_of_any_values_in_a_zip_gives_records_and_rejects(
    rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    lines = [{"image": "a.png", "text": "t", "edge": "a.png"}, *rows]
    path = tmp_path_factory.getbasetemp() / "rows.zip"
    _zip(path, {"sub/metadata.jsonl": "\n".join(map(json.dumps, lines)), "sub/a.png": b"a", "a.png": b"outside"})
    items = _read(path, controls=["edge"], optional=True)
    assert len(items) == len(lines)
    images = {blob.read() for item in items if isinstance(item, Record) for blob in item.blobs}
    assert images == {b"a"}
