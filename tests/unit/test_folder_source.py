"""The folder source: what is found, in which order, with which captions and masks, and what is said when nothing is."""

import errno
import json
import os
import pickle
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from pydantic import ValidationError

from ftk import locations
from ftk.configs.schema import SourceConfig
from ftk.contracts import Reject, RejectReason
from ftk.errors import ConfigError, SourceError
from ftk.pipeline.sources import folder as folder_source
from ftk.pipeline.sources.base import Notes, Partition, Record, parse
from ftk.pipeline.sources.folder import SOURCE, FolderSettings


def _put(root: Path, name: str, caption: bytes | None = b"a cat") -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"never decoded here")
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption)


def _config(root: Path | str, **settings: Any) -> tuple[SourceConfig, FolderSettings]:
    config = SourceConfig(path=str(root), **settings)
    return config, FolderSettings(**config.settings)


def _partitions(root: Path | str, shard_samples: int = 2, **settings: Any) -> list[Partition]:
    return list(SOURCE.partitions(*_config(root, **settings), shard_samples))


def _records(root: Path | str, **settings: Any) -> list[Record | Reject]:
    config, parsed = _config(root, **settings)
    partitions = pickle.loads(pickle.dumps(_partitions(root, **settings)))
    items = [list(SOURCE.read(config, parsed, partition)) for partition in partitions]
    assert [len(each) for each in items] == [partition.num_records for partition in partitions]
    return [item for each in items for item in each]


def _one(root: Path | str, **settings: Any) -> Record | Reject:
    (item,) = _records(root, **settings)
    return item


def _good(root: Path | str, **settings: Any) -> Record:
    item = _one(root, **settings)
    assert isinstance(item, Record)
    return item


def _bad(root: Path | str, **settings: Any) -> Reject:
    item = _one(root, **settings)
    assert isinstance(item, Reject)
    return item


def _notes(root: Path, **settings: Any) -> Notes:
    return _partitions(root, shard_samples=99, **settings)[-1].notes


def _identities(items: list[Record | Reject]) -> list[str]:
    return [item.identity if isinstance(item, Record) else item.path for item in items]


def test_a_folders_images_come_before_those_of_its_subfolders(tmp_path: Path) -> None:
    names = ["Z.gif", "b.jpg", "é.png", "a/z.webp", "sub/c.JPEG", "sub/deep/a.avif", "sub/deep/b.heic", "sub-a/a.bmp"]
    for name in reversed(names):
        _put(tmp_path, name)
    assert _identities(_records(tmp_path)) == names


def test_the_order_is_not_the_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["b.jpg", "a.jpg", "s/d.jpg", "s/c.jpg", "r/e.jpg"]:
        _put(tmp_path, name)
    expected = [partition.payload for partition in _partitions(tmp_path)]
    scandir = os.scandir

    class _Backwards:
        def __init__(self, path: Any) -> None:
            with scandir(path) as scan:
                self.entries = list(scan)[::-1]

        def __enter__(self) -> Iterator["os.DirEntry[str]"]:
            return iter(self.entries)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", _Backwards)
    assert [partition.payload for partition in _partitions(tmp_path)] == expected


def test_hidden_and_other_files_are_left_out(tmp_path: Path) -> None:
    for name in ["a.jpg", ".b.jpg", ".thumbs/c.jpg", "notes.md", "video.mp4", "no_suffix"]:
        _put(tmp_path, name, caption=None)
    assert _identities(_records(tmp_path, caption="a cat")) == ["a.jpg"]


def _write(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


JPEG, TIFF, TEXT = b"\xff\xd8\xff\xe0\0\x10JFIF", b"II*\0\x08\0\0\0", b"a cat"


def test_a_file_that_has_a_caption_or_begins_as_an_image_is_an_input(tmp_path: Path) -> None:
    inputs = ["bare", "b.jpg_large", "c.dng", "d.CR2", "e.exr", "f.jxl", "g.psd", "h.mp4", "no caption.jpg_orig", "sub/Photo"]
    _write(tmp_path, {**dict.fromkeys(inputs, b"whatever"), "no caption.jpg_orig": JPEG, "sub/Photo": TIFF})
    for name in ("bare.txt", "b.txt", "c.json", "d.CAPTION", "e.exr.txt", "f.txt", "G.txt", "h.txt"):
        (tmp_path / name).write_bytes(b'["a cat"]' if name.endswith("json") else TEXT)
    _write(tmp_path, dict.fromkeys(("notes", "README.md", "README.txt", "film.mov", "latents.npz", "empty"), TEXT))
    _write(tmp_path, dict.fromkeys(("Thumbs.db", "desktop.ini", ".hidden", ".DS_Store", "part.json"), JPEG))
    items = _records(tmp_path)
    assert sorted(_identities(items)) == sorted(inputs)
    # Those without a caption of their own are rejects unless the source has one.
    missing = [item.path for item in items if isinstance(item, Reject)]
    assert missing == ["no caption.jpg_orig", "sub/Photo"]
    assert all(isinstance(item, Record) for item in _records(tmp_path, caption="a cat"))


def test_what_has_the_name_of_an_image_beside_it_is_no_input_and_said(tmp_path: Path) -> None:
    _write(tmp_path, {"a.jpg": JPEG, "a.txt": TEXT, "A.CR2": TIFF, "a.psd": b"8BPS", "a.mov": b"", "a.npz": b"", "a": JPEG})
    assert _identities(_records(tmp_path)) == ["a.jpg"]
    hints = _partitions(tmp_path)[-1].notes.hints
    assert len(hints) == 1
    assert "4 files have the name of an image beside them and are not read: A.CR2, a, a.mov" in hints[0]


def test_images_of_other_kinds_in_folders_of_masks_are_no_inputs(tmp_path: Path) -> None:
    _write(tmp_path, {"a.jpg": JPEG, "a.txt": TEXT, "masks/a.png": JPEG, "masks/b.jpg_large": JPEG, "masks/c": JPEG})
    assert _identities(_records(tmp_path, masks=str(tmp_path / "masks"))) == ["a.jpg"]


def test_on_object_storage_few_files_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    files = fsspec.filesystem("memory")
    for number in range(6):
        files.pipe(f"/looks/{number}.part0", JPEG)
    files.pipe("/looks/named.jpg_large", JPEG)
    files.pipe("/looks/named.txt", TEXT)
    read: list[str] = []
    read_bytes = locations.read_bytes

    def counted(location: str, *more: Any) -> bytes:
        read.append(location)
        return read_bytes(location, *more)

    monkeypatch.setattr(folder_source, "_MOST_REMOTE_LOOKS", 4)
    monkeypatch.setattr(locations, "read_bytes", counted)
    partitions = _partitions("memory://looks", caption="a cat")
    files.rm("/looks", recursive=True)
    assert sum(partition.num_records or 0 for partition in partitions) == 5, "four that were looked at, and one with a caption"
    assert len(read) == 4
    (hint,) = partitions[-1].notes.hints
    assert "2 files have no known suffix and no caption, and were not looked at" in hint
    assert hint.endswith(": 4.part0, 5.part0")


def test_a_record_names_its_file(tmp_path: Path) -> None:
    _put(tmp_path, "sub/a.jpg")
    record = _good(tmp_path, name="cats", trigger="ohwx")
    assert (record.identity, record.captions, record.mask, record.controls) == ("sub/a.jpg", ("a cat",), None, ())
    assert record.image.read() == b"never decoded here"


def test_partitions_are_runs_of_images(tmp_path: Path) -> None:
    for index in range(5):
        _put(tmp_path, f"{index}.jpg")
    assert [partition.num_records for partition in _partitions(tmp_path)] == [2, 2, 1]
    assert [partition.num_records for partition in _partitions(tmp_path, shard_samples=9)] == [5]


def test_relative_and_absolute_paths_give_equal_partitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _put(tmp_path / "photos", "~odd.jpg")
    absolute = _partitions(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _partitions("photos") == _partitions("photos/") == _partitions("~/photos") == absolute
    assert _partitions((tmp_path / "photos").as_uri()) == absolute
    monkeypatch.chdir(tmp_path / "photos")
    assert _partitions(".") == absolute
    assert _good(".").image.read() == b"never decoded here"


def test_the_signature_changes_with_every_file_of_its_partition(tmp_path: Path) -> None:
    root, masks, edges = tmp_path / "photos", tmp_path / "masks", tmp_path / "edges"
    for name in ["a.jpg", "b.jpg", "c.jpg"]:
        _put(root, name)
        _put(masks, name, caption=None)
        _put(edges, name, caption=None)
    settings = {"masks": str(masks), "controls": (str(edges),)}
    seen = [[partition.signature for partition in _partitions(root, **settings)]]
    for path in [root / "a.jpg", root / "b.txt", masks / "a.jpg", edges / "b.jpg"]:
        path.write_bytes(b"changed")
        seen.append([partition.signature for partition in _partitions(root, **settings)])
    (root / "a.txt").rename(root / "a.caption")
    seen.append([partition.signature for partition in _partitions(root, **settings)])
    assert len({first for first, _ in seen}) == 6
    assert len({second for _, second in seen}) == 1
    (root / "unused.md").write_bytes(b"")  # counted in the notes, which shape no sample
    assert [partition.signature for partition in _partitions(root, **settings)] == seen[-1]


# Captions.


def test_an_image_without_caption_is_rejected_or_takes_the_sources(tmp_path: Path) -> None:
    _put(tmp_path, "a.jpg", caption=None)
    reject = _bad(tmp_path)
    assert (reject.source, reject.path, reject.reason) == (tmp_path.name, "a.jpg", RejectReason.CAPTION_MISSING)
    assert "a.txt" in reject.detail
    assert _good(tmp_path, caption="a photo").captions == ("a photo",)


@pytest.mark.parametrize("caption", [None, "a photo"], ids=["alone", "fallback"])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", RejectReason.CAPTION_EMPTY),
        (b"caf\xe9", RejectReason.CAPTION_NOT_TEXT),
        (b"a\0b", RejectReason.CAPTION_NOT_TEXT),
        (b"x" * (1 << 20), RejectReason.CAPTION_NOT_TEXT),
    ],
    ids=["empty", "not-utf-8", "nul", "a-megabyte"],
)
def test_a_broken_caption_rejects_its_image_alone(
    tmp_path: Path, data: bytes, reason: RejectReason, caption: str | None
) -> None:
    _put(tmp_path, "a.jpg", data)
    _put(tmp_path, "b.jpg")
    reject, record = _records(tmp_path, caption=caption)
    assert isinstance(reject, Reject)
    assert reject.reason == reason
    assert isinstance(record, Record)


def test_the_first_sidecar_counts(tmp_path: Path) -> None:
    _put(tmp_path, "a.jpg", caption=None)
    for suffix, text in [
        (".json", '{"text": ["from", "json"]}'),
        (".caption", "from caption"),
        (".TXT", "FROM TXT"),
        (".txt", "x"),
    ]:
        (tmp_path / f"a{suffix}").write_text(text)
        expected = tuple(json.loads(text)["text"]) if suffix == ".json" else (text,)
        assert _good(tmp_path).captions == expected


def test_case_and_unicode_form_of_a_caption_files_name_do_not_matter(tmp_path: Path) -> None:
    pairs = [
        ("IMG_1.JPG", "img_1.txt"),
        ("IMG_2.JPG", "IMG_2.JPG.txt"),
        ("\u00e9.jpg", "e\u0301.txt"),
        ("u\u0308.jpg", "\u00fc.txt"),
    ]
    for image, caption in pairs:
        (tmp_path / image).write_bytes(b"")
        (tmp_path / caption).write_text(f"of {image}")
    found = {item.identity: item for item in _records(tmp_path, caption="a photo") if isinstance(item, Record)}
    assert {name: (record.captions, record.is_fallback) for name, record in found.items()} == {
        image: ((f"of {image}",), False) for image, _ in pairs
    }
    assert _notes(tmp_path).num_unmatched_captions == 0


def test_text_files_of_no_image_are_noted_once_for_the_whole_source(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg", "sub/d.jpg"):
        _put(tmp_path, name)
    _put(tmp_path, "e.jpg", caption=None)
    (tmp_path / "e.tags").write_text("a, b")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.md").write_text("")
    partitions = _partitions(tmp_path, caption="a photo")
    assert [partition.notes.num_unmatched_captions for partition in partitions] == [0, 0, 2]
    assert [(one.source, one.path, one.likely_image) for one in partitions[-1].notes.unmatched_captions] == [
        (tmp_path.name, "e.tags", "e.jpg"),
        (tmp_path.name, "empty/notes.md", ""),
    ]
    assert _notes(tmp_path, captions_from="fixed", caption="a photo").num_unmatched_captions == 0
    assert _notes(tmp_path, caption_suffix=".tags", caption="a photo").num_unmatched_captions == 5


def test_a_name_that_fits_two_images_is_not_guessed_at(tmp_path: Path) -> None:
    for name in ("IMG.jpg", "img.jpg", "Img.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [item.reason for item in _records(tmp_path) if isinstance(item, Reject)] == [RejectReason.CAPTION_MISSING] * 2
    (example,) = _notes(tmp_path).unmatched_captions
    assert (example.path, example.detail) == ("Img.txt", "fits IMG.jpg and img.jpg: name it exactly as its image")


def test_the_record_of_drawn_class_images_is_no_caption(tmp_path: Path) -> None:
    _put(tmp_path, "generated/00000.png")
    (tmp_path / "generated/generated.json").write_text("{}")
    assert _notes(tmp_path).num_unmatched_captions == 0


@pytest.mark.parametrize("suffix", ["tags", ".tags", ".TAGS", [".missing", ".tags"]])
def test_captions_of_any_suffix(tmp_path: Path, suffix: Any) -> None:
    _put(tmp_path, "a.jpg", b"not read")
    (tmp_path / "a.tags").write_text("a, b\nc")
    assert _good(tmp_path, caption_suffix=suffix).captions == ("a, b\nc",)
    assert _good(tmp_path, caption_suffix=suffix, caption_lines=True).captions == ("a, b", "c")
    (tmp_path / "a.tags").unlink()
    assert ".tags beside the image" in _bad(tmp_path, caption_suffix=suffix).detail


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"caption_suffix": ".jpg"}, "suffix of images"),
        ({"caption_suffix": ""}, "not how a file's name ends"),
        ({"caption_suffix": []}, "at least 1 item"),
        ({"caption_suffix": 5}, "tuple"),
        ({"caption_suffix": ["a/b"]}, "not how a file's name ends"),
        ({"caption_suffix": [".txt", "txt"]}, "named twice"),
        ({"caption_suffix": ".tags", "captions_from": "name"}, "`caption_suffix` has no effect with `captions_from: name`"),
        ({"layout": "kohya", "captions_from": "fixed", "caption": "a"}, "`layout` has no effect with `captions_from: fixed`"),
    ],
)
def test_settings_of_captions_that_make_no_sense_are_refused(tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _config(tmp_path, **settings)


# Folders of sd-scripts.


def _kohya(root: Path) -> None:
    for name, caption in [("10_sks dog/a.jpg", b"sks dog on grass"), ("10_sks dog/b.jpg", None), ("2_a_b/c.jpg", None)]:
        _put(root, name, caption)


def test_folders_of_sd_scripts_say_repeats_and_class_tokens(tmp_path: Path) -> None:
    _kohya(tmp_path)
    _put(tmp_path, "3/d.jpg", caption=None)
    records = [item for item in _records(tmp_path, layout="kohya", caption="a photo") if isinstance(item, Record)]
    assert [(record.identity, record.repeats, record.captions, record.is_fallback) for record in records] == [
        ("10_sks dog/a.jpg", 10, ("sks dog on grass",), False),
        ("10_sks dog/b.jpg", 10, ("sks dog",), True),
        ("2_a_b/c.jpg", 2, ("a_b",), True),
        ("3/d.jpg", 3, ("a photo",), True),
    ]
    assert [item.reason for item in _records(tmp_path, layout="kohya") if isinstance(item, Reject)] == [
        RejectReason.CAPTION_MISSING
    ]
    assert not _notes(tmp_path, layout="kohya").hints


def test_what_sd_scripts_passes_over_is_told(tmp_path: Path) -> None:
    _kohya(tmp_path)
    for name in ("top.jpg", "misc/e.jpg", "0_x/f.jpg", "-1_x/g.jpg", "10_sks dog/deep/h.jpg"):
        _put(tmp_path, name)
    assert len(_records(tmp_path, layout="kohya")) == 3
    (hint,) = _notes(tmp_path, layout="kohya").hints
    assert "5 images do not lie in a folder such as `10_dog`" in hint
    assert hint.startswith(f"source {tmp_path.name}: ")


def test_a_layout_of_sd_scripts_without_such_folders_is_refused(tmp_path: Path) -> None:
    _kohya(tmp_path)
    with pytest.raises(SourceError, match=r"no folder of images such as `10_dog`.*Name the folder above"):
        _records(tmp_path / "10_sks dog", layout="kohya")
    _put(tmp_path / "photos", "a.jpg")
    with pytest.raises(SourceError, match=r"Leave out `layout: kohya`"):
        _records(tmp_path / "photos", layout="kohya")


def test_folders_that_look_like_sd_scripts_get_a_hint(tmp_path: Path) -> None:
    _kohya(tmp_path)
    (hint,) = _notes(tmp_path, caption="a photo").hints
    assert "10_sks dog is called as sd-scripts calls its folders" in hint
    (hint,) = _notes(tmp_path / "10_sks dog", caption="a photo").hints
    assert "Set `repeats: 10`" in hint
    assert str(tmp_path) not in hint
    assert not _notes(tmp_path / "10_sks dog", caption="a photo", repeats=10).hints
    _put(tmp_path / "plain", "2024_summer/a.jpg")
    _put(tmp_path / "plain", "12/b.jpg")
    _put(tmp_path / "plain", "v1_5/c.jpg")
    assert not _notes(tmp_path / "plain").hints


def test_a_dot_in_the_name_does_not_hide_the_caption(tmp_path: Path) -> None:
    _put(tmp_path, "v1.5 cat.jpg", b"a cat")
    _put(tmp_path, "v1.jpg", b"a dog")
    assert [item.captions for item in _records(tmp_path) if isinstance(item, Record)] == [("a cat",), ("a dog",)]


def test_lines_are_captions_when_asked_for(tmp_path: Path) -> None:
    _put(tmp_path, "a.jpg", b"a cat\n\na dog\r\n")
    assert _good(tmp_path).captions == ("a cat\n\na dog",)
    assert _good(tmp_path, caption_lines=True).captions == ("a cat", "a dog")
    with pytest.raises(ValidationError, match=r"caption_lines.* has no effect with `captions_from: name`"):
        _records(tmp_path, caption_lines=True, captions_from="name")


def test_names_are_captions_when_asked_for(tmp_path: Path) -> None:
    _put(tmp_path, "sub/a_red-hat__on a.mat.jpg", b"not read")
    assert _good(tmp_path, captions_from="name", caption="not used").captions == ("a red hat on a.mat",)
    (tmp_path / "sub/a_red-hat__on a.mat.jpg").rename(tmp_path / "sub/_-.jpg")
    assert _bad(tmp_path, captions_from="name").reason == RejectReason.CAPTION_EMPTY


def test_one_caption_is_for_all_when_asked_for(tmp_path: Path) -> None:
    _put(tmp_path, "a.jpg", b"not read")
    assert _good(tmp_path, captions_from="fixed", caption="a photo").captions == ("a photo",)
    with pytest.raises(ConfigError, match=r"captions_from: fixed.* no `caption:`"):
        _records(tmp_path, captions_from="fixed")


@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_a_table_among_the_images_is_not_passed_over(tmp_path: Path, table: str) -> None:
    _put(tmp_path, "a.jpg")
    _put(tmp_path, "sub/b.jpg")
    assert len(_records(tmp_path)) == 2
    for place in ("sub", "."):
        (tmp_path / place / table).write_bytes(b"")
        for settings in ({}, {"caption": "a photo"}):
            with pytest.raises(SourceError, match=rf"`path: .*/{table}`.*`format: folder`"):
                _records(tmp_path, **settings)
    for settings in ({"format": "folder"}, {"captions_from": "name"}, {"captions_from": "fixed", "caption": "a photo"}):
        assert len(_records(tmp_path, **settings)) == 2


# Masks and controls.


def test_masks_and_controls_lie_in_folders_of_their_own(tmp_path: Path) -> None:
    for name in ["a.jpg", "sub/b.jpg"]:
        _put(tmp_path / "photos", name)
        for folder in ["masks", "edges", "depth"]:
            path = tmp_path / folder / Path(name).with_suffix(".PNG")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{folder} {name}")
    records = _records(
        tmp_path / "photos", masks=str(tmp_path / "masks"), controls=(str(tmp_path / "depth"), str(tmp_path / "edges"))
    )
    for record, name in zip(records, ["a.jpg", "sub/b.jpg"], strict=True):
        assert isinstance(record, Record)
        assert record.mask is not None
        assert record.mask.read().decode() == f"masks {name}"
        assert [control.read().decode() for control in record.controls] == [f"depth {name}", f"edges {name}"]


@pytest.mark.parametrize("folder", ["control", "control/sub"], ids=["flat", "nested"])
def test_numbered_control_images_are_found_in_their_order_as_musubi_tuner_finds_them(tmp_path: Path, folder: str) -> None:
    for name in ("a.jpg", "a_1.jpg", "b.jpg", "c.jpg"):
        _put(tmp_path / "photos", f"sub/{name}")
    for name in ("a_0.png", "a_2.png", "a_10.webp", "a_1.png", "b.png", "b_0.png", "c_0001.png", "c_0000.png", "c_x.png"):
        _put(tmp_path / folder, name, caption=None)
        (tmp_path / folder / name).write_text(name)
    records = _records(tmp_path / "photos", controls=(str(tmp_path / "control"),))
    found = {item.identity: [blob.read().decode() for blob in item.controls] for item in records if isinstance(item, Record)}
    assert found == {
        # a_1.png has the name of another image, and b.png that of its own.
        "sub/a.jpg": ["a_0.png", "a_2.png", "a_10.webp"],
        "sub/a_1.jpg": ["a_1.png"],
        "sub/b.jpg": ["b.png"],
        "sub/c.jpg": ["c_0000.png", "c_0001.png"],
    }
    (before,) = _partitions(tmp_path / "photos", 9, controls=(str(tmp_path / "control"),))
    (tmp_path / folder / "c_0001.png").write_text("another")
    (after,) = _partitions(tmp_path / "photos", 9, controls=(str(tmp_path / "control"),))
    assert before.signature != after.signature


def test_numbered_files_are_several_references_and_no_masks(tmp_path: Path) -> None:
    _put(tmp_path / "photos", "a.jpg")
    for name in ("a_0.png", "a_1.png"):
        _put(tmp_path / "others", name, caption=None)
    others = str(tmp_path / "others")
    config = SourceConfig(path=str(tmp_path / "photos"), references=(others,))
    source, settings = parse(config)
    (item,) = source.read(config, settings, next(source.partitions(config, settings, 2)))
    assert isinstance(item, Record)
    assert (len(item.controls), item.num_references) == (2, 2)
    assert _bad(tmp_path / "photos", masks=others).reason == RejectReason.MASK_MISSING


def test_an_image_without_its_mask_or_control_is_rejected(tmp_path: Path) -> None:
    _put(tmp_path / "photos", "a.jpg")
    _put(tmp_path / "some", "a.png", caption=None)
    _put(tmp_path / "others", "b.png", caption=None)
    some, others = str(tmp_path / "some"), str(tmp_path / "others")
    reject = _bad(tmp_path / "photos", masks=others, controls=(some,))
    assert (reject.reason, reject.detail) == (RejectReason.MASK_MISSING, "the folder under `masks` has no image of this name")
    reject = _bad(tmp_path / "photos", masks=some, controls=(some, others))
    assert (reject.reason, "`controls.1`" in reject.detail) == (RejectReason.CONTROL_MISSING, True)
    assert str(tmp_path) not in reject.detail


def test_a_flat_folder_of_masks_serves_nested_images_by_name(tmp_path: Path) -> None:
    _put(tmp_path / "photos", "x/a.jpg")
    _put(tmp_path / "photos", "y/b.jpg")
    for name in ["a.png", "b.png"]:
        _put(tmp_path / "masks", name, caption=None)
    masks = str(tmp_path / "masks")
    assert [Path(item.mask.location).name for item in _records(tmp_path / "photos", masks=masks) if item.mask] == [  # type: ignore[union-attr]
        "a.png",
        "b.png",
    ]
    _put(tmp_path / "photos", "z/a.jpg")
    with pytest.raises(SourceError, match=r"a\.png in .*masks fits both x/a and z/a"):
        _records(tmp_path / "photos", masks=masks)


def test_a_mask_of_another_folder_is_not_taken_for_ones_own(tmp_path: Path) -> None:
    _put(tmp_path / "photos", "x/1.jpg")
    _put(tmp_path / "photos", "y/1.jpg")
    _put(tmp_path / "masks", "x/1.png", caption=None)
    good, bad = _records(tmp_path / "photos", masks=str(tmp_path / "masks"))
    assert isinstance(good, Record)
    assert isinstance(bad, Reject)
    assert (bad.path, bad.reason) == ("y/1.jpg", RejectReason.MASK_MISSING)


def test_case_and_unicode_form_of_a_masks_name_do_not_matter(tmp_path: Path) -> None:
    masks = {"IMG_1.JPG": "img_1.png", "sub/\u00e9.jpg": "sub/e\u0301.png", "b.jpg": "b.jpg.png", "Sub/c.jpg": "C.png"}
    for image, mask in masks.items():
        _put(tmp_path / "photos", image)
        _put(tmp_path / "masks", mask, caption=None)
    for settings in ({"masks": str(tmp_path / "masks")}, {"controls": (str(tmp_path / "masks"),)}):
        for item in _records(tmp_path / "photos", **settings):
            assert isinstance(item, Record)
            (found,) = [item.mask] if item.mask else item.controls
            assert found.location == str(tmp_path / "masks" / masks[item.identity])


def test_a_mask_that_fits_two_images_but_for_their_case_is_no_ones(tmp_path: Path) -> None:
    for image in ("IMG.jpg", "img.jpg"):
        _put(tmp_path / "photos", image)
    _put(tmp_path / "masks", "Img.png", caption=None)
    masks = str(tmp_path / "masks")
    assert all(isinstance(item, Reject) for item in _records(tmp_path / "photos", masks=masks))
    _put(tmp_path / "masks", "img.png", caption=None)
    reject, record = _records(tmp_path / "photos", masks=masks)
    assert isinstance(reject, Reject)
    assert isinstance(record, Record)
    (tmp_path / "photos/img.jpg").unlink()
    assert isinstance(_one(tmp_path / "photos", masks=masks), Reject)


def test_a_mask_that_images_of_two_folders_fit_is_refused(tmp_path: Path) -> None:
    for image in ("X/a.jpg", "x/a.jpg"):
        _put(tmp_path / "photos", image)
    _put(tmp_path / "masks", "x/a.png", caption=None)
    with pytest.raises(SourceError, match="fits both X/a and x/a"):
        _records(tmp_path / "photos", masks=str(tmp_path / "masks"))


def test_a_name_that_two_masks_have_is_not_guessed_at(tmp_path: Path) -> None:
    _put(tmp_path / "photos", "1.jpg")
    _put(tmp_path / "masks", "x/1.png", caption=None)
    assert isinstance(_one(tmp_path / "photos", masks=str(tmp_path / "masks")), Record)
    _put(tmp_path / "masks", "y/1.png", caption=None)
    assert _bad(tmp_path / "photos", masks=str(tmp_path / "masks")).reason == RejectReason.MASK_MISSING
    _put(tmp_path / "masks", "y/1.jpg", caption=None)
    with pytest.raises(SourceError, match=r"holds both y/1\.jpg and y/1\.png"):
        _records(tmp_path / "photos", masks=str(tmp_path / "masks"))


def test_masks_inside_of_the_folder_are_no_images(tmp_path: Path) -> None:
    _put(tmp_path, "a.jpg")
    _put(tmp_path, "masks/a.png", caption=None)
    _put(tmp_path, "masks2/b.jpg")
    _put(tmp_path, "masks/masks2/b.png", caption=None)
    assert _identities(_records(tmp_path, masks=str(tmp_path / "masks"))) == ["a.jpg", "masks2/b.jpg"]
    with pytest.raises(ConfigError, match="cannot be its own folder of masks"):
        _records(tmp_path, masks=f"{tmp_path}/")


def test_a_missing_folder_of_masks_is_named(tmp_path: Path) -> None:
    _put(tmp_path / "photos", "a.jpg")
    (tmp_path / "masks").mkdir()
    with pytest.raises(SourceError, match=r"mask, named under `masks` or `controls`.*Did you mean `.*masks`\?"):
        _records(tmp_path / "photos", masks=str(tmp_path / "mask"))


# Folders that are not there, or hold nothing.


def test_a_folder_without_images_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no images.*Found: nothing"):
        _records(tmp_path)
    (tmp_path / "notes.md").write_bytes(b"")
    with pytest.raises(SourceError, match=r"\.jpg.*Found: notes\.md"):
        _records(tmp_path)


def test_a_folder_of_img2dataset_names_its_tars(tmp_path: Path) -> None:
    for name in ("00000.parquet", "00000.tar", "00000_stats.json"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(SourceError, match=r"name them: `path: .*/\*\.tar`"):
        _records(tmp_path)


def test_a_missing_folder_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(SourceError, match=r"fotos does not exist\. Did you mean `.*photos`\?"):
        _records(tmp_path / "fotos")
    with pytest.raises(SourceError, match=r"does not exist\. Name the folder"):
        _records(tmp_path / "no" / "such")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    _put(tmp_path, "a.jpg")
    with pytest.raises(SourceError, match="is a file, not a folder"):
        _records(tmp_path / "a.jpg")


def test_a_folder_that_may_not_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _put(tmp_path, "a.jpg")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refusing(path: Path) -> Any:
        if path.name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(SourceError, match="closed may not be read: Permission denied"):
        _records(tmp_path)


# Links and names.


def test_a_linked_folder_is_searched(tmp_path: Path) -> None:
    _put(tmp_path / "elsewhere", "a.jpg")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    assert _identities(_records(tmp_path / "root")) == ["link/a.jpg"]


def test_links_are_not_followed_in_circles(tmp_path: Path) -> None:
    _put(tmp_path, "sub/a.jpg")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    (tmp_path / "sub" / "self").symlink_to(tmp_path / "sub")
    assert _identities(_records(tmp_path)) == ["sub/a.jpg"]
    _put(tmp_path / "other", "b.jpg")
    (tmp_path / "other" / "there").symlink_to(tmp_path / "sub")
    (tmp_path / "sub" / "back").symlink_to(tmp_path / "other")
    assert _identities(_records(tmp_path)) == ["other/b.jpg", "other/there/a.jpg", "sub/a.jpg", "sub/back/b.jpg"]


def test_what_looks_like_an_image_is_listed_whatever_it_is(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    records = _records(tmp_path, caption="a cat")
    assert _identities(records) == ["broken.jpg", "loop.jpg", "pipe.jpg"]
    for record in records:
        assert isinstance(record, Record)
        with pytest.raises(OSError, match=r"not exist|No such file|symbolic links|is a FIFO, not a file"):
            record.image.read()


def test_names_that_look_alike_are_different_images(tmp_path: Path) -> None:
    names = [unicodedata.normalize(form, "é.jpg") for form in ("NFC", "NFD")] + ["a.jpg", "A.jpg", "a.JPG"]
    for index, name in enumerate(names):
        (tmp_path / name).write_bytes(str(index).encode())
    if len(list(tmp_path.iterdir())) < len(names):
        pytest.skip("this file system takes some of them for one")
    (tmp_path / unicodedata.normalize("NFC", "é.txt")).write_text("composed")
    (tmp_path / unicodedata.normalize("NFD", "é.txt")).write_text("decomposed")
    found = {item.identity: item for item in _records(tmp_path, caption="a cat") if isinstance(item, Record)}
    assert sorted(found) == sorted(names)
    assert [found[name].image.read() for name in names] == [b"0", b"1", b"2", b"3", b"4"]
    assert [found[name].captions for name in names[:2]] == [("composed",), ("decomposed",)]


def test_a_name_of_two_lines_is_a_name(tmp_path: Path) -> None:
    _put(tmp_path, "two\nlines.jpg")
    assert _good(tmp_path).identity == "two\nlines.jpg"


def test_a_name_that_is_no_utf_8_gives_a_reject_that_tables_can_hold(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    try:
        (tmp_path / name).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes no such names")
    reject = _bad(tmp_path)
    assert reject.path == "caf\\xe9.jpg"
    assert "caf\\xe9.txt" in reject.detail
    reject.detail.encode("utf-8")
    assert _bad(tmp_path, captions_from="name").reason == RejectReason.CAPTION_NOT_TEXT
    record = _good(tmp_path, caption="a cat")
    assert (record.identity, record.image.read()) == (name, b"")


def test_a_url_is_a_folder_too() -> None:
    memory = fsspec.filesystem("memory")
    for name in ["b.jpg", "a/c.png", "b.txt", "a/c.json", ".hidden/d.jpg"]:
        memory.pipe(f"/photos/{name}", b'"a cat"')
    try:
        records = _records("memory://photos")
        assert _identities(records) == ["b.jpg", "a/c.png"]
        assert [record.captions for record in records if isinstance(record, Record)] == [('"a cat"',), ("a cat",)]
        with pytest.raises(SourceError, match=r"memory://fotos does not exist|memory://fotos holds no images"):
            _records("memory://fotos")
    finally:
        memory.rm("/photos", recursive=True)
