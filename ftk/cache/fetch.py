"""Reads a cache on object storage: its shards are fetched into a local folder, ahead of need and within a bound.

The folder mirrors the cache's tree. A file gets its name only after its checksum was seen to hold, so its size tells that it
is whole. A shard that is being fetched lies under a temporary name, as long as it will be, locked by whoever fetches it: by
the file system alone, threads and processes that share the folder wait for each other and count the room that others take.
"""

import atexit
import contextlib
import io
import logging
import math
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import blake3
import pyarrow as pa

from ftk import locations, storage
from ftk.cache import shards, view
from ftk.contracts import CacheManifest
from ftk.errors import CacheError, ConfigError, EnvironmentFault, FtkError
from ftk.progress import human_bytes

LOGGER = logging.getLogger("ftk")

_THREADS = 4
_TRIES = 3
_CHUNK_BYTES = 8 << 20
_CLOSE_SECONDS = 2.0
_ROOM_SECONDS = 0.05
# How fine the times are by which processes tell each other what they use.
_TOUCH_NS = 1_000_000_000
_OPEN_LOCK, _ROOM_LOCK = ".open.lock", ".room.lock"
_COPY_AGAIN = "Run `ftk verify` on the cache's directory, and copy it there again."


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """Where shards of a remote cache are kept, and how many bytes of them at most."""

    directory: Path = Path("~/.cache/ftk")
    max_bytes: int = 64 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """A file of the cache: where it is, where it goes, and what it must be. Of a table the size is not known."""

    url: str
    path: Path
    blake3: str
    bytes: int | None = None

    def is_there(self) -> bool:
        """Whether the local file is whole."""
        with contextlib.suppress(FileNotFoundError):
            return self.path.stat().st_size == self.bytes
        return False


@dataclass(frozen=True, slots=True)
class _Kept:
    """A shard in the local folder, and when it was used last."""

    path: Path
    bytes: int
    used_ns: int


class _MissingError(CacheError):
    """The server does not have a file."""


class _ClosedError(Exception):
    """The shards were closed while one of them was fetched."""


class RemoteShards:
    """Shards of a remote cache. Threads may share it; a forked process opens one of its own, with the same folder.

    `on_removed` is called with each shard that this object has removed to make room: to whoever has it open it stays
    readable, and occupies the disk.
    """

    # An open file that was removed still occupies the disk.
    max_open = 64

    def __init__(self, url: str, folder: Path, table: pa.Table, max_bytes: int) -> None:
        self.on_removed: Callable[[int], None] = lambda _: None
        self._folder = folder
        self._max_bytes = max_bytes
        self._files = _shard_files(url, folder, table)
        self._rows = {file.path: row for row, file in enumerate(self._files)}
        self._sizes: list[int] = table["bytes"].to_pylist()
        self._used_ns: dict[Path, int] = {}
        self._wanted: frozenset[Path] = frozenset()
        self._queue: deque[int] = deque()
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        # While Python ends, the network fails in ways that mean nothing.
        atexit.register(self._closed.set)
        self._require_room_for_each(url)
        self._make_room(0, is_needed=True)
        self._announce(url)

    def path(self, shard: int) -> Path:
        """A local file with the shard, fetched if it is not there; another process may remove it again at any time.

        Raises:
            CacheError: what the server has is not this shard.
            EnvironmentFault: the network or the local disk failed.
        """
        while not self._files[shard].is_there():
            self._fetch(shard, is_needed=True)
        self.used(shard)
        return self._files[shard].path

    def advice(self, path: Path) -> str:
        """Files that were fetched are fetched again."""
        return f"Delete {path}: it is fetched again."

    def used(self, shard: int) -> None:
        """The shard is used now: others are removed before it."""
        path, now = self._files[shard].path, time.time_ns()
        if now // _TOUCH_NS != self._used_ns.get(path, 0) // _TOUCH_NS:
            with _disk(path), contextlib.suppress(FileNotFoundError):
                os.utime(path, ns=(now, now))
        self._used_ns[path] = now

    def ahead(self, wanted: Sequence[int]) -> None:
        """Fetch these shards in this order in the background, as many as fit in half of the bound.

        They take the place of those of an earlier call that are not begun. A failure is logged, and `path` tries again.
        """
        room, near = self._max_bytes // 2, []
        for shard in dict.fromkeys(wanted):
            room -= self._sizes[shard]
            if room < 0:
                break
            near.append(shard)
        absent = deque(shard for shard in near if not self._files[shard].is_there())
        with self._changed:
            if self._closed.is_set():
                return
            self._wanted = frozenset(self._files[shard].path for shard in near)
            self._queue = absent
            if absent and not self._threads:
                self._threads = [threading.Thread(target=self._work, name="ftk-fetch", daemon=True) for _ in range(_THREADS)]
                for thread in self._threads:
                    thread.start()
            self._changed.notify_all()

    def close(self) -> None:
        """Stop fetching ahead. A thread that waits for the network ends when it answers, and keeps no process alive."""
        with self._changed:
            self._closed.set()
            atexit.unregister(self._closed.set)
            self._changed.notify_all()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _require_room_for_each(self, url: str) -> None:
        largest = max(self._sizes, default=0)
        if largest > self._max_bytes:
            raise ConfigError(
                f"cache.download_gib allows {self._max_bytes:,} bytes, but the largest shard of {locations.redacted(url)} has "
                f"{largest:,}. Set it to {_gib(2 * largest)} or more; {_gib(sum(self._sizes))} holds the whole cache."
            )

    def _announce(self, url: str) -> None:
        place, bound, total = locations.redacted(url), human_bytes(self._max_bytes), sum(self._sizes)
        absent = total - sum(size for file, size in zip(self._files, self._sizes, strict=True) if file.is_there())
        LOGGER.info(
            "%s: %s of %s are still to be fetched into %s, which keeps %s at most.",
            *(place, human_bytes(absent), human_bytes(total), self._folder, bound),
        )
        if total > self._max_bytes:
            LOGGER.warning(
                "%s is larger (%s) than cache.download_gib allows (%s): shards are removed and fetched again while samples "
                "are read in random order. Set it to %s if the disk has room for it.",
                *(place, human_bytes(total), bound, _gib(total)),
            )
        free, need = shutil.disk_usage(self._folder).free, min(absent, self._max_bytes - (total - absent))
        if need > free:
            LOGGER.warning(
                "%s has %s free, but %s may be fetched into it. Free some, or set cache.download_dir to another disk or "
                "cache.download_gib lower.",
                *(self._folder, human_bytes(free), human_bytes(need)),
            )

    def _work(self) -> None:
        while (shard := self._next()) is not None:
            try:
                if not self._files[shard].is_there():
                    self._fetch(shard, is_needed=False)
            except _ClosedError:
                return
            except FtkError as error:
                if self._closed.is_set():
                    return
                LOGGER.warning("%s It is tried again when it is needed.", error)

    def _next(self) -> int | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed.is_set())
            return None if self._closed.is_set() else self._queue.popleft()

    def _fetch(self, shard: int, is_needed: bool) -> None:
        """Fetch a shard; when it is not needed yet, only if nobody else is at it and there is room."""
        file, room_lock = self._files[shard], self._folder / _ROOM_LOCK
        temporary = file.path.with_name(storage.TEMPORARY_PREFIX + file.path.name)
        with _disk(file.path), contextlib.ExitStack() as held:
            # Whoever looks for orphans locks them for a moment: who does not wait must not meet that.
            with contextlib.nullcontext() if is_needed else storage.locked(room_lock):
                claim = held.enter_context(_claimed(temporary, is_needed))
            if claim is None or file.is_there() or not self._reserve(claim, self._sizes[shard], is_needed):
                return
            _download(file, claim, (lambda: False) if is_needed else self._closed.is_set)
            os.fsync(claim.fileno())
            # Under the lock, so that whoever adds up the folder finds the file under one of its names.
            with storage.locked(room_lock):
                temporary.replace(file.path)
            storage.fsync_directory(file.path.parent)

    def _reserve(self, claim: io.FileIO, num_bytes: int, is_needed: bool) -> bool:
        """Make the claimed file as long as it will be, after removing what must go for it."""
        while True:
            with storage.locked(self._folder / _ROOM_LOCK):
                removed = self._make_room(num_bytes, is_needed)
                if removed is not None:
                    claim.truncate(num_bytes)
            for path in removed or []:
                self._used_ns.pop(path, None)
                if path in self._rows:
                    self.on_removed(self._rows[path])
            if removed is not None or not is_needed:
                return removed is not None
            # Others that are being fetched take the room: they can go when they are whole.
            time.sleep(_ROOM_SECONDS)

    def _make_room(self, num_bytes: int, is_needed: bool) -> list[Path] | None:
        """Remove the least recently used shards, those wanted next last and only for what is needed; None: no room."""
        kept, being_fetched = self._scan()
        wanted = self._wanted
        excess = being_fetched + sum(file.bytes for file in kept) + num_bytes - self._max_bytes
        removable = [file for file in kept if is_needed or file.path not in wanted]
        if excess > sum(file.bytes for file in removable):
            return None
        removed = []
        for file in sorted(removable, key=lambda file: (file.path in wanted, file.used_ns)):
            if excess <= 0:
                break
            file.path.unlink(missing_ok=True)
            removed.append(file.path)
            excess -= file.bytes
        return removed

    def _scan(self) -> tuple[list[_Kept], int]:
        """The shards in the folder, and the bytes of those being fetched. What a killed process left is removed."""
        kept, being_fetched = [], 0
        for path in self._folder.glob(f"*/*/*{shards.SHARD}"):
            with contextlib.suppress(FileNotFoundError):
                if path.name.startswith(storage.TEMPORARY_PREFIX):
                    being_fetched += _bytes_of_living(path)
                else:
                    status = path.stat()
                    used_ns = max(status.st_mtime_ns, self._used_ns.get(path, 0))
                    kept.append(_Kept(path, status.st_size, used_ns))
        return kept, being_fetched


def open_remote(url: str, download: Download) -> tuple[CacheManifest, dict[str, pa.Table], RemoteShards]:
    """The manifest, the tables and the shards of the cache at a URL.

    Raises:
        CacheError: it is missing, unfinished or damaged.
        ConfigError: a shard alone is larger than what may be kept.
        EnvironmentFault: the network or the local disk failed.
    """
    # Without user name, password and signature: they change while the cache stays, and have no place in a name.
    name = storage.digest(locations.redacted(url.partition("?")[0] if _is_web(url) else url).rstrip("/"))
    folder = download.directory.expanduser().absolute() / name
    with _disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with storage.locked(folder / _OPEN_LOCK):
            manifest, tables = _mirror(url, folder)
            with storage.locked(folder / _ROOM_LOCK):
                return manifest, tables, RemoteShards(url, folder, tables["shards"], download.max_bytes)


def _mirror(url: str, folder: Path) -> tuple[CacheManifest, dict[str, pa.Table]]:
    """The newest view, its files in the local folder; those of views before are removed."""
    storage.sweep(folder)
    storage.sweep(folder / "view")
    before = None
    while True:
        manifest = _fetch_manifest(url, folder)
        try:
            paths = [_fetch_table(url, folder, name, digest) for name, digest in manifest.tables.items()]
        except _MissingError:
            # Another view may have taken the place of this one since its manifest was read.
            if manifest == before:
                raise
            before = manifest
        else:
            break
    for path in set((folder / "view").glob("*.parquet")).difference(paths):
        path.unlink()
    return manifest, view.read_tables(folder, manifest)


def _fetch_manifest(url: str, folder: Path) -> CacheManifest:
    damage = ""
    for _ in range(_TRIES):
        storage.commit_bytes(folder / view.MANIFEST, _manifest_bytes(url))
        try:
            manifest = view.read_manifest(folder)
        except view.NewerCacheError:
            raise
        except CacheError as error:
            damage = str(error)
            continue
        if manifest:
            return manifest
    raise CacheError(f"{locations.redacted(_below(url, view.MANIFEST))} cannot be used. {damage}")


def _manifest_bytes(url: str) -> bytes:
    location = _below(url, view.MANIFEST)
    try:
        return locations.read_bytes(location)
    except FileNotFoundError:
        raise CacheError(
            f"{locations.redacted(url)} holds no finished cache. Run `ftk cache RUN.yaml` and copy the directory there."
        ) from None
    except OSError as error:
        raise CacheError(f"{locations.redacted(location)} cannot be read: {error.strerror or error}.") from None


def _fetch_table(url: str, folder: Path, name: str, digest: str) -> Path:
    path = view.table_path(folder, name, digest)
    if not path.is_file() or storage.blake3_file(path) != digest:
        file = _File(url=_below(url, f"view/{path.name}"), path=path, blake3=digest)
        with storage.committing(path) as temporary:
            _download(file, temporary, lambda: False)
    return path


def _shard_files(url: str, folder: Path, table: pa.Table) -> list[_File]:
    files = []
    # A table from elsewhere must not name a file outside of the folder.
    if problem := view.shards_problem(table):
        raise CacheError(f"{locations.redacted(url)}: {problem}. {_COPY_AGAIN}")
    for row in table.select(["kind", "fingerprint", "name", "bytes", "blake3"]).to_pylist():
        relative = f"{row['kind']}/{row['fingerprint']}/{row['name']}{shards.SHARD}"
        files.append(_File(url=_below(url, relative), path=folder / relative, blake3=row["blake3"], bytes=row["bytes"]))
    return files


def _download(wanted: _File, file: BinaryIO | io.FileIO, is_stopped: Callable[[], bool]) -> None:
    """Write the file at a URL into an open one, again when something else arrives than was wanted."""
    url, expected = locations.redacted(wanted.url), f"BLAKE3 {wanted.blake3}"
    if wanted.bytes is not None:
        expected = f"{wanted.bytes:,} bytes with {expected}"
    for _ in range(_TRIES):
        try:
            found = _copy(wanted, file, is_stopped)
        except FileNotFoundError:
            raise _MissingError(f"{url} is missing: the copy of the cache there is not whole. {_COPY_AGAIN}") from None
        except OSError as error:
            raise CacheError(f"{url} cannot be read: {error.strerror or error}.") from None
        if not found:
            return
        LOGGER.warning("%s: expected %s, found %s", url, expected, found)
    raise CacheError(f"{url} is damaged: expected {expected}, found {found}, {_TRIES} times. {_COPY_AGAIN}")


def _copy(wanted: _File, file: BinaryIO | io.FileIO, is_stopped: Callable[[], bool]) -> str:
    """What arrived instead of the wanted file; nothing when it was that."""
    hasher, num_bytes = blake3.blake3(), 0
    with _disk(wanted.path):
        file.seek(0)
        file.truncate(wanted.bytes or 0)
    with locations.open_stream(wanted.url) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            if is_stopped():
                raise _ClosedError
            num_bytes += len(chunk)
            if wanted.bytes is not None and num_bytes > wanted.bytes:
                return f"more than {wanted.bytes:,} bytes"
            hasher.update(chunk)
            with _disk(wanted.path):
                _write(file, chunk)
    is_same = hasher.hexdigest() == wanted.blake3 and wanted.bytes in (None, num_bytes)
    return "" if is_same else f"{num_bytes:,} bytes with BLAKE3 {hasher.hexdigest()}"


def _write(file: BinaryIO | io.FileIO, chunk: bytes) -> None:
    # A file without a buffer may take a part, as when the disk is nearly full.
    rest = memoryview(chunk)
    while rest:
        rest = rest[file.write(rest) :]


@contextlib.contextmanager
def _claimed(path: Path, waits: bool) -> Iterator[io.FileIO | None]:
    """The temporary file at `path` for its one writer, removed unless it got another name; None when there is another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with storage.locked(path, waits) as file:
        try:
            if file is not None:
                file.truncate(0)
            yield file
        finally:
            if file is not None and storage.is_at(file, path):
                path.unlink()


def _bytes_of_living(path: Path) -> int:
    """The size of a temporary file that is being written; one that nobody writes is removed."""
    with storage.locked(path, waits=False) as orphan:
        if orphan is None:
            return path.stat().st_size
        path.unlink()
        return 0


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """What fails in the block is the local disk."""
    try:
        yield
    except OSError as error:
        raise EnvironmentFault(
            f"{path} cannot be written: {error.strerror or error}. Free some space, or set cache.download_dir to another disk "
            f"or cache.download_gib lower."
        ) from error


def _is_web(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _below(url: str, relative: str) -> str:
    """The URL of a file of the cache. What a web address has after `?`, a signature say, goes with each file."""
    top, mark, query = url.partition("?") if _is_web(url) else (url, "", "")
    return locations.join(top, relative) + mark + query


def _gib(num_bytes: int) -> str:
    """A value of `cache.download_gib` that holds so many bytes."""
    return f"{math.ceil(num_bytes / (1 << 30) * 1000) / 1000:g}"
