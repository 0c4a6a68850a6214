"""Reads what a location names: a local path or an fsspec URL.

Sources open their files here alone, except datasets of the Hub, which the `datasets` library opens.

A network that fails is never a file that is missing: it is tried again, and then ends the run as `EnvironmentFault`.
"""

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
from typing import Any, BinaryIO, Literal, TypeVar

import braceexpand
import tenacity

from ftk import redirects
from ftk.errors import ConfigError, EnvironmentFault, FtkError

LOGGER = logging.getLogger("ftk")
FRESH_SECONDS = 2.0
"""A local file that changed so lately can change again within the clock's grain and leave no trace: its signature equals
none. The change time is the kernel's own: unlike the modification time no program sets it back."""
REMOTE_TRIES = 5
REMOTE_WAIT_SECONDS = 0.5
"""Before the second try; it doubles from try to try, and up to as much is added at random."""

_STREAM_BYTES = 8 << 20
_SEEK_BYTES = 1 << 20
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HTTP = ("http", "https")
_EXTRAS = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http"}
_RETRIED_STATUSES = frozenset({408, 409, 412, 416, 425, 429})
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
    path = location.removeprefix("file://")
    return Path(path).expanduser() if path.startswith("~") else Path(path)


class NotAFileError(OSError):
    """A folder, FIFO, device or socket stands where a file should."""


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
    return _URL.match(location) is not None and not location.startswith("file://")


def join(root: str, relative: str) -> str:
    """The location of `relative` below a local folder or URL; `relative` may climb with `..` but is never absolute."""
    if not is_url(root):
        return f"{root.rstrip('/')}/{relative}"
    scheme, _, top = root.partition("://")
    if scheme in _HTTP:
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
    path = path.partition("?")[0] if scheme in _HTTP else path
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"


def file_name(location: str) -> str:
    """The last part of a location, printable: no folder, and of a URL no query, which may hold a secret."""
    path = location.partition("?")[0] if is_url(location) else location
    return printable(path.rpartition("/")[2])


def read_bytes(location: str, max_bytes: int | None = None) -> bytes:
    """A file's bytes, at most the first `max_bytes` of them.

    Raises:
        FileNotFoundError: there is none.
        NotAFileError: there is something else under this name.
        OSError: it cannot be read, now or later.
        EnvironmentFault: the network or the disk failed; trying again may help.
    """
    if is_url(location):
        return _remote(location, lambda filesystem, path: _whole(filesystem, path, max_bytes))
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


def _whole(filesystem: Any, path: str, max_bytes: int | None) -> bytes:
    if "http" in filesystem.protocol:
        # aiohttp holds the body to its own Content-Length: asking for the size first would double the requests.
        body: bytes = filesystem.cat_file(path)
        return body[:max_bytes]
    # An earlier listing may know another size than the file has now, and opened files check the entity tag.
    filesystem.invalidate_cache(path)
    with filesystem.open(path, "rb", cache_type="none") as file:
        info = _file_info(getattr(file, "details", None) or filesystem.info(path))
        size = info["size"] if max_bytes is None else min(info["size"], max_bytes)
        data = bytes(file.read(size)) if size else b""
    if len(data) != size:
        raise ShortBodyError(f"{len(data):,} bytes arrived of {size:,}")
    return data


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

    scheme = location.partition("://")[0]
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
        raise ConfigError(f"{redacted(location)}: {what}. Use a local path or a URL that fsspec knows.") from None
    return filesystem, path


def _remote(location: str, call: Callable[[Any, str], Result]) -> Result:
    """What `call(filesystem, path)` gives, tried again when it may help; every failure comes out as `read_bytes` says."""

    def forget(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        LOGGER.warning("%s: %s; trying again", redacted(location), _what(error) if error else "failed")
        _filesystem(location)[0].invalidate_cache()

    trying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: _kind(error) == "transient"),
        stop=tenacity.stop_after_attempt(REMOTE_TRIES),
        wait=tenacity.wait_exponential(multiplier=REMOTE_WAIT_SECONDS, max=30) + tenacity.wait_random(0, REMOTE_WAIT_SECONDS),
        before_sleep=forget,
        reraise=True,
    )
    try:
        return trying(lambda: call(*_filesystem(location)))
    except (FtkError, NotAFileError):
        raise
    except Exception as error:
        # Not `from error`: its text may hold the URL with its secrets.
        raise _explained(location, error) from None


def _explained(location: str, error: Exception) -> Exception:
    url, what, kind = redacted(location), _what(error), _kind(error)
    scheme = location.partition("://")[0]
    if kind == "missing":
        return FileNotFoundError(errno.ENOENT, "does not exist", url)
    if kind == "denied":
        return EnvironmentFault(f"{url}: access was denied ({what}). {_ACCESS_ADVICE.get(scheme, 'Check your credentials')}.")
    if kind == "refused" and scheme in _HTTP:
        return OSError(errno.EIO, f"cannot be fetched ({what})", url)
    if kind == "unknown":
        return error
    tries = f" in {REMOTE_TRIES} tries" if kind == "transient" else ""
    return EnvironmentFault(
        f"{url} could not be read{tries}: {what}. Check the network and the URL, and run the command again: "
        f"what is done is kept."
    )


def _what(error: BaseException) -> str:
    status = _http_status(error)
    error = _cause(error)
    first_line = f"{type(error).__name__}: {error}".partition("\n")[0]
    return f"HTTP {status}" if status else redacted(first_line).rstrip(": ")


def _http_status(error: BaseException | None) -> int | None:
    """The status that a client library's error, or its cause, speaks of."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            response = response.get("ResponseMetadata", {})
            status = response.get("HTTPStatusCode")
        else:
            status = getattr(error, "status", None) or getattr(response, "status_code", None)
        if isinstance(status, int) and status:
            return status
        error = error.__cause__
    return None


def _cause(error: BaseException) -> BaseException:
    """fsspec says FileNotFoundError of whatever made its HEAD fail: the cause tells."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _kind(error: BaseException) -> Literal["missing", "denied", "refused", "transient", "unknown"]:
    error = _cause(error)
    if isinstance(error, (FtkError, NotAFileError, IsADirectoryError)):
        return "unknown"
    status = _http_status(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "missing"
    if isinstance(error, PermissionError) or status in (401, 403, 407) or "Credential" in type(error).__name__:
        return "denied"
    if isinstance(error, ValueError) or "Validation" in type(error).__name__:
        return "refused"
    if status and status < 500 and status not in _RETRIED_STATUSES:
        return "refused"
    # Each client library has errors of its own, and another tomorrow: what Python itself does not raise is the network's.
    of_library = type(error).__module__ != "builtins"
    return "transient" if status or of_library or isinstance(error, (OSError, EOFError)) else "unknown"
