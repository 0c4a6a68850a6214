"""Storage: the commit protocol, locks and hashes."""

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save

from ftk import locations, storage
from ftk.contracts import Reject, RejectReason
from ftk.errors import ConfigError, EnvironmentFault

HOLD = """
import sys, time
from pathlib import Path
from ftk import locations, storage
with storage.lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


class _CrashError(Exception):
    pass


def _crash_while_committing(path: Path) -> None:
    with storage.committing(path) as file:
        file.write(b"half of it")
        raise _CrashError


def _crash_while_committing_directory(path: Path) -> None:
    with storage.committing_directory(path) as temporary:
        (temporary / "a").write_bytes(b"half of it")
        raise _CrashError


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_commit_makes_missing_folders_and_leaves_only_the_file(tmp_path: Path) -> None:
    storage.commit_bytes(tmp_path / "a" / "b" / "file", b"content")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"content"
    assert [entry.name for entry in (tmp_path / "a" / "b").iterdir()] == ["file"]


def test_a_file_under_commit_is_not_visible_under_its_name(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with storage.committing(path) as file:
        file.write(b"content")
        file.flush()
        assert not path.exists()
        assert [entry.name[: len(storage.TEMPORARY_PREFIX)] for entry in tmp_path.iterdir()] == [storage.TEMPORARY_PREFIX]
    assert path.exists()


def test_exception_while_committing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(_CrashError):
        _crash_while_committing(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_exception_while_committing_keeps_the_earlier_file(tmp_path: Path) -> None:
    storage.commit_bytes(tmp_path / "file", b"earlier")
    with pytest.raises(_CrashError):
        _crash_while_committing(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"earlier"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_value_that_is_no_json_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        storage.commit_json(tmp_path / "value.json", {"a": object()})
    assert list(tmp_path.iterdir()) == []


def test_committed_directory_replaces_the_earlier_one(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_bytes(b"")
    with storage.committing_directory(target) as temporary:
        (temporary / "nested").mkdir()
        (temporary / "nested" / "new").write_bytes(b"x")
        assert (target / "old").exists()
    assert sorted(path.relative_to(target).as_posix() for path in target.rglob("*")) == ["nested", "nested/new"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"]


def test_exception_while_committing_a_directory_leaves_the_earlier_one(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_bytes(b"kept")
    with pytest.raises(_CrashError):
        _crash_while_committing_directory(target)
    assert (target / "old").read_bytes() == b"kept"
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"]


@pytest.mark.usefixtures("umask")
def test_mode_obeys_the_umask(tmp_path: Path) -> None:
    storage.commit_bytes(tmp_path / "file", b"")
    with storage.committing_directory(tmp_path / "folder") as temporary:
        (temporary / "file").write_bytes(b"")
        (temporary / "file").chmod(0o600)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder" / "file").stat().st_mode) == 0o640
    assert os.umask(0o027) == 0o027, "committing must leave the umask as it was"


def test_equal_json_values_give_equal_bytes(tmp_path: Path) -> None:
    storage.commit_json(tmp_path / "one.json", {"b": [1, 2], "a": "é"})
    storage.commit_json(tmp_path / "two.json", {"a": "é", "b": [1, 2]})
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert "é" in (tmp_path / "one.json").read_text(encoding="utf-8")


def test_a_dataclass_is_written_as_its_fields(tmp_path: Path) -> None:
    reject = Reject(source="photos", path="a.jpg", reason=RejectReason.TRUNCATED, detail="cut")
    storage.commit_json(tmp_path / "reject.json", reject)
    assert storage.read_json(tmp_path / "reject.json") == {
        "source": "photos", "path": "a.jpg", "reason": "truncated", "detail": "cut",
    }  # fmt: skip


def test_table_round_trips(tmp_path: Path) -> None:
    table = pa.table({"key": ["a", "b"], "count": [1, 2]})
    storage.commit_table(tmp_path / "table.parquet", table)
    assert storage.read_table(tmp_path / "table.parquet").equals(table)


def test_json_of_equal_values_is_the_same_bytes() -> None:
    reject = Reject(source="photos", path="größe.jpg", reason=RejectReason.TRUNCATED, detail="cut")
    plain = {"reason": "truncated", "path": "größe.jpg", "detail": "cut", "source": "photos"}
    data = storage.json_bytes(reject)
    assert data == storage.json_bytes(plain) == storage.json_bytes(dict(reversed(plain.items())))
    assert "größe".encode() in data
    assert data.endswith(b"}\n")
    assert list(json.loads(data)) == sorted(plain)
    assert storage.json_bytes({"a": [{"c": 1, "b": 2}]}) == b'{\n  "a": [\n    {\n      "b": 2,\n      "c": 1\n    }\n  ]\n}\n'
    with pytest.raises(TypeError):
        storage.json_bytes({"a": Reject})


def test_a_committed_table_has_the_bytes_that_it_is_named_by(tmp_path: Path) -> None:
    table = pa.table({"key": ["a", "b"] * 500, "count": range(1000)})
    data = storage.table_bytes(table)
    assert data == storage.table_bytes(pa.table({"key": ["a", "b"] * 500, "count": range(1000)}))
    assert data != storage.table_bytes(table.slice(1))
    storage.commit_table(tmp_path / "table.parquet", table)
    assert (tmp_path / "table.parquet").read_bytes() == data


def test_a_table_is_read_from_a_buffer_as_from_a_file() -> None:
    table = pa.table({"key": ["a", "b", "a"], "count": [1, 2, 3], "more": [[1], [], [2, 3]]}).replace_schema_metadata(
        {"x": "y"}
    )
    data = storage.table_bytes(table)
    read = storage.read_table(pa.BufferReader(data))
    assert read.equals(table)
    assert read.schema.metadata == {b"x": b"y"}
    assert storage.read_table(pa.BufferReader(data), columns=["count"]).column_names == ["count"]
    repeated = storage.read_table(pa.BufferReader(data), dictionary=["key"])
    assert repeated.schema.field("key").type == pa.dictionary(pa.int32(), pa.string())
    assert repeated.cast(table.schema).equals(table)
    with pytest.raises(pa.ArrowInvalid):
        storage.read_table(pa.BufferReader(data[:-1]))


def test_no_thread_holds_a_buffer_that_was_read() -> None:
    """One that lets go of Python's bytes while the interpreter ends aborts the process (apache/arrow#34314)."""
    data = storage.table_bytes(pa.table({"id": ["a"] * 10}))
    before = sys.getrefcount(data)
    held = 0
    for _ in range(200):
        storage.read_table(pa.BufferReader(data))
        held += sys.getrefcount(data) != before
    assert held == 0


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("/", False),
        ("/data", False),
        ("/mnt/team/cache/latents", True),
        ("/mnt/team", True),
        ("/mnt/team/scratch/cache", False),
        ("/mnt/teams/cache", False),
        ("/lustre/cache", True),
        ("/home/me/bucket/cache", True),
        ("/home/me/cache", False),
        ("/overlay/cache", False),
    ],
)
def test_the_nearest_mount_tells_whether_files_can_vanish(monkeypatch: pytest.MonkeyPatch, place: str, expected: bool) -> None:
    mounts = {
        "/": "ext4", "/mnt/team": "nfs4", "/mnt/team/scratch": "xfs", "/lustre": "lustre", "/home/me/bucket": "fuse.gcsfuse",
        "/overlay": "overlay", "/proc": "proc",
    }  # fmt: skip
    parts = [types.SimpleNamespace(mountpoint=point, fstype=kind) for point, kind in mounts.items()]
    monkeypatch.setattr(storage.psutil, "disk_partitions", lambda all: parts)
    assert storage.is_network(Path(place)) == expected


def test_a_link_is_where_it_points(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "remote").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "remote")
    parts = [types.SimpleNamespace(mountpoint=str(tmp_path.resolve() / "remote"), fstype="nfs")]
    monkeypatch.setattr(storage.psutil, "disk_partitions", lambda all: parts)
    assert storage.is_network(tmp_path / "link" / "cache")
    assert not storage.is_network(tmp_path)


def _payload() -> tuple[dict[str, torch.Tensor], bytes]:
    tensors = {"b": torch.arange(6, dtype=torch.float32).view(2, 3), "a": torch.ones(3, dtype=torch.bfloat16)}
    return tensors, save(tensors)


def test_canonical_safetensors_round_trips(tmp_path: Path) -> None:
    tensors, payload = _payload()
    canonical = storage.canonical_safetensors(payload, {"text": "naïve", "format": "pt"})
    read = load(canonical)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert read["a"].dtype == torch.bfloat16
    (tmp_path / "file.safetensors").write_bytes(canonical)
    with safe_open(tmp_path / "file.safetensors", "pt") as file:
        assert file.metadata() == {"text": "naïve", "format": "pt"}


@pytest.mark.parametrize("metadata", [{}, {"a": "1"}, {"a": "12"}, {"a": "1", "bcd": "234567"}])
def test_canonical_safetensors_keeps_the_data_aligned(metadata: dict[str, str]) -> None:
    canonical = storage.canonical_safetensors(_payload()[1], metadata)
    (header_bytes,) = struct.unpack("<Q", canonical[:8])
    assert header_bytes % 8 == 0
    assert json.loads(canonical[8 : 8 + header_bytes]).get("__metadata__", {}) == metadata


def test_canonical_safetensors_gives_equal_bytes_whatever_the_metadata_order() -> None:
    tensors, _ = _payload()
    metadata = {str(index): str(index) for index in range(20)}
    backwards = dict(reversed(metadata.items()))
    one = storage.canonical_safetensors(save(tensors, metadata=metadata), metadata)
    two = storage.canonical_safetensors(save(dict(reversed(tensors.items())), metadata=backwards), backwards)
    assert one == two


def test_second_writer_is_told_who_holds_the_lock(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    with pytest.raises(EnvironmentFault, match=rf"process {holder.pid} on \S+"), storage.lock(tmp_path):
        pass
    assert EnvironmentFault.exit_code == 4


def test_lock_dies_with_its_killed_holder(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with storage.lock(tmp_path):
        named = (tmp_path / ".lock").read_text()
    assert named.startswith(f"process {os.getpid()} on ")
    assert str(holder.pid) not in named.split()


def test_who_asks_for_the_holder_keeps_no_writer_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with storage.lock(tmp_path):
        pass
    with contextlib.ExitStack() as asking:
        file = asking.enter_context((tmp_path / ".lock").open())
        fcntl.flock(file, fcntl.LOCK_SH)
        monkeypatch.setattr("time.sleep", lambda _: asking.close())
        with storage.lock(tmp_path):
            assert file.closed


def test_lock_is_free_again_after_its_block(tmp_path: Path) -> None:
    with pytest.raises(_CrashError), storage.lock(tmp_path / "new"):
        raise _CrashError
    with storage.lock(tmp_path / "new"):
        pass


def test_sweep_removes_temporaries_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / f"{storage.TEMPORARY_PREFIX}a-1").write_bytes(b"")
    (tmp_path / f"{storage.TEMPORARY_PREFIX}b-2").mkdir()
    (tmp_path / f"{storage.TEMPORARY_PREFIX}b-2" / "inner").write_bytes(b"")
    (tmp_path / "kept").write_bytes(b"")
    (tmp_path / ".lock").write_bytes(b"")
    assert storage.sweep(tmp_path) == [f"{storage.TEMPORARY_PREFIX}a-1", f"{storage.TEMPORARY_PREFIX}b-2"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".lock", "kept"]
    assert storage.sweep(tmp_path) == []
    assert storage.sweep(tmp_path / "missing") == []


def test_digest_depends_on_the_value_and_not_on_key_order() -> None:
    assert storage.digest({"a": 1, "b": [2, "é"]}) == storage.digest({"b": [2, "é"], "a": 1})
    values = [{"a": 1}, {"a": 2}, {"a": "1"}, ["a", 1], [["a"], 1], "a", "\udcff"]
    assert len({storage.digest(value) for value in values}) == len(values)
    assert len(storage.digest("a")) == 32
    assert storage.digest("a", 12) == storage.digest("a")[:12]


def test_digest_never_changes_between_versions() -> None:
    import blake3

    assert storage.digest({"b": 1, "a": "é"}) == blake3.blake3('{"a":"é","b":1}'.encode()).hexdigest()[:32]


def test_file_hashes_agree_with_hashes_of_the_bytes(tmp_path: Path) -> None:
    import blake3

    data = bytes(range(256)) * 20_000
    (tmp_path / "file").write_bytes(data)
    assert storage.sha256_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()
    assert storage.blake3_file(tmp_path / "file") == blake3.blake3(data).hexdigest()


def test_item_checksum_sees_a_flipped_bit_and_an_exchanged_tensor() -> None:
    one, two = bytearray(b"\0" * 64), b"\1" * 64
    whole = storage.item_checksum(bytes(one), two)
    assert storage.item_checksum(memoryview(one), memoryview(two)) == whole
    assert storage.item_checksum(two, bytes(one)) != whole
    for bit in range(8):
        one[17] ^= 1 << bit
        assert storage.item_checksum(bytes(one), two) != whole
        one[17] ^= 1 << bit


def test_object_storage_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"s3://bucket/photos.*not supported"):
        locations.local_path("s3://bucket/photos")


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locations.local_path("~/photos") == tmp_path / "photos"
