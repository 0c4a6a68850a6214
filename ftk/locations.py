"""Reads what a location names: a local path or an fsspec URL.

Sources open their files here alone, except datasets of the Hub, which the `datasets` library opens.

A network that fails is never a file that is missing: it is tried again, and then raised as `UnreachableError`.
"""

import asyncio
import contextlib
import errno
import glob
import io
import logging
import os
import posixpath
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import braceexpand
import tenacity

from ftk import redirects, remote_errors
from ftk.errors import ConfigError, EnvironmentFault, FtkError

LOGGER = logging.getLogger("ftk")
FRESH_SECONDS = 2.0
"""A local file that changed so lately can change again within the clock's grain and leave no trace: its signature equals
none. The change time is the kernel's own: unlike the modification time no program sets it back."""
REMOTE_TRIES = 5
REMOTE_WAIT_SECONDS = 0.5
"""Before the second try; it doubles from try to try, and up to as much is added at random."""
MAX_WAIT_SECONDS = 30.0
"""The longest wait between two tries. A server that asks for more in `Retry-After` is not asked again."""
FETCH_SECONDS = 90.0
"""For one file that is read whole, with all tries and waits."""

_STREAM_BYTES = 8 << 20
_SEEK_BYTES = 1 << 20
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HTTP = ("http", "https")
_EXTRAS = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http"}
_VERSION_KEYS = (
    "ETag",
    "etag",
    "blob_id",
    "md5Hash",
    "md5",
    "LastModified",
    "Last-Modified",
    "last_modified",
    "updated",
    "mtime",
)
_ACCESS_ADVICE = {
    "s3": "Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for a public bucket FSSPEC_S3_ANON=true",
    "hf": "Run `hf auth login`, and accept the repository's terms on its page if it has any",
    **dict.fromkeys(_HTTP, "Put the user name and password in ~/.netrc, or check the link's signature and date"),
}
# What says nothing of the file itself: a disk or mount that fails, or this machine being out of something.
_ENVIRONMENT_ERRNOS = frozenset(
    {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
)
_FILE_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

Result = TypeVar("Result")


def local_path(location: str) -> Path:
    """The local path that a configured location names; a URL of an object store is refused by name."""
    if is_url(location):
        raise ConfigError(f"{redacted(location)}: object storage is not supported here. Use a local or mounted folder.")
    path = location[len("file://") :] if scheme_of(location) == "file" else location
    return Path(path).expanduser() if path.startswith("~") else Path(path)


class NotAFileError(OSError):
    """A folder, FIFO, device or socket stands where a file should."""


class BadUrlError(ConfigError, OSError):
    """No file system can be made of a URL: of a table's row, a reason to reject it."""


class RefusedError(OSError):
    """A server answers, but with a status that says that asking again will not help."""

    @property
    def detail(self) -> str:
        """Why, without the URL."""
        return str(self.strerror)


class UnreachableError(EnvironmentFault):
    """A remote file was not given: access was denied, or every try failed. `detail` says why, without the URL."""

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


class ShortBodyError(OSError):
    """Fewer or more bytes arrived than the listing promised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One file below a root: where it is, its path below the root with `/`, and its signature."""

    location: str
    relative: str
    signature: str


def is_url(location: str) -> bool:
    """Whether fsspec reads this location; `file://` is a local path."""
    return _URL.match(location) is not None and scheme_of(location) != "file"


def scheme_of(location: str) -> str:
    """What stands before `://`, in small letters as servers and fsspec know it; empty for a path."""
    match = _URL.match(location)
    return match[0].removesuffix("://").lower() if match else ""


def is_web(location: str) -> bool:
    """Whether a web server gives this location."""
    return scheme_of(location) in _HTTP


def join(root: str, relative: str) -> str:
    """The location of `relative` below a local folder or URL; `relative` may climb with `..` but is never absolute."""
    if not is_url(root):
        return f"{root.rstrip('/')}/{relative}"
    scheme, _, top = root.partition("://")
    if is_web(root):
        relative = relative.replace("?", "%3F").replace("#", "%23")
    below = f"{top.rstrip('/')}/{relative}"
    # Object stores take `..` for a name. Doubled slashes are part of a key, and kept where nothing climbs.
    climbs = any(part in (".", "..") for part in relative.split("/"))
    return f"{scheme}://{posixpath.normpath(below) if climbs else below}"


def printable(name: str) -> str:
    """A name for messages and tables: bytes that are no UTF-8, and lone surrogates, are written as escapes."""
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return name.encode("utf-8", "backslashreplace").decode()


def redacted(text: str) -> str:
    """`text` without what may be a secret in its URLs: user name and password, and the query."""
    return re.sub(r"(://[^\s?'\"]+)\?[^\s'\"]*", r"\1?***", re.sub(r"(?<=://)[^/@\s]+@", "***@", text))


def without_secrets(location: str) -> str:
    """A location without what may be a secret in a URL: what names of sources and samples are made from."""
    if not is_url(location):
        return location
    scheme, _, rest = location.partition("://")
    authority, slash, path = rest.partition("/")
    path = path.partition("?")[0] if is_web(location) else path
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"


def file_name(location: str) -> str:
    """The last part of a location, printable: no folder, and of a URL no query, which may hold a secret."""
    path = location.partition("?")[0] if is_url(location) else location
    return printable(path.rpartition("/")[2])


def read_bytes(location: str, max_bytes: int | None = None, seconds: float = FETCH_SECONDS) -> bytes:
    """A file's bytes, at most the first `max_bytes` of them.

    Args:
        seconds: how long a remote file may take, with all tries.

    Raises:
        FileNotFoundError: there is none.
        NotAFileError: there is something else under this name.
        RefusedError: a server refuses to give it, now and later.
        OSError: it cannot be read, now or later.
        UnreachableError: access was denied, or the network failed; trying again later may help.
        EnvironmentFault: the disk failed.
    """
    if is_url(location):
        end = time.monotonic() + seconds
        with _UNCONNECTED.watched(location) as tries:
            return _remote(location, lambda filesystem, path: _whole(filesystem, path, max_bytes, end), tries, seconds)
    with _opened(location) as file:
        return file.read(-1 if max_bytes is None else max_bytes)


@contextlib.contextmanager
def open_stream(location: str) -> Iterator[BinaryIO]:
    """A large file, to be read from its beginning to its end; raises as `read_bytes`, also while it is read."""
    with _opened(location) if not is_url(location) else io.BufferedReader(_RemoteFile(location), _STREAM_BYTES) as file:
        yield file


@contextlib.contextmanager
def open_seekable(location: str) -> Iterator[BinaryIO]:
    """A large file, to be read here and there; raises as `read_bytes`, also while it is read."""
    with _opened(location) if not is_url(location) else io.BufferedReader(_RemoteFile(location), _SEEK_BYTES) as file:
        yield file


def signature(location: str) -> str:
    """Changes whenever the file might have changed; raises as `read_bytes`.

    Local: size, times and inode; of a file that changed just now, never the same twice. Remote: size, and the entity tag,
    version or time of change if there is one.
    """
    if is_url(location):
        return _version(_remote(location, lambda filesystem, path: filesystem.info(path)))
    return _stat_signature(_stat(location))


def list_files(root: str) -> Iterator[File]:
    """Every file below a folder, hidden ones left out; a folder's files, by their names' bytes, come before its folders.

    Holds one folder's names at a time, or on a remote file system all of them. Links are followed, but not in circles.

    Raises:
        FileNotFoundError, NotADirectoryError, PermissionError: the folder, or one in it, cannot be listed.
        EnvironmentFault: the network or the disk failed.
    """
    return _remote_files(root) if is_url(root) else _local_files(root)


def expand(pattern: str) -> list[str]:
    """The locations that a path or URL with `{00..99}`, `{a,b}` and `*` stands for, those of a `*` sorted.

    What holds no `*` is taken at its word: it need not exist.
    """
    if not is_url(pattern) and local_path(pattern).exists():
        return [pattern]
    try:
        locations = list(braceexpand.braceexpand(pattern, escape=False))
    except ValueError:  # unbalanced: a brace that is part of the name
        locations = [pattern]
    found = [item for location in locations for item in (_glob(location) if "*" in location else [location])]
    return list(dict.fromkeys(found))


def _glob(pattern: str) -> list[str]:
    # Of a glob's special characters only the asterisk: [ and ? are common in names and URLs.
    if is_url(pattern):
        return sorted(_remote(pattern, _remote_glob), key=_name_bytes)
    escaped = glob.escape(str(local_path(pattern))).replace("[*]", "*")
    return sorted(glob.glob(escaped, recursive=True), key=os.fsencode)  # noqa: PTH207 (Path.glob drops the pattern's own prefix)


def _remote_glob(filesystem: Any, path: str) -> list[str]:
    escaped = path if "http" in filesystem.protocol else path.replace("[", "[[]").replace("?", "[?]")
    try:
        return [filesystem.unstrip_protocol(name) for name in filesystem.glob(escaped)]
    except ValueError as error:
        raise ConfigError(f"{redacted(path)}: {error}.") from None


def _name_bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")


def _stat(location: str) -> os.stat_result:
    try:
        with _local_faults(location):
            return local_path(location).stat()
    except ValueError:
        # NUL, or a lone surrogate: the operating system is not even asked.
        raise FileNotFoundError(errno.ENOENT, "no file can have this name", printable(location)) from None


def _stat_signature(status: os.stat_result) -> str:
    if time.time() - status.st_ctime < FRESH_SECONDS:
        return f"fresh-{secrets.token_hex(8)}"
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}-{status.st_ino}"


@contextlib.contextmanager
def _local_faults(location: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _ENVIRONMENT_ERRNOS:
            raise
        raise EnvironmentFault(
            f"{printable(location)} cannot be read: {error.strerror}. Check the disk or mount, and run the command again."
        ) from error


@contextlib.contextmanager
def _opened(location: str) -> Iterator[BinaryIO]:
    mode = _stat(location).st_mode
    if not stat.S_ISREG(mode):
        what = next((name for is_kind, name in _FILE_KINDS if is_kind(mode)), "no regular file")
        raise NotAFileError(errno.EINVAL, f"is {what}, not a file", printable(location))
    with _local_faults(location):
        # Without O_NONBLOCK, a FIFO that has just taken the file's place would be waited for.
        descriptor = os.open(local_path(location), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            yield file


def _local_files(root: str) -> Iterator[File]:
    top = _stat(root)
    waiting = [("", frozenset({(top.st_dev, top.st_ino)}))]
    while waiting:
        directory, above = waiting.pop()
        folders = []
        with _local_faults(root), os.scandir(local_path(join(root, directory))) as scan:
            entries = sorted(
                (entry for entry in scan if not entry.name.startswith(".")), key=lambda entry: os.fsencode(entry.name)
            )
        for entry in entries:
            status = _entry_status(entry)
            if status is None or not stat.S_ISDIR(status.st_mode):
                yield File(
                    location=join(root, directory + entry.name),
                    relative=directory + entry.name,
                    signature="missing" if status is None else _stat_signature(status),
                )
            # A link to a folder that it lies in would be followed round and round.
            elif (place := (status.st_dev, status.st_ino)) not in above:
                folders.append((f"{directory}{entry.name}/", above | {place}))
        waiting.extend(reversed(folders))


def _entry_status(entry: "os.DirEntry[str]") -> os.stat_result | None:
    """None for a link that leads nowhere."""
    try:
        return entry.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise


def _remote_files(root: str) -> Iterator[File]:
    def find(filesystem: Any, path: str) -> list[File]:
        filesystem.invalidate_cache()
        top = path.rstrip("/") + "/"
        return [
            File(location=join(root, name.removeprefix(top)), relative=name.removeprefix(top), signature=_version(info))
            for name, info in filesystem.find(path, detail=True).items()
            if info["type"] == "file" and name.startswith(top) and len(name) > len(top)
        ]

    def order(file: File) -> tuple[list[bytes], bytes]:
        *folders, name = _name_bytes(file.relative).split(b"/")
        return folders, name

    visible = (file for file in _remote(root, find) if not any(part.startswith(".") for part in file.relative.split("/")))
    yield from sorted(visible, key=order)


def _version(info: dict[str, Any]) -> str:
    # The first that is there: what HEAD and a listing say of one file differs in the rest.
    found = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")
    return f"{info.get('size')}-{found}"


class _Unconnected:
    """Hosts to which this process could not connect in any of its tries: they get one try a file until one succeeds."""

    def __init__(self) -> None:
        self._hosts: set[str] = set()

    @contextlib.contextmanager
    def watched(self, location: str) -> Iterator[int]:
        """The number of tries for a file; how its reading ends tells about its host."""
        host = location.partition("://")[2].partition("/")[0].rpartition("@")[2]
        try:
            yield 1 if host in self._hosts else REMOTE_TRIES
        except UnreachableError as error:
            if any(kind in error.detail for kind in remote_errors.NO_CONNECTION):
                self._hosts.add(host)
            raise
        self._hosts.discard(host)


_UNCONNECTED = _Unconnected()


def _whole(filesystem: Any, path: str, max_bytes: int | None, end: float) -> bytes:
    if "http" in filesystem.protocol:
        # aiohttp holds the body to its own Content-Length: asking for the size first would double the requests.
        return _web_body(filesystem, path, end)[:max_bytes]
    # An earlier listing may know another size than the file has now, and opened files check the entity tag.
    filesystem.invalidate_cache(path)
    with filesystem.open(path, "rb", cache_type="none") as file:
        info = _file_info(getattr(file, "details", None) or filesystem.info(path))
        size = info["size"] if max_bytes is None else min(info["size"], max_bytes)
        data = bytes(file.read(size)) if size else b""
    if len(data) != size:
        raise ShortBodyError(f"{len(data):,} bytes arrived of {size:,}")
    return data


def _web_body(filesystem: Any, path: str, end: float) -> bytes:
    """The body, if all of it has come by `end`, a time of the monotonic clock: some servers send a byte a minute."""
    import fsspec.asyn

    async def fetch() -> bytes:
        async with asyncio.timeout(end - time.monotonic()):
            body: bytes = await filesystem._cat_file(path)
            return body

    fetched: bytes = fsspec.asyn.sync(filesystem.loop, fetch)
    return fetched


def _file_info(info: dict[str, Any]) -> dict[str, Any]:
    if info["type"] != "file":
        raise NotAFileError(errno.EINVAL, "is a folder, not a file", info["name"])
    return info


class _RemoteFile(io.RawIOBase):
    """A remote file read by ranges, each tried again by itself; one that changes meanwhile is refused."""

    def __init__(self, location: str) -> None:
        self._location = location
        self._position = 0
        self._file: Any = None
        info = _remote(location, self._fresh_info)
        self._version = _version(info)
        if info["size"] is None or info.get("partial") is False:
            self._file = _remote(location, _spooled)
            info["size"] = self._file.seek(0, os.SEEK_END)
        self._size: int = info["size"]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = max(0, offset + (0, self._position, self._size)[whence])
        return self._position

    def readall(self) -> bytes:
        # The base class would ask for 8 KiB at a time.
        return self.read(max(0, self._size - self._position)) or b""

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        length = max(0, min(len(view), self._size - self._position))
        if length:
            view[:length] = _remote(self._location, lambda filesystem, path: self._range(filesystem, path, length))
        self._position += length
        return length

    def close(self) -> None:
        if self._file is not None and not self.closed:
            self._file.close()
        super().close()

    @staticmethod
    def _fresh_info(filesystem: Any, path: str) -> dict[str, Any]:
        filesystem.invalidate_cache(path)
        return _file_info(dict(filesystem.info(path)))

    def _range(self, filesystem: Any, path: str, length: int) -> bytes:
        if self._file is None:
            info = self._fresh_info(filesystem, path)
            if _version(info) != self._version:
                raise EnvironmentFault(
                    f"{redacted(self._location)} has changed while it was being read. Run the command again."
                )
            # As s3fs does by itself. A weak tag never matches.
            tag = str(info.get("ETag", "W/")) if "http" in filesystem.protocol else "W/"
            options = {} if tag.startswith("W/") else {"headers": {"If-Match": tag}}
            self._file = filesystem.open(path, "rb", cache_type="none", **options)
        file, self._file = self._file, None  # what has failed is opened anew
        try:
            file.seek(self._position)
            data: bytes = file.read(length)
        except ValueError:
            if "http" not in filesystem.protocol:
                raise
            # How fsspec says that a web server gives no ranges: the file is fetched whole.
            file = _spooled(filesystem, path)
            file.seek(self._position)
            data = file.read(length)
        if len(data) != length:
            raise ShortBodyError(f"{len(data):,} bytes arrived of {length:,}")
        self._file = file
        return data


def _spooled(filesystem: Any, path: str) -> Any:
    """A remote file as a temporary local one, for web servers that only give whole files."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 (its reader closes it)
    with filesystem.open(path, "rb", block_size=0) as remote:
        shutil.copyfileobj(remote, file, _SEEK_BYTES)
    return file


def _filesystem(location: str) -> tuple[Any, str]:
    """fsspec's own cache makes one instance a process: none crosses a fork."""
    import fsspec
    import fsspec.config

    scheme = scheme_of(location)
    location = scheme + location[len(scheme) :]
    options: dict[str, Any] = {}
    try:
        if scheme in _HTTP and "client_kwargs" not in fsspec.config.conf.get(scheme, {}):
            import aiohttp

            # A size only tells something of a body that is not compressed on its way. Proxies and ~/.netrc count.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
            options["client_kwargs"] = {
                "headers": {"Accept-Encoding": "identity"}, "timeout": timeout, "trust_env": True,
                "trace_configs": [redirects.trace()],
            }  # fmt: skip
        filesystem, path = fsspec.url_to_fs(location, **options)
    except ImportError as error:
        package = f'pip install "ftk[{_EXTRAS[scheme]}]"' if scheme in _EXTRAS else str(error)
        raise ConfigError(f"{redacted(location)}: the package that reads {scheme}:// is not installed: {package}") from None
    except (ValueError, TypeError, OSError) as error:
        # TypeError: a file system that a URL alone does not describe, as `reference://`. OSError: an archive that is not there.
        what = redacted(str(error).partition("\n")[0])
        raise BadUrlError(f"{redacted(location)}: {what}. Use a local path or a URL that fsspec knows.") from None
    return filesystem, path


def _remote(location: str, call: Callable[[Any, str], Result], tries: int = 0, seconds: float | None = None) -> Result:
    """What `call(filesystem, path)` gives, tried again when it may help; every failure comes out as `read_bytes` says.

    Args:
        tries: 0 for `REMOTE_TRIES`.
        seconds: no try begins later.
    """

    def forget(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        # Of one file among many there may be many such lines; what fails in the end is told.
        level = logging.WARNING if seconds is None else logging.INFO
        LOGGER.log(level, "%s: %s; trying again", redacted(location), _what(error) if error else "failed")
        _filesystem(location)[0].invalidate_cache()

    tries = tries or REMOTE_TRIES
    late = tenacity.stop_before_delay(seconds) if seconds is not None else tenacity.stop_never
    trying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_passes),
        stop=tenacity.stop_any(tenacity.stop_after_attempt(tries), late),
        wait=_wait,
        before_sleep=forget,
        reraise=True,
    )
    try:
        return trying(lambda: call(*_filesystem(location)))
    except (FtkError, NotAFileError):
        raise
    except Exception as error:
        # Not `from error`: its text may hold the URL with its secrets.
        raise _explained(location, error, int(trying.statistics.get("attempt_number", tries))) from None


def _passes(error: BaseException) -> bool:
    """Whether to try again soon."""
    passing = remote_errors.kind(error) == "transient" and not isinstance(error, NotAFileError)
    return passing and remote_errors.asked_wait(error) <= MAX_WAIT_SECONDS


def _what(error: BaseException) -> str:
    return redacted(remote_errors.what(error))


def _wait(state: tenacity.RetryCallState) -> float:
    """Seconds before the next try: doubling, or longer where the server asks for it."""
    doubling = tenacity.wait_exponential(multiplier=REMOTE_WAIT_SECONDS, max=MAX_WAIT_SECONDS)
    error = state.outcome.exception() if state.outcome else None
    return max(doubling(state) + tenacity.wait_random(0, REMOTE_WAIT_SECONDS)(state), remote_errors.asked_wait(error))


def _explained(location: str, error: Exception, tries: int) -> Exception:
    url, what, kind = redacted(location), _what(error), remote_errors.kind(error)
    scheme = scheme_of(location)
    if kind == "missing":
        return FileNotFoundError(errno.ENOENT, "does not exist", url)
    if kind == "denied":
        advice = _ACCESS_ADVICE.get(scheme, "Check your credentials")
        return UnreachableError(f"{url}: access was denied ({what}). {advice}.", f"access was denied ({what})")
    if kind == "refused" and scheme in _HTTP:
        kind_of_error = OSError if isinstance(error, ValueError) else RefusedError
        return kind_of_error(errno.EIO, f"cannot be fetched ({what})", url)
    if kind == "unknown":
        return error
    wait = remote_errors.asked_wait(error)
    what += f"; the server asks to wait {wait:,.0f} s" if wait > MAX_WAIT_SECONDS else ""
    in_tries = f" in {tries} tries" if kind == "transient" and tries > 1 else ""
    return UnreachableError(
        f"{url} could not be read{in_tries}: {what}. Check the network and the URL, and run the command again: "
        f"what is done is kept.",
        what + in_tries,
    )
