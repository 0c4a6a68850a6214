"""The webdataset source: which members make a sample, what is refused, and that no damage passes for a tar's end."""

import gzip
import http.server
import io
import json
import random
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import webdataset as webdataset_library

from ftk.configs.schema import SourceConfig
from ftk.contracts import Reject, RejectReason
from ftk.errors import FtkError, SourceError
from ftk.pipeline import tar_stream
from ftk.pipeline.sources import base, webdataset
from ftk.pipeline.sources.base import Record

Member = tuple[str, bytes]
IMAGE = b"never decoded here"


def _info(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info


def _tar(*members: Member | tarfile.TarInfo, tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                tar.addfile(_info(member[0], len(member[1])), io.BytesIO(member[1]))
    return buffer.getvalue()


def _sample(key: str, image: bytes = IMAGE, caption: str = "a cat") -> tuple[Member, Member]:
    return (f"{key}.jpg", image), (f"{key}.txt", caption.encode())


def _samples(count: int, num_bytes: int) -> list[Member]:
    return [member for number in range(count) for member in _sample(f"{number:03d}", bytes(num_bytes))]


def _stream(path: str | Path, **settings: Any) -> Iterator[Record | Reject]:
    config = SourceConfig(path=str(path), format="webdataset", **settings)
    source, parsed = base.parse(config)
    for partition in source.partitions(config, parsed, 4):
        yield from source.read(config, parsed, partition)


def _read(tmp_path: Path, *members: Member | tarfile.TarInfo, **settings: Any) -> list[Record | Reject]:
    (tmp_path / "0.tar").write_bytes(_tar(*members))
    return list(_stream(tmp_path / "0.tar", **settings))


def _one(tmp_path: Path, *members: Member | tarfile.TarInfo, **settings: Any) -> Record | Reject:
    (item,) = _read(tmp_path, *members, **settings)
    return item


def _record(item: Record | Reject) -> Record:
    assert isinstance(item, Record), item
    return item


def _reject(item: Record | Reject, reason: RejectReason) -> str:
    assert isinstance(item, Reject), item
    assert item.reason is reason, item
    return item.detail


def _names(items: list[Record | Reject]) -> list[str]:
    return [item.identity if isinstance(item, Record) else item.path for item in items]


@pytest.mark.parametrize(
    ("path", "is_tar"),
    [
        ("a.tar", True),
        ("s3://bucket/{00000..00099}.tar", True),
        ("x/*.TAR.gz", True),
        ("x/a*.tgz", True),
        ("x/a.{tar,tgz}", True),
        ("{a/0.tar,b/1.tar}", True),
        ("https://host/a.tar?signature=a/b", True),
        ("folder", False),
        ("guitar", False),
        ("a.tar/images", False),
        ("a.zip", False),
        ("a.parquet", False),
    ],
)
def test_tars_are_told_by_their_names(path: str, is_tar: bool) -> None:
    assert webdataset.SOURCE.accepts(path) is is_tar


def test_members_of_one_key_are_a_sample(tmp_path: Path) -> None:
    members = [
        ("000.jpg", b"image"),
        ("000.json", b'{"caption": "not taken"}'),
        ("000.txt", b"\xef\xbb\xbfa cat\n"),
        ("sub.v1/b.PNG", b"other image"),
        ("sub.v1/b.TXT", b"a dog"),
        ("sub.v1/b.npy", b"not read"),
    ]
    first, second = map(_record, _read(tmp_path, *members))
    assert (first.identity, first.captions) == ("0.tar/000", ("a cat",))
    assert (first.image.read(), first.image.location) == (b"image", f"{tmp_path}/0.tar#000.jpg")
    assert (second.identity, second.captions, second.image.data) == ("0.tar/sub.v1/b", ("a dog",), b"other image")


def test_samples_of_img2dataset_and_their_failed_downloads(tmp_path: Path) -> None:
    good = {"status": "success", "caption": "a cat", "url": "https://host/a.jpg", "error_message": None}
    failed = {**good, "status": "failed_to_download", "error_message": "HTTP Error 404: Not Found"}
    items = _read(
        tmp_path,
        ("000000000.jpg", IMAGE),
        ("000000000.json", json.dumps(good).encode()),
        ("000000000.txt", b"a cat"),
        ("000000001.json", json.dumps(failed).encode()),
        ("000000001.txt", b"a cat"),
        ("000000002.jpg", IMAGE),
        ("000000002.json", json.dumps({**good, "caption": None}).encode()),
        ("000000002.txt", b""),
    )
    assert _record(items[0]).captions == ("a cat",)
    assert "failed_to_download, HTTP Error 404" in _reject(items[1], RejectReason.FILE_MISSING)
    assert "000000002.txt" in _reject(items[2], RejectReason.CAPTION_EMPTY)


def test_prepared_shards_of_ftk_are_read_back(tmp_path: Path) -> None:
    row = json.dumps({"captions": ["a cat", "a pet"], "width": 64}).encode()
    members = [("k.png", b"i"), ("k.mask.png", b"m"), ("k.control0.png", b"c"), ("k.json", row)]
    record = _record(_one(tmp_path, *members, mask="mask.png", controls=["control0.png"]))
    assert record.captions == ("a cat", "a pet")
    assert record.mask is not None
    assert (record.image.data, record.mask.data, [control.data for control in record.controls]) == (b"i", b"m", [b"c"])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"mask": "mask.png"}, RejectReason.MASK_MISSING), ({"controls": ["pose.png"]}, RejectReason.CONTROL_MISSING)],
)
def test_a_mask_or_control_that_is_not_there_is_a_reject(tmp_path: Path, settings: Any, reason: RejectReason) -> None:
    assert "a.jpg" in _reject(_one(tmp_path, *_sample("a"), **settings), reason)


@pytest.mark.parametrize(
    ("texts", "settings", "expected"),
    [
        ({"caption": b"c", "json": b'{"caption": "j"}'}, {}, ("c",)),
        ({"json": b'{"text": "t", "prompt": "p"}'}, {}, ("t",)),
        ({"json": b'{"caption": null, "prompt": "p"}'}, {}, ("p",)),
        ({"txt": b"t", "json": b"broken"}, {}, ("t",)),
        ({"txt": b"t", "json": b'{"alt": "j"}'}, {"captions": ["json:alt", ".TXT"]}, ("j", "t")),
        ({"txt": b"t", "json": b'{"alt": ["j", "", "t"]}'}, {"captions": ["txt", "json:alt"]}, ("t", "j", "t")),
        ({"a.txt": b"a", "b.txt": b"b"}, {"captions": ["b.txt", "a.txt", "c.txt"]}, ("b", "a")),
        ({"json": b'{"caption": [], "text": "t"}'}, {}, ("t",)),
        ({"npy": b""}, {"caption": "fallback"}, ("fallback",)),
        ({"json": b'{"caption": null}'}, {"caption": "fallback"}, ("fallback",)),
    ],
)
def test_where_captions_come_from(tmp_path: Path, texts: dict[str, bytes], settings: Any, expected: tuple[str, ...]) -> None:
    members = [("k.jpg", IMAGE), *((f"k.{suffix}", text) for suffix, text in texts.items())]
    assert _record(_one(tmp_path, *members, **settings)).captions == expected


@pytest.mark.parametrize(
    ("texts", "reason", "said"),
    [
        ({}, RejectReason.CAPTION_MISSING, "json:caption"),
        ({"txt": b" \n"}, RejectReason.CAPTION_EMPTY, "k.txt"),
        ({"txt": b"caf\xe9"}, RejectReason.CAPTION_NOT_TEXT, "k.txt"),
        ({"json": b'{"caption"'}, RejectReason.CAPTION_NOT_TEXT, "k.json"),
        ({"json": b"[" * 100_000}, RejectReason.CAPTION_NOT_TEXT, "k.json"),
        ({"json": b"[1]"}, RejectReason.CAPTION_NOT_TEXT, "list"),
        ({"json": b'{"caption": 7}'}, RejectReason.CAPTION_NOT_TEXT, "int"),
        ({"json": b'{"caption": "\\ud800"}'}, RejectReason.CAPTION_NOT_TEXT, "k.json: caption"),
    ],
)
def test_captions_that_cannot_be_used(tmp_path: Path, texts: dict[str, bytes], reason: RejectReason, said: str) -> None:
    members = [("k.jpg", IMAGE), *((f"k.{suffix}", text) for suffix, text in texts.items())]
    assert said in _reject(_one(tmp_path, *members), reason)


def test_a_sample_without_an_image_is_a_reject(tmp_path: Path) -> None:
    items = _read(tmp_path, ("a.txt", b"a"), ("IMG.1.jpg", IMAGE), ("IMG.2.jpg", IMAGE), (".hidden.jpg", b""), ("LICENSE", b""))
    assert _names(items) == ["0.tar/a", "0.tar/IMG"]
    assert "a.txt" in _reject(items[0], RejectReason.FILE_MISSING)
    assert "IMG.1.jpg, IMG.2.jpg" in _reject(items[1], RejectReason.FILE_MISSING)


def test_a_caption_may_be_named_after_the_whole_image(tmp_path: Path) -> None:
    image = ("IMG_2.JPG", IMAGE)
    assert _record(_one(tmp_path, image, ("IMG_2.JPG.txt", b"a cat"))).captions == ("a cat",)
    assert _record(_one(tmp_path, image, ("IMG_2.JPG.json", b'{"caption": "a dog"}'))).captions == ("a dog",)
    assert _record(_one(tmp_path, image, ("IMG_2.JPG.txt", b"a cat"), ("IMG_2.txt", b"a dog"))).captions == ("a dog",)


def test_a_caption_of_another_spelling_names_its_likely_image(tmp_path: Path) -> None:
    members = [("IMG_1.JPG", IMAGE), ("IMG_2.JPG", IMAGE), ("IMG_2.txt", b"a cat"), ("img_1.txt", b"a dog"), ("img_2.txt", b"")]
    first, second, third, fourth = _read(tmp_path, *members, caption="a photo")
    assert (_record(first).captions, _record(first).is_fallback) == (("a photo",), True)
    assert (_record(second).captions, _record(second).is_fallback) == (("a cat",), False)
    assert "the image of IMG_1 has no caption" in _reject(third, RejectReason.FILE_MISSING)
    assert "has no caption" not in _reject(fourth, RejectReason.FILE_MISSING)


def test_an_image_of_a_suffix_of_ones_own(tmp_path: Path) -> None:
    record = _record(_one(tmp_path, ("a.big.jpg", b"big"), ("a.jpg", b"small"), ("a.txt", b"a"), image=["big.jpg"]))
    assert record.image.data == b"big"


JPEG, TIFF = b"\xff\xd8\xff\xe0\0\x10JFIF" + b"\0" * 99, b"II*\0\x08\0\0\0" + b"\0" * 9999


@pytest.mark.parametrize("name", ["a.jpg_large", "a.dng", "a", "sub/a.JXR", "sub/a"])
def test_a_member_that_begins_as_an_image_is_one_whatever_its_suffix(tmp_path: Path, name: str) -> None:
    key = name.partition(".")[0]
    items = _read(tmp_path, *_sample("0"), (name, TIFF), (f"{key}.txt", b"a dog"), *_sample("b"))
    assert _names(items) == ["0.tar/0", f"0.tar/{key}", "0.tar/b"]
    assert (_record(items[1]).image.read(), _record(items[1]).captions) == (TIFF, ("a dog",))


def test_what_lies_beside_an_image_does_not_take_its_place(tmp_path: Path) -> None:
    others = [("a.cr2", TIFF), ("a.depth.exr", JPEG), ("a.mask.png", JPEG), ("a.npy", JPEG)]
    others += [("README", b"text"), (".hidden", JPEG)]
    for members in ([*others, *_sample("a")], [*_sample("a"), *others]):
        assert _record(_one(tmp_path, *members)).image.read() == IMAGE
    for name in ("a.depth.exr", "a.npy", "a.mp4"):
        data = JPEG if name != "a.mp4" else b"\0\0\0\x18ftypmp42" + b"\0" * 99
        _reject(_one(tmp_path, (name, data), ("a.txt", b"a dog")), RejectReason.FILE_MISSING)
    # Whoever names the suffix of images wants no others.
    _reject(_one(tmp_path, ("a.jpg_large", JPEG), ("a.txt", b"a dog"), image=["png"]), RejectReason.FILE_MISSING)


@pytest.mark.parametrize("second", ["a.png", "a.jpg", "a.JPG"])
def test_two_images_of_one_key_are_named_and_refused(tmp_path: Path, second: str) -> None:
    detail = _reject(_one(tmp_path, ("a.jpg", b"1"), (second, b"2"), ("a.txt", b"a")), RejectReason.NAME_TAKEN)
    assert f"a.jpg and {second}" in detail


def test_a_key_that_comes_again_is_a_reject(tmp_path: Path) -> None:
    items = _read(tmp_path, *_sample("a"), *_sample("b"), *_sample("a", b"other"))
    assert _names(items) == ["0.tar/a", "0.tar/b", "0.tar/a"]
    assert _record(items[0]).image.data == IMAGE
    assert "neighbours" in _reject(items[2], RejectReason.NAME_TAKEN)


@pytest.mark.parametrize("key", ["../../etc/passwd", "/etc/passwd", "./a", "a\nb", "caf\udce9", "é", "x" * 90])
def test_a_key_is_only_text(tmp_path: Path, key: str) -> None:
    (tmp_path / "0.tar").write_bytes(_tar(*_sample(key)))
    (item,) = _stream(tmp_path / "0.tar")
    assert _record(item).identity == f"0.tar/{key}"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0.tar"]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_pax_headers(tmp_path: Path, tar_format: int) -> None:
    key = "/".join(["folder" * 20, "é" * 80])
    (tmp_path / "0.tar").write_bytes(_tar(*_sample(key), *_sample("b"), tar_format=tar_format))
    assert _names(list(_stream(tmp_path / "0.tar"))) == [f"0.tar/{key}", "0.tar/b"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (tarfile.SYMTYPE, "symbolic link to /etc/passwd"),
        (tarfile.LNKTYPE, "hard link to /etc/passwd"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.BLKTYPE, "device"),
        (tarfile.FIFOTYPE, "pipe"),
        (tarfile.DIRTYPE, "folder"),
        (b"Z", "unknown type"),
    ],
)
@pytest.mark.parametrize("suffix", ["jpg", "txt"])
def test_only_regular_files_are_members(tmp_path: Path, kind: bytes, said: str, suffix: str) -> None:
    special = _info(f"b.{suffix}", kind=kind, link="/etc/passwd")
    rest = [member for member in _sample("b") if not member[0].endswith(suffix)]
    items = _read(tmp_path, *_sample("a"), special, *rest, *_sample("c"))
    assert _names(items) == ["0.tar/a", "0.tar/b", "0.tar/c"]
    assert said in _reject(items[1], RejectReason.NOT_A_FILE)


def test_folders_and_links_that_are_no_part_of_a_sample_pass(tmp_path: Path) -> None:
    between = [_info("v1.0", kind=tarfile.DIRTYPE), _info("x.npy", kind=tarfile.SYMTYPE, link="a.jpg")]
    assert _names(_read(tmp_path, *_sample("v1.0/a"), *between, *_sample("v1.0/b"))) == ["0.tar/v1.0/a", "0.tar/v1.0/b"]


def _sparse_tar(name: str, size: int, chunks: list[tuple[int, bytes]]) -> bytes:
    """An old GNU sparse member, which tarfile reads but does not write: the map of its data lies in the header."""
    block = bytearray(_info(name).tobuf(tarfile.GNU_FORMAT))
    data = b"".join(chunk for _, chunk in chunks)
    block[124:136] = b"%011o\0" % len(data)
    block[156:157] = tarfile.GNUTYPE_SPARSE
    for number, (offset, chunk) in enumerate(chunks):
        start = 386 + 24 * number
        block[start : start + 24] = b"%011o\0%011o\0" % (offset, len(chunk))
    block[483:495] = b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + data + bytes(-len(data) % 512)


def test_a_sparse_member_is_read_with_its_holes(tmp_path: Path) -> None:
    sparse = _sparse_tar("a.jpg", 5000, [(0, b"head"), (4000, b"tail")])
    (tmp_path / "0.tar").write_bytes(sparse + _tar(("a.txt", b"a"), *_sample("b")))
    first, second = map(_record, _stream(tmp_path / "0.tar"))
    assert first.image.data == b"head" + bytes(3996) + b"tail" + bytes(996)
    assert second.image.data == IMAGE


def test_a_huge_member_is_skipped_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "MAX_MEMBER_BYTES", 1000)
    items = _read(tmp_path, *_sample("a", bytes(1001)), *_sample("b", bytes(1000)))
    assert "1,001 bytes" in _reject(items[0], RejectReason.UNREADABLE)
    assert isinstance(items[1], Record)


def test_a_sparse_bomb_is_refused_by_its_size(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(_sparse_tar("a.jpg", 8**11 - 1, [(0, b"x")]) + _tar(("a.txt", b"a")))
    (item,) = _stream(tmp_path / "0.tar")
    assert _reject(item, RejectReason.UNREADABLE)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_claims_a_gigabyte_is_not_read(tmp_path: Path, kind: bytes) -> None:
    header = _info("a", 1 << 30, kind).tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "0.tar").write_bytes(_tar(*_sample("a"))[: 4 * 512] + header + bytes(1024))
    with pytest.raises(SourceError, match="claims to be"):
        list(_stream(tmp_path / "0.tar"))


def test_a_chain_of_headers_ends_in_an_error(tmp_path: Path) -> None:
    header = _info("a", 0, tarfile.XHDTYPE).tobuf(tarfile.USTAR_FORMAT)
    (tmp_path / "0.tar").write_bytes(header * 5000)
    with pytest.raises(SourceError, match=r"damaged .*: too many extended headers follow each other"):
        list(_stream(tmp_path / "0.tar"))


def _boundaries(content: bytes) -> list[int]:
    """Where headers, contents and the end's mark begin and end."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = tar.getmembers()
        return sorted({member.offset for member in members} | {member.offset_data for member in members} | {tar.offset})


def test_a_tar_cut_anywhere_is_never_taken_for_whole(tmp_path: Path) -> None:
    whole = _tar(*_sample("a"), *_sample("b", bytes(700)), *_sample("c"))
    cuts = {cut + step for cut in _boundaries(whole) for step in (-513, -512, -1, 0, 1, 511) if cut + step >= 0}
    end = max(_boundaries(whole)) + 512
    for cut in sorted(cut for cut in cuts if cut < end):
        (tmp_path / "0.tar").write_bytes(whole[:cut])
        with pytest.raises(SourceError, match=r"0\.tar is damaged.*breaks off") as caught:
            list(_stream(tmp_path / "0.tar"))
        assert f"byte {cut:,} " in str(caught.value)
    for cut in (end, end + 1, len(whole)):
        (tmp_path / "0.tar").write_bytes(whole[:cut])
        assert len(list(_stream(tmp_path / "0.tar"))) == 3


def test_what_lies_before_the_damage_is_given(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(_tar(*_sample("a"), *_sample("b"), *_sample("c"))[: 2 * 2048 + 512 + 5])
    stream = _stream(tmp_path / "0.tar")
    assert _names([next(stream), next(stream)]) == ["0.tar/a", "0.tar/b"]
    with pytest.raises(SourceError, match=r"c\.jpg, at byte 4,613 .*Download it again"):
        next(stream)


def test_a_flipped_bit_in_a_header_is_found(tmp_path: Path) -> None:
    whole = _tar(*_sample("a"), *_sample("b"), *_sample("c"))
    (tmp_path / "0.tar").write_bytes(whole)
    expected = list(_stream(tmp_path / "0.tar"))
    found = 0
    for byte in range(2048, 2048 + 512):
        damaged = bytearray(whole)
        damaged[byte] ^= 1 << byte % 8
        (tmp_path / "0.tar").write_bytes(damaged)
        try:
            # A flip in the blanks around a number does not change it.
            assert list(_stream(tmp_path / "0.tar")) == expected
        except SourceError as error:
            found += 1
            assert "a.txt" in str(error)  # noqa: PT017
    assert found > 500


@pytest.mark.parametrize("damage", [bytes(512), bytes(10_000), b"x" * 512], ids=["zeros", "many-zeros", "garbage"])
def test_an_overwritten_header_is_not_the_end(tmp_path: Path, damage: bytes) -> None:
    whole = _tar(*_sample("a"), *_sample("b", bytes([1]) * 20_000))
    (tmp_path / "0.tar").write_bytes(whole[:2048] + damage + whole[2048 + len(damage) :])
    with pytest.raises(SourceError, match="damaged"):
        list(_stream(tmp_path / "0.tar"))


def test_what_follows_the_end_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(_tar(*_sample("a")) + _tar(*_sample("b")))
    with pytest.raises(SourceError, match="more behind the mark of its end"):
        list(_stream(tmp_path / "0.tar"))


@pytest.mark.parametrize("content", [b"", b"\0", b"<html>404</html>", b"<html>" * 500, b"\x1f\x8b", b"PK\3\4" * 500])
def test_a_file_that_is_no_tar(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(SourceError, match=r"0\.tar is damaged before its first member"):
        list(_stream(tmp_path / "0.tar"))


def test_an_empty_tar_has_no_samples(tmp_path: Path) -> None:
    assert _read(tmp_path) == []


def test_hostile_headers_give_records_rejects_or_a_clean_error(tmp_path: Path) -> None:
    chance = random.Random(0)
    refused = 0
    whole = _tar(*_sample("folder/a"), *_sample("b" * 120), *_sample("é" * 120), tar_format=tarfile.PAX_FORMAT)
    for _ in range(400):
        damaged = bytearray(whole)
        start = 512 * chance.randrange(len(whole) // 512)
        for _ in range(chance.randrange(1, 20)):
            damaged[start + chance.choice([*range(100, 160), *range(345, 512)])] = chance.choice(
                [*b"01x79 =\n\0\xff\x80SLKDgx"]
            )
        damaged[start + 148 : start + 156] = b" " * 8
        damaged[start + 148 : start + 156] = b"%06o\0 " % sum(damaged[start : start + 512])
        (tmp_path / "0.tar").write_bytes(damaged)
        try:
            assert all(isinstance(item, (Record, Reject)) for item in _stream(tmp_path / "0.tar"))
        except SourceError as error:
            refused += "0.tar" in str(error)
    assert 0 < refused < 400


def test_a_gzipped_tar_is_read_and_its_damage_found(tmp_path: Path) -> None:
    chance = random.Random(0)
    whole = _tar(*_sample("a", chance.randbytes(5000)), *_sample("b", chance.randbytes(5000)))
    packed = gzip.compress(whole)
    (tmp_path / "0.tar").write_bytes(whole)
    expected = [_record(item).image.data for item in _stream(tmp_path / "0.tar")]
    for name in ("0.tar.gz", "0.tgz", "packed-in-spite-of-its-name.tar"):
        (tmp_path / name).write_bytes(packed)
        assert [_record(item).image.data for item in _stream(tmp_path / name)] == expected
    for cut in (1, 5, 10, 20, len(packed) // 2, len(packed) - 9, len(packed) - 4, len(packed) - 1):
        (tmp_path / "0.tgz").write_bytes(packed[:cut])
        with pytest.raises(SourceError, match=r"0\.tgz is damaged"):
            list(_stream(tmp_path / "0.tgz"))
    for byte in range(100, len(packed), len(packed) // 50):
        damaged = bytearray(packed)
        damaged[byte] ^= 4
        (tmp_path / "0.tgz").write_bytes(damaged)
        with pytest.raises(SourceError, match=r"0\.tgz is damaged"):
            list(_stream(tmp_path / "0.tgz"))


def _damaged(name: str) -> bytes:
    """A tar of the samples a, b and c with one kind of damage from b on."""
    whole = _tar(*_sample("a", bytes([1]) * 900), *_sample("b"), *_sample("c"))
    start = _boundaries(whole)[4]  # where the header of b.jpg lies
    damages: dict[str, Callable[[], bytes]] = {
        "cut at a header": lambda: whole[:start],
        "cut in a header": lambda: whole[: start + 100],
        "a header of zeros": lambda: whole[:start] + bytes(512) + whole[start + 512 :],
        "a header of garbage": lambda: whole[:start] + b"x" * 512 + whole[start + 512 :],
        "a flipped bit in a header": lambda: whole[: start + 20] + b"\1" + whole[start + 21 :],
        "another tar behind the end": lambda: whole + _tar(*_sample("d")),
        "a wrong gzip checksum": lambda: gzip.compress(whole)[:-8] + bytes(4) + gzip.compress(whole)[-4:],
        "a gzip without its end": lambda: gzip.compress(whole)[:-8],
    }
    return damages[name]()


@pytest.mark.parametrize(
    "damage",
    [
        "cut at a header",
        "cut in a header",
        "a header of zeros",
        "a header of garbage",
        "a flipped bit in a header",
        "another tar behind the end",
        "a wrong gzip checksum",
        "a gzip without its end",
    ],
)
def test_damage_that_webdataset_passes_silently_is_an_error(tmp_path: Path, damage: str) -> None:
    content = _damaged(damage)
    files = webdataset_library.tariterators.tar_file_expander([{"url": "0.tar", "stream": io.BytesIO(content)}])
    # When this fails, the library has learnt to notice it, and a check of ours may go.
    keys = [sample["__key__"] for sample in webdataset_library.tariterators.group_by_keys(files)]
    assert keys in (["a"], ["a", "b", "c"])
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(SourceError, match=r"0\.tar is damaged"):
        list(_stream(tmp_path / "0.tar"))


def test_a_gzip_file_of_several_members_is_read_whole(tmp_path: Path) -> None:
    whole = _tar(*_sample("a"), *_sample("b"))
    (tmp_path / "0.tgz").write_bytes(gzip.compress(whole[:1500]) + gzip.compress(whole[1500:]))
    assert _names(list(_stream(tmp_path / "0.tgz"))) == ["0.tgz/a", "0.tgz/b"]


def test_whole_tars_are_grouped_as_webdataset_groups_them(tmp_path: Path) -> None:
    members = [*_sample("x.v1/a"), ("x.v1/a.mask.PNG", b"m"), *_sample("a b"), *_sample("é"), ("b.json", b"{}"), ("b.jpg", b"")]
    (tmp_path / "0.tar").write_bytes(_tar(*members))
    expected = [
        (sample["__key__"], {suffix for suffix in sample if not suffix.startswith("__")})
        for sample in webdataset_library.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False)
    ]
    settings = webdataset.TarSettings(mask="mask.png")
    grouped = list(webdataset._samples(str(tmp_path / "0.tar"), settings))
    assert [(sample.key, set(sample.members)) for sample in grouped] == expected


@pytest.mark.parametrize("suffix", ["__bad__", "__key__", "__url__"])
def test_a_member_named_as_webdatasets_own_fields_changes_nothing(tmp_path: Path, suffix: str) -> None:
    record = _record(_one(tmp_path, *_sample("a"), (f"a.{suffix}", b"1")))
    assert (record.identity, record.image.data) == ("0.tar/a", IMAGE)


def _partitions(path: str | Path) -> list[base.Partition]:
    config = SourceConfig(path=str(path), format="webdataset")
    source, settings = base.parse(config)
    return list(source.partitions(config, settings, 4))


def test_a_pattern_names_tars_in_order(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number:05d}.tar").write_bytes(_tar(*_sample("k")))
    expected = [f"{number:05d}.tar/k" for number in range(12)]
    assert _names(list(_stream(tmp_path / "{00000..00011}.tar"))) == expected
    assert _names(list(_stream(tmp_path / "*.tar"))) == expected
    assert _names(list(_stream(tmp_path / "{00003,00001}.tar"))) == ["00003.tar/k", "00001.tar/k"]


def test_equal_names_in_several_folders_keep_their_folders(tmp_path: Path) -> None:
    for folder in ("x/one", "x/two"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "0.tar").write_bytes(_tar(*_sample("k")))
    assert _names(list(_stream(tmp_path / "x/*/0.tar"))) == ["one/0.tar/k", "two/0.tar/k"]


def test_a_signature_stays_until_the_tar_changes(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(_tar(*_sample("a")))
    (tmp_path / "1.tar").write_bytes(_tar(*_sample("a")))
    before = _partitions(tmp_path / "*.tar")
    assert before == _partitions(tmp_path / "*.tar")
    assert before[0].signature != before[1].signature
    (tmp_path / "1.tar").write_bytes(_tar(*_sample("a"), *[_sample(f"b{number}")[0] for number in range(20)]))
    after = _partitions(tmp_path / "*.tar")
    assert (after[0] == before[0], after[1] == before[1]) == (True, False)


@pytest.mark.parametrize("pattern", ["missing.tar", "*.tar", "{00000..00003}.tar"])
def test_tars_that_are_not_there_are_told_with_what_is(tmp_path: Path, pattern: str) -> None:
    for name in ("a.zip", "b.parquet"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(SourceError, match=r"a\.zip, b\.parquet"):
        list(_stream(tmp_path / pattern))
    with pytest.raises(SourceError, match="no folder"):
        list(_stream(tmp_path / "nowhere" / pattern))


def test_a_folder_that_is_called_a_tar(tmp_path: Path) -> None:
    (tmp_path / "0.tar").mkdir()
    with pytest.raises(SourceError, match=r"0\.tar"):
        list(_stream(tmp_path / "0.tar"))


def test_tars_of_an_object_store_are_streamed() -> None:
    memory = fsspec.filesystem("memory")
    for name in ("a", "b"):
        memory.pipe(f"/webdataset-test/{name}.tar", _tar(*_sample("k")))
    records = [_record(item) for item in _stream("memory://webdataset-test/{a,b}.tar")]
    assert [record.identity for record in records] == ["a.tar/k", "b.tar/k"]
    assert records[0].image.location == "memory://webdataset-test/a.tar#k.jpg"
    memory.pipe("/webdataset-test/b.tar", _tar(*_sample("k"))[:700])
    with pytest.raises(SourceError, match=r"b\.tar is damaged"):
        list(_stream("memory://webdataset-test/{a,b}.tar"))


@pytest.fixture
def web_server(tmp_path: Path) -> Iterator[str]:
    """A loopback server of the test's folder, under a path with the name of nothing else."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_tar_of_a_web_server_is_streamed(tmp_path: Path, web_server: str) -> None:
    (tmp_path / "0.tar").write_bytes(_tar(*_samples(20, 9000)))
    items = list(_stream(f"{web_server}/0.tar"))
    assert _names(items) == [f"0.tar/{number:03d}" for number in range(20)]
    with pytest.raises(FtkError, match=r"9\.tar"):
        list(_stream(f"{web_server}/9.tar"))


def test_members_are_read_one_sample_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0.tar").write_bytes(_tar(*_samples(50, 20_000)))
    read: list[str] = []
    whole = tar_stream.Tar.read
    monkeypatch.setattr(tar_stream.Tar, "read", lambda tar, member: read.append(member.name) or whole(tar, member))
    stream = _stream(tmp_path / "0.tar")
    for number in range(1, 11):
        next(stream)
        assert len(read) <= 2 * number
    tar = tar_stream.Tar("0.tar", io.BytesIO((tmp_path / "0.tar").read_bytes()))
    while tar.next() is not None:
        assert tar._archive is not None
        assert tar._archive.members == []


def test_a_misspelt_setting_is_told(tmp_path: Path) -> None:
    with pytest.raises(FtkError, match="captions"):
        list(_stream(tmp_path / "0.tar", caption_suffix="txt"))
