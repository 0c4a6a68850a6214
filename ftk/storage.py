"""Commits and locks the files of a workspace, and has the hashes that name and check them.

What stages keep is written through here, and nothing else takes locks. Two kinds of files are not committed here: shards that
`cache/fetch.py` downloads, under a temporary name for which other processes wait, and what the trackers' libraries write.

Commit protocol: write to a temporary name in the same directory, flush, fsync the file, set the umask's mode, rename,
fsync the directory. A final name therefore implies a complete file. Temporary names start with `.tmp-`; `sweep` removes
those that a killed process left behind.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar

import blake3
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from ftk.errors import EnvironmentFault

Kept = TypeVar("Kept")
TEMPORARY_PREFIX = ".tmp-"
_HASH_CHUNK_BYTES = 4 << 20
_PLAIN_NAME = re.compile(r"[0-9A-Za-z_-][0-9A-Za-z_.-]{0,199}")
_LOCK_TRIES = 5
_LOCK_PAUSE_SECONDS = 0.02


def is_plain_name(name: Any) -> bool:
    """Whether a name from a file may become the name of a file in a folder of ours.

    ASCII letters, digits, `_`, `-` and dots, none of them in front: with no separator it leads nowhere else, and `..` and
    temporary names are none.
    """
    return isinstance(name, str) and _PLAIN_NAME.fullmatch(name) is not None


def plain_name(name: Any) -> str:
    """The name, which a file supplied. Every such name goes through here before it becomes a part of a path.

    Raises:
        ValueError: it is no plain name, see `is_plain_name`.
    """
    if not is_plain_name(name):
        raise ValueError(f"{str(name)[:80]!r} is not the plain name of a file")
    return str(name)


def _temporary(path: Path) -> Path:
    # Not the process id alone: two machines that write the same shard on a shared file system can have equal ones.
    return path.parent / f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}-{secrets.token_hex(4)}"


def _umask_mode() -> int:
    # The umask can only be read by setting it; it is put back at once.
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def fsync_directory(directory: Path) -> None:
    """Make a rename inside `directory` survive a power loss."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def committing(path: Path) -> Iterator[BinaryIO]:
    """Yield a writable file that becomes `path` when the block ends, and disappears when it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), _umask_mode())
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def commit_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` under the commit protocol."""
    with committing(path) as file:
        file.write(data)


def commit_json(path: Path, value: Any) -> None:
    """Write a dataclass or plain value as JSON with sorted keys."""
    commit_bytes(path, json_bytes(value))


def commit_table(path: Path, table: pa.Table) -> None:
    """Write an Arrow table as Parquet (zstd) under the commit protocol."""
    with committing(path) as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)


def table_bytes(table: pa.Table) -> bytes:
    """An Arrow table as the bytes of a Parquet file (zstd)."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue())


def json_bytes(value: Any) -> bytes:
    """A dataclass or plain value as JSON with sorted keys: equal values give equal bytes."""
    plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    return (json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


@contextlib.contextmanager
def committing_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes `path` when the block ends; its files are fsynced first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_symlink():
                continue  # what it leads to is not ours to change
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.fchmod(descriptor, _umask_mode())
                os.fsync(descriptor)
                os.close(descriptor)
            else:
                fsync_directory(file)
        fsync_directory(temporary)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
        fsync_directory(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sweep(directory: Path) -> list[str]:
    """Remove temporaries that a killed process left in `directory`; call it only while holding its lock."""
    orphans = sorted(directory.glob(f"{TEMPORARY_PREFIX}*")) if directory.is_dir() else []
    for orphan in orphans:
        shutil.rmtree(orphan) if orphan.is_dir() else orphan.unlink()
    return [orphan.name for orphan in orphans]


@contextlib.contextmanager
def lock(directory: Path, part: str = "") -> Iterator[None]:
    """Hold `directory` as its one writer; the lock dies with its holder.

    With `part`, hold only that part of it: different parts have different writers, and none of them goes together with a
    writer of the whole.

    Raises:
        EnvironmentFault: another process holds it; the message names the process.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        held.enter_context(_flock(directory / ".lock", fcntl.LOCK_SH if part else fcntl.LOCK_EX))
        if part:
            held.enter_context(_flock(directory / f".lock-{part}", fcntl.LOCK_EX))
        yield


@contextlib.contextmanager
def reading(directory: Path) -> Iterator[None]:
    """Keep writers out of `directory` while it is read, without writing anything there: also where nobody may write.

    Raises:
        EnvironmentFault: a process is writing to it; the message names the process.
    """
    whole = directory / ".lock"
    with contextlib.ExitStack() as held:
        # Writers of parts share the lock of the whole, so theirs are looked at too.
        for path in (whole, *sorted(directory.glob(".lock-*"))):
            # Without a lock file nobody has written here; one that may not be opened is not this user's to wait for.
            with contextlib.suppress(FileNotFoundError, PermissionError):
                if not _is_locked(held.enter_context(path.open("rb")), fcntl.LOCK_SH):
                    raise _being_written(whole)
        yield


def holder(directory: Path) -> str | None:
    """Which process writes to `directory` now, as it called itself; None when no process does."""
    try:
        with (directory / ".lock").open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return file.read().decode(errors="replace").strip() or "another process"
    except (FileNotFoundError, PermissionError):
        return None
    return None


@contextlib.contextmanager
def _flock(path: Path, mode: int) -> Iterator[None]:
    with path.open("a+") as file:
        if not _is_locked(file, mode):
            raise _being_written(path)
        if not is_at(file, path):
            raise EnvironmentFault(f"{path.parent} was set aside or removed by another process just now. Start again.")
        # Of those that share a lock each is named in its part's.
        if mode == fcntl.LOCK_EX:
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


def _is_locked(file: IO[Any], mode: int) -> bool:
    """Take the lock if nobody holds it. Who asks whose it is holds it too, for a moment, so it is tried a few times."""
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(file, mode | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            time.sleep(_LOCK_PAUSE_SECONDS)
        else:
            return True
    return False


@contextlib.contextmanager
def locked(path: Path, waits: bool = True) -> Iterator[io.FileIO | None]:
    """The file at `path`, created if need be, open and locked; None when it is locked elsewhere and `waits` is False.

    For short exclusive work between threads and processes, which wait for each other; `lock` is for writers, of which a
    second one is refused. It may be removed or renamed while it is held: whoever waited for it then locks the new one.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with os.fdopen(descriptor, "r+b", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            try:
                # Who held it before may have removed or renamed it.
                if is_at(file, path):
                    yield file
                    return
            finally:
                # Closing is not enough: a forked child would hold it on.
                fcntl.flock(file, fcntl.LOCK_UN)


def is_at(file: IO[Any], path: Path) -> bool:
    """Whether an open file is still the one at a path: its folder may have been renamed between opening and locking."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _being_written(path: Path) -> EnvironmentFault:
    """The error for whoever meets a lock that another process holds."""
    return EnvironmentFault(
        f"{path.parent} is being written by {_holder(path)}. Wait for it to end, or use another --workspace or run name."
    )


def _holder(path: Path) -> str:
    """Who holds a lock: of the whole, or of any part."""
    for candidate in (*sorted(path.parent.glob(f"{path.name}-*")), path):
        with candidate.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return file.read().strip() or "another process"
    return "another process"


def read_json(path: Path) -> Any:
    """Parse a JSON file; `FileNotFoundError` and `ValueError` reach the caller, who knows what it should be."""
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("it is nested too deep") from None


_adapters: dict[type[Any], Any] = {}


def checked(kind: type[Kept], plain: Any) -> Kept:
    """A dataclass of `ftk.contracts` from its JSON tree, every value of its field's type.

    Raises:
        ValueError: a field is missing or of another type; the message names the first.
    """
    # Light modules are imported without pydantic.
    from pydantic import TypeAdapter, ValidationError

    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(kind)
    try:
        value: Kept = _adapters[kind].validate_python(plain)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise ValueError(f"`{where}`: {problem['msg'][0].lower()}{problem['msg'][1:]}") from None
    return value


def read_table(path: Path | pa.NativeFile, columns: list[str] | None = None, dictionary: Sequence[str] = ()) -> pa.Table:
    """Read a Parquet file, or some of its columns, as an Arrow table; `dictionary` columns keep each value once.

    Without threads and read-ahead a column comes in one piece, with no copy of it beside.
    """
    names = [name for name in dictionary if name in pq.read_schema(path).names] if dictionary else None
    if isinstance(path, pa.NativeFile):
        path.seek(0)
    with pq.ParquetFile(path, read_dictionary=names, pre_buffer=False, page_checksum_verification=True) as file:
        return file.read(columns, use_threads=False)


_NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "9p", "lustre", "beegfs", "ceph", "gpfs", "afs", "fuse", "virtiofs", "glusterfs")


def is_network(path: Path) -> bool:
    """Whether a path lies on a network or user-space file system, where a mapped file can vanish under its reader."""
    place = path.resolve()
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    kind = next((mounts[parent] for parent in (place, *place.parents) if parent in mounts), "")
    return kind.startswith(_NETWORK_FILE_SYSTEMS)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def blake3_file(path: Path) -> str:
    """BLAKE3 of a file's bytes, read in chunks."""
    hasher = blake3.blake3()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()


def digest(value: Any, length: int = 32) -> str:
    """BLAKE3 of a plain value's canonical JSON (sorted keys), as `length` hex digits."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return blake3.blake3(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:length]


def item_checksum(*buffers: memoryview | bytes) -> bytes:
    """XXH3-128 of one cached item's tensors, in the order given: a flipped bit is found when the item is read."""
    hasher = xxhash.xxh3_128()
    for buffer in buffers:
        hasher.update(buffer)
    return hasher.digest()


def canonical_safetensors(payload: bytes, metadata: Mapping[str, str]) -> bytes:
    """Rewrite a safetensors payload's header with `metadata` and every key sorted.

    `safetensors` keeps metadata in a hash map, so two equal files can differ in the order of their header's keys; a file
    named by its hash, or compared after a resume, may not. Format: 8 bytes little-endian header length, JSON, data.
    """
    (header_bytes,) = struct.unpack("<Q", payload[:8])
    header = json.loads(payload[8 : 8 + header_bytes])
    header["__metadata__"] = dict(metadata)
    if not metadata:
        del header["__metadata__"]
    encoded = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded + payload[8 + header_bytes :]
