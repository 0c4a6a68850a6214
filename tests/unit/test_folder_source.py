"""The folder source: what is found, in which order, and what is said when nothing is."""

import os
from pathlib import Path
from typing import Any

import pytest

from ftk.configs.schema import SourceConfig
from ftk.contracts import Reject, RejectReason
from ftk.errors import ConfigError, SourceError
from ftk.pipeline.sources.base import Record
from ftk.pipeline.sources.folder import SOURCE


def _put(root: Path, name: str, caption: bytes | None = b"a cat") -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"never decoded here")
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption)


def _records(root: Path, **settings: Any) -> list[Record | Reject]:
    return list(SOURCE.records(SourceConfig(path=str(root), **settings)))


def _one(root: Path, **settings: Any) -> Record | Reject:
    (item,) = _records(root, **settings)
    return item


def _identities(items: list[Record | Reject]) -> list[str]:
    return [item.identity if isinstance(item, Record) else item.path for item in items]


def test_subfolders_are_searched_in_a_stable_order(tmp_path: Path) -> None:
    names = ["b.jpg", "a.PNG", "sub/deep/c.webp", "sub/a.jpeg", "Z.gif", "é.png", "sub-a.bmp"]
    for name in names:
        _put(tmp_path, name)
    found = _identities(_records(tmp_path))
    assert found == sorted(names, key=os.fsencode)
    assert found == _identities(_records(tmp_path))


def test_hidden_and_other_files_are_left_out(tmp_path: Path) -> None:
    for name in ["a.jpg", ".b.jpg", ".thumbs/c.jpg", "notes.md", "video.mp4", "no_suffix"]:
        _put(tmp_path, name, caption=None)
    assert _identities(_records(tmp_path, caption="a cat")) == ["a.jpg"]


def test_a_record_carries_the_sources_settings(tmp_path: Path) -> None:
    _put(tmp_path, "sub/a.jpg")
    record = _one(tmp_path, name="cats", repeats=3, role="class")
    assert record == Record(
        source="cats", identity="sub/a.jpg", location=tmp_path / "sub/a.jpg", captions=("a cat",), repeats=3, role="class"
    )


def test_an_image_without_caption_is_rejected_or_takes_the_sources(tmp_path: Path) -> None:
    _put(tmp_path, "a.jpg", caption=None)
    reject = _one(tmp_path)
    assert isinstance(reject, Reject)
    assert (reject.source, reject.path, reject.reason) == (tmp_path.name, "a.jpg", RejectReason.CAPTION_MISSING)
    assert "a.txt" in reject.detail
    record = _one(tmp_path, caption="a photo")
    assert isinstance(record, Record)
    assert record.captions == ("a photo",)


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        (b"", RejectReason.CAPTION_EMPTY),
        (b"caf\xe9", RejectReason.CAPTION_NOT_TEXT),
        (b"a\0b", RejectReason.CAPTION_NOT_TEXT),
    ],
    ids=["empty", "not-utf-8", "nul"],
)
def test_a_broken_caption_rejects_its_image_alone(tmp_path: Path, caption: bytes, reason: RejectReason) -> None:
    _put(tmp_path, "a.jpg", caption)
    _put(tmp_path, "b.jpg")
    reject, record = _records(tmp_path)
    assert isinstance(reject, Reject)
    assert reject.reason == reason
    assert isinstance(record, Record)


def test_a_byte_order_mark_is_no_part_of_the_caption(tmp_path: Path) -> None:
    _put(tmp_path, "a.jpg", b"\xef\xbb\xbfa cat\r\n")
    record = _one(tmp_path)
    assert isinstance(record, Record)
    assert record.captions == ("a cat",)


def test_the_trigger_is_put_before_captions_that_lack_it(tmp_path: Path) -> None:
    _put(tmp_path, "a.jpg", b"a cat")
    _put(tmp_path, "b.jpg", b"ohwx cat")
    assert [item.captions for item in _records(tmp_path, trigger="ohwx") if isinstance(item, Record)] == [
        ("ohwx, a cat",),
        ("ohwx cat",),
    ]


def test_a_dot_in_the_name_does_not_hide_the_caption(tmp_path: Path) -> None:
    _put(tmp_path, "v1.5 cat.jpg", b"a cat")
    assert isinstance(_one(tmp_path), Record)


def test_a_folder_without_images_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no images.*Found: nothing"):
        _records(tmp_path)
    (tmp_path / "notes.md").write_bytes(b"")
    with pytest.raises(SourceError, match=r"\.jpg.*Found: notes\.md"):
        _records(tmp_path)


def test_a_missing_folder_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(SourceError, match=r"fotos does not exist\. Did you mean .*photos\?"):
        _records(tmp_path / "fotos")
    with pytest.raises(SourceError, match=r"does not exist\. Name the folder"):
        _records(tmp_path / "no" / "such")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    _put(tmp_path, "a.jpg")
    with pytest.raises(SourceError, match="is a file, not a folder"):
        _records(tmp_path / "a.jpg")


def test_object_storage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not supported"):
        list(SOURCE.records(SourceConfig(path="s3://bucket/photos")))


def test_a_linked_folder_is_searched(tmp_path: Path) -> None:
    _put(tmp_path / "elsewhere", "a.jpg")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    assert _identities(_records(tmp_path / "root")) == ["link/a.jpg"]


def test_a_link_to_a_parent_folder_is_not_followed_round(tmp_path: Path) -> None:
    _put(tmp_path, "sub/a.jpg")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    (tmp_path / "sub" / "self").symlink_to(tmp_path / "sub")
    assert _identities(_records(tmp_path)) == ["sub/a.jpg"]


def test_a_name_that_is_no_utf_8_gives_a_reject_that_tables_can_hold(tmp_path: Path) -> None:
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes no such names")
    reject = _one(tmp_path)
    assert isinstance(reject, Reject)
    assert reject.path == "caf\\xe9.jpg"
    assert "caf\\xe9.txt" in reject.detail
    reject.detail.encode("utf-8")
