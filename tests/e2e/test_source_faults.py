"""`ftk prepare` over sources that are damaged, hostile or changing: each input accounted for, nothing run or extracted."""

import errno
import gzip
import io
import json
import os
import pickle
import resource
import signal
import struct
import tarfile
import time
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFile
from servers import fault_server
from test_prepare_faults import hashes, killed_at, left_over, run_file_over

from ftk import locations
from ftk.pipeline import decode, images, shard_writer, source_units
from ftk.pipeline.dataset import PreparedDataset

pytestmark = pytest.mark.faults

REAL_PREPARE_IMAGE = images.prepare_image
# Here, because workers have the environment of whoever started the first of them.
os.environ.setdefault("NO_PROXY", "127.0.0.1")


def colour(number: int) -> tuple[int, int, int]:
    return number * 40 % 256, number * 90 % 256, number * 140 % 256


def flat(number: int = 0, image_format: str = "PNG", size: tuple[int, int] = (64, 64), mode: str = "RGB") -> bytes:
    """A file of one colour, which tells the picture apart from all others."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour(number)).convert(mode).save(buffer, image_format)
    return buffer.getvalue()


def in_folder(place: Path, files: dict[str, bytes]) -> Path:
    place.mkdir()
    for name, data in files.items():
        (place / name).write_bytes(data)
    return place


def in_tar(place: Path, members: dict[str, bytes] | Sequence[tarfile.TarInfo | tuple[str, bytes]]) -> Path:
    """Members in the given order; those of one key must follow each other."""
    with tarfile.open(place.with_suffix(".tar"), "w") as tar:
        for member in members.items() if isinstance(members, dict) else members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return place.with_suffix(".tar")


def captioned(count: int, first: int = 0) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for number in range(first, first + count):
        files |= {f"{number:03d}.png": flat(number), f"{number:03d}.txt": f"number {number}".encode()}
    return files


@pytest.fixture
def prepare(ftk, workspace) -> Callable[..., tuple[dict[str, Any], PreparedDataset]]:
    """Prepare a source, rejects allowed; its report, and the dataset to read."""

    def run(source: Path, *arguments: object, **data: Any) -> tuple[dict[str, Any], PreparedDataset]:
        run_file = run_file_over(workspace, source, max_reject_fraction=1.0, **data)
        result = ftk("prepare", run_file, "--json", *arguments)
        assert result.code == 0, result.err
        report = json.loads(result.out)
        assert report["num_samples"] + report["num_rejects"] == report["num_inputs"]
        return report, PreparedDataset.open(Path(report["directory"]))

    return run


@pytest.fixture
def recovers(ftk, tmp_path) -> Callable[[Path], dict[str, Any]]:
    """Run again what a fault stopped: it completes with the bytes of a run that met none. Gives its report."""

    def run(run_file: Path) -> dict[str, Any]:
        again, clean = (ftk("prepare", run_file, "--json", "--workspace", tmp_path / name) for name in ("work", "clean"))
        assert (again.code, clean.code) == (0, 0), again.err + clean.err
        assert not left_over(tmp_path / "work/prepared")
        assert hashes(tmp_path / "work/prepared") == hashes(tmp_path / "clean/prepared")
        return json.loads(again.out)

    return run


def rejected(report: dict[str, Any]) -> dict[str, str]:
    return {Path(row["path"]).name: row["reason"] for row in report["rejects"]}


CAPTIONS: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "caption_missing"),
    "empty": (b"", "caption_empty"),
    "blank": (b" \r\n\t", "caption_empty"),
    "latin-1": ("größe".encode("latin-1"), "caption_not_text"),
    "utf-16": ("größe 猫".encode("utf-16"), "größe 猫"),
    "utf-16-le": ("a cat".encode("utf-16-le"), "caption_not_text"),
    "nul": (b"a\0cat", "caption_not_text"),
    "megabyte": (b"x" * (1 << 20), "caption_not_text"),
    "mark": ("größe 猫".encode("utf-8-sig"), "größe 猫"),
    "windows": (b"a cat\r\n", "a cat"),
    "long": (b"x" * (64 << 10), "x" * (64 << 10)),
}


@pytest.mark.parametrize("pack", [in_folder, in_tar])
def test_each_broken_caption_costs_its_own_image_and_nothing_is_mojibake(prepare, tmp_path, pack):
    files: dict[str, bytes] = {}
    for number, (name, (text, _)) in enumerate(CAPTIONS.items()):
        files |= {f"{name}.png": flat(number)} | ({} if text is None else {f"{name}.txt": text})
    report, dataset = prepare(pack(tmp_path / "captions", files))
    reasons = {name: end for name, (_, end) in CAPTIONS.items() if end.startswith("caption_")}
    assert {name.removesuffix(".png"): reason for name, reason in rejected(report).items()} == reasons
    assert {text for row in dataset.rows() for text in row.captions} == {
        end for name, (_, end) in CAPTIONS.items() if name not in reasons
    }
    assert (report["num_inputs"], report["num_long_captions"]) == (len(CAPTIONS), 1)


def test_images_of_one_stem_are_kept_apart_in_a_folder_and_refused_by_name_in_a_tar(prepare, tmp_path):
    files = {"a.png": flat(1), "a.webp": flat(2, "WEBP"), "a.txt": b"one caption", **captioned(2, 5)}
    _, dataset = prepare(in_folder(tmp_path / "stems", files))
    rows = dataset.rows()
    assert len({row.key for row in rows}) == len({row.content_sha256 for row in rows}) == 4
    assert [row.captions for row in rows].count(["one caption"]) == 2
    report, _ = prepare(in_tar(tmp_path / "stems", files))
    assert rejected(report) == {"a": "name_taken"}
    assert "a.png and a.webp" in report["rejects"][0]["detail"]


def test_a_file_that_a_table_names_twice_is_two_samples(prepare, tmp_path):
    in_folder(tmp_path / "photos", captioned(1))
    rows = [{"file_name": "000.png", "text": "first"}, {"file_name": "000.png", "text": "second"}]
    (tmp_path / "photos/rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _, dataset = prepare(tmp_path / "photos/rows.jsonl")
    assert [row.captions for row in dataset.rows()] == [["first"], ["second"]]
    assert len({row.key for row in dataset.rows()}) == 2


NAMES = [
    *(unicodedata.normalize(form, "é") for form in ("NFC", "NFD")),
    *("a", "A", "two\nlines", "猫 🐈", "quote'\"`$(x)", "x" * 200, " blank ", "-dash", "\x1b[31mred"),
    os.fsdecode(b"caf\xe9"),
]


@pytest.mark.parametrize("pack", [in_folder, in_tar])
def test_odd_names_give_distinct_keys_whose_pictures_and_captions_are_read_back(prepare, ftk, tmp_path, pack):
    files: dict[str, bytes] = {}
    for number, name in enumerate(NAMES):
        files |= {f"{name}.png": flat(number), f"{name}.txt": f"number {number}".encode()}
    source = pack(tmp_path / "names", files)
    if source.is_dir() and len(list(source.iterdir())) < len(files):
        pytest.skip("this file system takes some of the names for one")
    report, dataset = prepare(source)
    assert report["num_samples"] == len({row.key for row in dataset.rows()}) == len(NAMES)
    for row in dataset.rows():
        with Image.open(io.BytesIO(dataset.image_bytes(row))) as image:
            assert image.getpixel((0, 0)) == colour(int(row.captions[0].split()[1]))
    assert ftk("inspect", dataset.directory, "--html").code == 0
    again, _ = prepare(source)
    assert again["num_shards_reused"] == again["num_shards"]


@pytest.mark.parametrize("allowed", [0.0, 1.0])
def test_names_of_rejects_cannot_steer_the_terminal(ftk, workspace, tmp_path, allowed):
    source = in_folder(tmp_path / "names", {**captioned(3), "\x1b[31mred.png": b"", "\x1b[31mred.txt": b"x"})
    result = ftk("prepare", run_file_over(workspace, source, max_reject_fraction=allowed))
    assert result.code == (0 if allowed else 3)
    assert "red.png" in result.out + result.err
    assert "\x1b" not in result.out + result.err


def bomb(width: int, height: int) -> bytes:
    """A valid PNG of one bit a pixel; all of it is there to be decoded."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, row = zlib.compressobj(1), bytes(1 + (width + 7) // 8)
    pixels = b"".join(packer.compress(row * 500) for _ in range(height // 500)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def watched_prepare_image(task: images.ImageTask) -> images.PreparedImage | images.ImageProblem:
    """`prepare_image`, which leaves a note beside the image: how often pixels were decoded, and the worker's peak memory."""
    decoded: list[Image.Image] = []
    load, decode_plainly = ImageFile.ImageFile.load, decode._decoded_plainly
    with pytest.MonkeyPatch.context() as patch:
        # What Pillow does not decode, TurboJPEG and libvips do.
        patch.setattr(decode, "_decoded_plainly", lambda opened: decoded.append(opened.image) or decode_plainly(opened))
        patch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image) or load(image))
        result = REAL_PREPARE_IMAGE(task)
    note = {"num_decoded": len(decoded), "peak_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    Path(f"{task.image.location}.note").write_text(json.dumps(note))
    return result


def test_bombs_and_slivers_are_rejected_before_decoding_and_the_worker_does_not_grow(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "prepare_image", watched_prepare_image)
    odd = {"b.png": bomb(50_000, 50_000), "c.png": flat(1, size=(1, 65_000)), "d.png": flat(2, size=(65_000, 1))}
    source = in_folder(tmp_path / "bombs", {"a.png": flat(), **odd})
    report, _ = prepare(source, sources=[{"path": str(source), "caption": "x"}])
    assert rejected(report) == {"b.png": "too_many_pixels", "c.png": "too_extreme_aspect", "d.png": "too_extreme_aspect"}
    notes = {name: json.loads((source / f"{name}.note").read_text()) for name in ["a.png", *odd]}
    assert notes["a.png"]["num_decoded"] > 0
    assert [notes[name]["num_decoded"] for name in odd] == [0, 0, 0]
    assert max(notes[name]["peak_kib"] for name in odd) - notes["a.png"]["peak_kib"] < 64 << 10


def test_each_broken_image_costs_itself_and_odd_ones_become_rgb(prepare, tmp_path):
    whole = {kind: flat(3, kind, (300, 200)) for kind in ("PNG", "JPEG", "GIF", "WEBP")}
    frames, buffer = [Image.new("L", (64, 64), shade) for shade in (10, 200)], io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    broken = {
        "zero.png": (b"", "unreadable"),
        "text.jpg": (b"<html>404</html>", "unreadable"),
        **{f"cut-{kind}.{kind.lower()}": (data[: len(data) * 6 // 10], "truncated") for kind, data in whole.items()},
    }
    good = {
        "a-png-inside.jpg": whole["PNG"],
        "cmyk.jpg": flat(1, "JPEG", mode="CMYK"),
        "16-bit.png": flat(1, mode="I;16"),
        "palette.gif": flat(1, "GIF", mode="P"),
        "animated.gif": buffer.getvalue(),
    }
    source = in_folder(tmp_path / "images", {**{name: data for name, (data, _) in broken.items()}, **good})
    report, dataset = prepare(source, sources=[{"path": str(source), "caption": "x"}])
    assert rejected(report) == {name: reason for name, (_, reason) in broken.items()}
    assert len(dataset.rows()) == len(good)
    for row in dataset.rows():
        with Image.open(io.BytesIO(dataset.image_bytes(row))) as image:
            assert image.convert("RGB").size == (row.bucket_width, row.bucket_height)


# Tars.

SPECIAL = {
    **{"soft": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "pipe": tarfile.FIFOTYPE},
    **{"character": tarfile.CHRTYPE, "block": tarfile.BLKTYPE, "a-folder": tarfile.DIRTYPE},
}


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def test_a_hostile_tar_writes_nothing_anywhere_and_the_run_completes(prepare, tmp_path, monkeypatch):
    outside = in_folder(tmp_path / "outside", {"secret.png": flat(7)})
    members: list[Any] = []
    for name in ("../climbed", f"{outside}/absolute", "a/../../beside", "./here"):
        members += [(f"{name}.png", flat(1)), (f"{name}.txt", b"x")]
    members += [special("away", tarfile.SYMTYPE, str(outside)), ("away/through.png", flat(2)), ("away/through.txt", b"x")]
    for name, kind in SPECIAL.items():
        members += [special(f"{name}.png", kind, f"{outside}/secret.png"), (f"{name}.txt", b"x")]
    source = in_tar(tmp_path / "hostile", members)
    monkeypatch.chdir(outside)
    report, dataset = prepare(source)
    assert rejected(report) == dict.fromkeys(SPECIAL, "not_a_file")
    assert report["num_samples"] == 5
    assert all("/" not in row.key and "." not in row.key for row in dataset.rows())
    stems = {path.stem for path in [*tmp_path.rglob("*"), *tmp_path.parent.glob("*")]}
    assert not stems & {"climbed", "absolute", "beside", "here", "away", "through", *SPECIAL}
    assert [path.name for path in outside.iterdir()] == ["secret.png"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_cut_tar_is_named_and_once_it_is_whole_the_rest_is_kept(ftk, workspace, recovers, tmp_path, packed):
    tars = in_folder(tmp_path / "tars", {})
    for number in range(3):
        in_tar(tars / str(number), captioned(4, 4 * number))
    victim = tars / "1.tar"
    whole = gzip.compress(victim.read_bytes(), mtime=0) if packed else victim.read_bytes()
    victim.write_bytes(whole)
    run_file = run_file_over(workspace, tars / "*.tar")
    for cut in (0, 100, len(whole) // 2, len(whole.rstrip(b"\0")) - packed):
        victim.write_bytes(whole[:cut])
        result = ftk("prepare", run_file)
        assert result.code == 2
        assert f"{victim} is damaged" in result.err
        assert not (tmp_path / "work/prepared/dataset.json").exists()
    victim.write_bytes(whole)
    assert recovers(run_file)["num_shards_reused"] >= 2


def test_killed_while_a_tar_is_read_a_second_run_completes_with_the_same_bytes(workspace, recovers, tmp_path):
    run_file = run_file_over(workspace, in_tar(tmp_path / "long", captioned(12)))
    touches = int(killed_at(0, run_file, "--workspace", tmp_path / "alone")[1].split()[-1])
    for point in (touches // 4, touches // 2):
        assert killed_at(point, run_file)[0] == -signal.SIGKILL
    assert recovers(run_file)["num_shards_reused"] >= 1


# Code in data.


class _Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def canary(tmp_path) -> Iterator[Path]:
    """Must not appear. That its pickle would make it is checked first."""
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(_Canary(path)))
    path.unlink()
    yield path
    assert not path.exists()


@pytest.mark.parametrize("pack", [in_folder, in_tar])
def test_pickles_beside_or_instead_of_images_never_run(prepare, tmp_path, canary, pack):
    payload, array = pickle.dumps(_Canary(canary)), io.BytesIO()
    np.save(array, np.array([_Canary(canary)], dtype=object))
    files = captioned(2)
    for name in ("000", "lonely"):
        files |= {f"{name}.{suffix}": payload for suffix in ("pkl", "pyd", "pt", "pth", "pickle")}
        files |= {f"{name}.npy": array.getvalue()}
    files = dict(sorted(files.items())) | {"z.png": payload, "z.txt": b"x", "y.png": flat(3), "y.json": payload}
    report, _ = prepare(pack(tmp_path / "pickles", files))
    assert report["num_samples"] == 2
    by_name = {name.removesuffix(".png"): reason for name, reason in rejected(report).items()}
    lonely = {} if pack is in_folder else {"lonely": "file_missing"}
    assert by_name == {"z": "unreadable", "y": "caption_not_text", **lonely}


def test_pickles_named_as_the_image_are_no_images(prepare, tmp_path, canary):
    source = in_tar(tmp_path / "pickles", {**captioned(1), "z.npy": pickle.dumps(_Canary(canary)), "z.txt": b"x"})
    report, _ = prepare(source, sources=[{"path": str(source), "image": ["png", "npy"]}])
    assert rejected(report) == {"z": "unreadable"}


HUB = {"format": "hub", "image": "image"}


def parquet(path: Path, count: int = 4, first: int = 0, **metadata: bytes) -> Path:
    """Images in a table, two rows a group; `metadata` is of the column of captions."""
    numbers = range(first, first + count)
    binary, text = pa.field("image", pa.binary()), pa.field("text", pa.string(), metadata=metadata or None)
    columns = [pa.array(list(map(flat, numbers))), pa.array([f"number {number}" for number in numbers])]
    pq.write_table(pa.table(columns, schema=pa.schema([binary, text])), path, row_group_size=2)
    return path


@pytest.mark.parametrize("settings", [{}, HUB], ids=["table", "hub"])
def test_no_script_of_a_dataset_runs(ftk, workspace, tmp_path, canary, settings):
    folder = in_folder(tmp_path / "data", {})
    table = parquet(folder / "train.parquet")
    script = f"open({str(canary)!r}, 'w')"
    for name in ("dataset.py", "__init__.py", "conftest.py"):
        (folder / name).write_text(script)
    source = {"path": str(folder if settings else table), **settings}
    assert ftk("prepare", workspace(data={"sources": [source]})).code == 0
    (folder / "data.py").write_text(script)
    result = ftk("prepare", workspace(data={"sources": [source]}))
    assert (result.code, "script" in result.err) == ((2, True) if settings else (0, False))


@pytest.mark.parametrize("settings", [{}, HUB], ids=["table", "hub"])
def test_pickled_types_in_a_parquet_file_never_run(ftk, workspace, tmp_path, canary, settings):
    folder = in_folder(tmp_path / "data", {})
    hostile = {"ARROW:extension:name": b"arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(_Canary(canary))}
    table = parquet(folder / "train.parquet", **hostile)
    assert pq.read_schema(table).field("text").metadata[b"ARROW:extension:name"] == b"arrow.py_extension_type"
    source = {"path": str(folder if settings else table), **settings}
    assert ftk("prepare", workspace(data={"sources": [source]})).code == 0


# Disks, writers, and sources that do not hold still.


def failing(real: Callable[..., Any], number: int, at: str = "", calls: int = 0) -> Callable[..., Any]:
    """`real`, that fails on all paths that end with `at` after the first `calls` of them."""
    met = count()

    def fails(*arguments: Any, **options: Any) -> Any:
        if any(str(argument).endswith(at) for argument in arguments) and next(met) >= calls:
            raise OSError(number, os.strerror(number), str(arguments[0]))
        return real(*arguments, **options)

    return fails


def failing_prepare_image(task: images.ImageTask) -> images.PreparedImage | images.ImageProblem:
    """`prepare_image` on a disk that gives one of the pictures back no more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", failing(os.open, errno.EIO, "005.png"))
        return REAL_PREPARE_IMAGE(task)


@pytest.mark.parametrize(
    ("place", "function", "at"),
    [(images, "prepare_image", "005.png"), (os, "open", "005.txt"), (os, "scandir", "/s"), (Path, "stat", "005.txt")],
    ids=["worker", "open", "scandir", "stat"],
)
def test_a_disk_that_cannot_be_read_is_no_reject(ftk, workspace, recovers, tmp_path, place, function, at):
    run_file = run_file_over(workspace, in_folder(tmp_path / "s", captioned(9)))
    with pytest.MonkeyPatch.context() as patch:
        fails = failing_prepare_image if place is images else failing(getattr(place, function), errno.EIO, at)
        patch.setattr(place, function, fails)
        result = ftk("prepare", run_file)
    assert result.code == 4
    assert "Input/output error" in result.err
    assert at.strip("/") in result.err
    assert recovers(run_file)["num_rejects"] == 0


@pytest.mark.parametrize(
    ("place", "function", "number", "at", "calls"),
    [
        (os, "fsync", errno.EIO, "", 10),
        (os, "fsync", errno.EDQUOT, "", 10),
        (tarfile.TarFile, "addfile", errno.ENOSPC, "", 10),
        (Path, "replace", errno.ENOSPC, "00001.parquet", 0),
        (Path, "replace", errno.EIO, "dataset.json", 0),
    ],
)
def test_a_disk_that_cannot_be_written_is_said_and_the_run_resumed(
    ftk, workspace, recovers, tmp_path, place, function, number, at, calls
):
    run_file = run_file_over(workspace, in_folder(tmp_path / "s", captioned(9)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, function, failing(getattr(place, function), number, at, calls))
        result = ftk("prepare", run_file)
    assert result.code == 4
    assert ("Input/output error" if number == errno.EIO else "disk is full") in result.err
    assert "run the same command again" in result.err
    assert not left_over(tmp_path / "work/prepared")
    assert not (tmp_path / "work/prepared/dataset.json").exists()
    assert recovers(run_file)["num_shards_reused"] >= 1


def test_the_second_of_two_writers_names_the_first_which_completes(start, ftk, workspace, recovers, tmp_path):
    run_file = run_file_over(workspace, in_folder(tmp_path / "s", captioned(9)))
    lock = tmp_path / "work/prepared/.lock"
    first = start("prepare", run_file)
    deadline = time.monotonic() + 60
    while not (lock.exists() and lock.read_text()) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        second = ftk("prepare", run_file)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert second.code == 4
    assert f"is being written by process {first.pid} on " in second.err
    _, err = first.communicate(timeout=60)
    assert first.returncode == 0, err
    report = recovers(run_file)
    assert report["num_shards_reused"] == report["num_shards"]


@pytest.fixture
def meanwhile(monkeypatch) -> Callable[..., None]:
    """Do something before the n-th listing of the sources, or before the n-th unit is made."""

    def set_up(what: Callable[[], Any], *, listing: int = 0, unit: int = 0) -> None:
        module, name, point = (source_units, "units", listing) if listing else (shard_writer, "make_unit", unit)
        real, calls = getattr(module, name), []

        def wrapped(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == point:
                what()
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, wrapped)

    return set_up


@pytest.mark.parametrize(
    ("names", "listing", "part"),
    [
        pytest.param(["more.png"], 2, "1/1", id="one-more-at-the-end"),
        pytest.param(["0.png"], 2, "1/1", id="one-more-at-the-front"),
        pytest.param(["004.png"], 2, "1/1", id="one-fewer"),
        pytest.param(["009.png", "010.png", "011.png"], 2, "1/1", id="a-whole-shard-fewer"),
        pytest.param(["more.png"], 3, "1/2", id="one-more-while-parts-are-counted"),
    ],
)
def test_a_folder_that_changes_while_it_is_listed_is_named_and_prepared_the_next_time(
    ftk, workspace, recovers, tmp_path, meanwhile, names, listing, part
):
    source = in_folder(tmp_path / "s", captioned(12))
    run_file = run_file_over(workspace, source, max_reject_fraction=1.0)

    def change() -> None:
        for name in names:
            (source / name).unlink() if (source / name).exists() else (source / name).write_bytes(flat(20))

    meanwhile(change, listing=listing)
    result = ftk("prepare", run_file, "--part", part)
    assert result.code == 2
    assert f"{source} changed while prepare was listing it. Finished shards are kept: run the command again." in result.err
    recovers(run_file)


def test_files_that_go_or_change_after_the_listing_are_noticed_at_once_or_the_next_time(
    ftk, workspace, recovers, tmp_path, meanwhile, monkeypatch
):
    # So that signatures are believed: it is they that must tell.
    monkeypatch.setattr(locations, "FRESH_SECONDS", 0.0)
    source = in_folder(tmp_path / "s", captioned(12))
    run_file = run_file_over(workspace, source, max_reject_fraction=1.0)

    def change() -> None:
        (source / "006.png").unlink()
        (source / "007.txt").unlink()
        (source / "008.png").write_bytes(flat(30))

    meanwhile(change, unit=2)
    report = json.loads(ftk("prepare", run_file, "--json").out)
    assert rejected(report) == {"006.png": "file_missing", "007.png": "caption_missing"}
    recovers(run_file)


@pytest.mark.parametrize("kind", ["table", "hub", "tar"])
def test_a_file_replaced_by_a_shorter_one_after_the_listing_is_named_or_read_and_the_next_run_has_all(
    ftk, workspace, recovers, tmp_path, meanwhile, kind
):
    folder, suffix = in_folder(tmp_path / "data", {}), "tar" if kind == "tar" else "parquet"

    def write(number: int, count: int) -> None:
        path = folder / f"{number}.{suffix}"
        in_tar(path, captioned(count)) if kind == "tar" else parquet(path, count, 6 * number)

    for number in range(3):
        write(number, 6)
    victim = folder / f"1.{suffix}"
    source = {"path": str(folder), **HUB} if kind == "hub" else {"path": str(folder / f"*.{suffix}")}
    run_file = workspace(data={"sources": [source], "shard_samples": 2, "workers": 1})
    # A table's units are pairs of rows, and the fifth is of rows that are gone; others read a file in one go.
    meanwhile(victim.unlink if kind == "hub" else partial(write, 1, 2), unit=5 if kind == "table" else 2)
    result = ftk("prepare", run_file)
    assert (result.code, str(victim) in result.err) == ((0, False) if kind == "tar" else (2, True))
    recovers(run_file)


# The network, and what is not there.


@pytest.fixture
def web(monkeypatch) -> Iterator[Any]:
    """A web server with half a dozen pictures."""
    pytest.importorskip("aiohttp", reason='http:// needs aiohttp: pip install "ftk[http]"')
    monkeypatch.setattr(locations, "REMOTE_WAIT_SECONDS", 0.01)
    with fault_server() as server:
        server.files = {f"/{name}": data for name, data in captioned(6).items()}
        yield server


def linked(path: Path, server: Any, query: str = "") -> Path:
    lines = [{"file_name": f"{server.url}/00{number}.png{query}", "text": f"number {number}"} for number in range(6)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_faults_of_the_network_that_pass_change_no_byte(ftk, workspace, recovers, tmp_path, web):
    web.files["/all.tar"] = in_tar(tmp_path / "all", captioned(6)).read_bytes()
    sources = [{"path": str(linked(tmp_path / "rows.jsonl", web)), "name": "a"}, {"path": f"{web.url}/all.tar", "name": "b"}]
    run_file = workspace(data={"sources": sources, "shard_samples": 4, "workers": 2})
    web.faults |= {("GET", f"/00{number}.png"): [fault] for number, fault in enumerate((503, "reset", 429, "short"))}
    web.faults["GET", "/all.tar"] = ["short", "reset", 503]
    result = ftk("prepare", run_file)
    assert result.code == 0, result.err
    assert not any(web.faults.values())
    recovers(run_file)


def test_a_network_that_stays_away_ends_in_code_4_and_the_run_is_resumed(ftk, workspace, tmp_path, web):
    for number in range(2):
        web.files[f"/{number}.tar"] = in_tar(tmp_path / str(number), captioned(3, 3 * number)).read_bytes()
    run_file = run_file_over(workspace, f"{web.url}/{{0,1}}.tar")
    web.faults["GET", "/1.tar"] = [503] * 10
    result = ftk("prepare", run_file)
    assert result.code == 4
    assert f"{web.url}/1.tar could not be read in 5 tries: HTTP 503" in result.err
    web.faults.clear()
    report = json.loads(ftk("prepare", run_file, "--json").out)
    assert (report["num_samples"], report["num_shards_reused"]) == (6, 1)


def test_the_secrets_of_links_are_neither_said_nor_written(ftk, workspace, tmp_path, web):
    del web.files["/003.png"]
    table = linked(tmp_path / "rows.jsonl", web, "?X-Amz-Signature=5ec2e7.png")
    result = ftk("prepare", run_file_over(workspace, table, max_reject_fraction=0))
    assert result.code == 3
    assert "5ec2e7" not in result.out + result.err
    for path in (tmp_path / "work").rglob("*"):
        found = str(pq.read_table(path).to_pylist()) if path.suffix == ".parquet" else path.is_file() and path.read_bytes()
        assert "5ec2e7" not in str(found), path


@pytest.mark.parametrize("kind", ["tar", "table"])
@pytest.mark.parametrize("place", ["http://5ec2e7@{host}/{file}", "http://{host}/{file}?X-Amz-Signature=5ec2e7&sig=5ec2e7"])
def test_the_secrets_of_a_source_are_in_no_name_file_or_message(ftk, workspace, tmp_path, web, kind, place):
    web.files["/all.tar"] = in_tar(tmp_path / "all", captioned(6)).read_bytes()
    web.files["/rows.jsonl"] = linked(tmp_path / "rows.jsonl", web).read_bytes()
    host = web.url.removeprefix("http://")
    path = place.format(host=host, file="all.tar" if kind == "tar" else "rows.jsonl")
    run_file = workspace(data={"sources": [{"path": path}], "max_reject_fraction": 1.0}, train={"steps": 1})
    said = [ftk(stage, run_file) for stage in ("prepare", "cache", "train")]
    assert [result.code for result in said] == [0, 0, 0]
    assert "5ec2e7" not in "".join(result.out + result.err for result in said)
    files = [path for path in (tmp_path / "work").rglob("*") if path.is_file()]
    assert {"config.yaml", "dataset.json", "cache.json"} < {path.name for path in files}
    for path in files:
        rows = str(pq.read_table(path).to_pylist()) if path.suffix == ".parquet" else ""
        assert "5ec2e7" not in path.name + rows, path
        assert b"5ec2e7" not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"path": "nothing"}, "holds no images"),
        ({"path": "photo"}, "Did you mean"),
        ({"path": "photos/*.tar"}, "matches no file"),
        ({"path": "photos/0.tar"}, "0.tar"),
        ({"path": "photos/rows.jsonl"}, "rows.jsonl does not exist"),
        ({"path": "empty.jsonl"}, "has no rows"),
        ({"path": "empty.tar"}, "The sources hold no image"),
        ({"path": "nothing", "format": "hub"}, "nothing"),
        ({"path": "photos", "captoin": "x"}, "Did you mean `caption`?"),
    ],
    ids=str,
)
def test_a_source_that_is_not_there_is_empty_or_misspelt(ftk, workspace, tmp_path, source, said):
    in_folder(tmp_path / "photos", captioned(2))
    in_folder(tmp_path / "nothing", {})
    in_tar(tmp_path / "empty", {})
    (tmp_path / "empty.jsonl").write_text("\n\n")
    result = ftk("prepare", workspace(data={"sources": [{**source, "path": str(tmp_path / source["path"])}]}))
    assert result.code == 2
    assert said in result.err
