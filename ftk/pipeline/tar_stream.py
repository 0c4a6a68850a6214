"""Reads a tar from a stream, front to back, so that any damage is an error that names the place.

tarfile, and so webdataset's reader on top of it, takes a damaged header for the end of the tar, believes the sizes that
headers claim, and in its streaming mode verifies no checksum of gzip.
"""

import contextlib
import gzip
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, cast

from ftk import locations
from ftk.errors import SourceError

_CHUNK_BYTES = 1 << 20
# No honest header is longer (a PAX header holds names); a hostile one must not decide how much is read at once.
_MAX_READ_BYTES = _CHUNK_BYTES
# What tarfile and gzip let through when the bytes make no sense to them.
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ArithmeticError, LookupError, ValueError, RecursionError)


class _Forward:
    """The unpacked bytes of a tar as tarfile reads them: forward only, in bounded reads; keeps what the last one gave."""

    def __init__(self, stream: IO[bytes]) -> None:
        head = b""
        while len(head) < 2 and (piece := stream.read(2 - len(head))):
            head += piece
        joined = cast(IO[bytes], _Joined(head, stream))
        self._stream = gzip.GzipFile(fileobj=joined, mode="rb") if head == b"\x1f\x8b" else joined
        self._position = 0
        self.last = b""
        self.ended = False

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return False

    def seek(self, position: int) -> int:
        if position < self._position:
            raise tarfile.StreamError("a header points backwards")
        while self._position < position and self.read(min(_CHUNK_BYTES, position - self._position)):
            pass
        return self._position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_READ_BYTES:
            raise tarfile.StreamError(f"a header claims to be {size:,} bytes long")
        pieces: list[bytes] = []
        missing = size
        while missing and (piece := self._stream.read(missing)):
            pieces.append(piece)
            missing -= len(piece)
        self.last = b"".join(pieces)
        self.ended = missing > 0
        self._position += len(self.last)
        return self.last


class _Joined:
    """A stream with the bytes that were taken off its front put back."""

    def __init__(self, head: bytes, stream: IO[bytes]) -> None:
        self._head = head
        self._stream = stream

    def read(self, size: int) -> bytes:
        if not self._head:
            return self._stream.read(size)
        given, self._head = self._head[:size], self._head[size:]
        return given


class Tar:
    """A tar's members in order. tarfile takes any damage behind the first header for the end; here it is an error."""

    def __init__(self, location: str, stream: IO[bytes]) -> None:
        self._location = location
        self._stream = stream
        self._forward: _Forward | None = None
        self._archive: tarfile.TarFile | None = None
        self._member: str | None = None

    def next(self) -> tarfile.TarInfo | None:
        """The next member, or None at the mark of the tar's end."""
        with self._sound():
            if self._forward is None or self._archive is None:
                self._forward = _Forward(self._stream)
                fileobj = cast(IO[bytes], self._forward)
                self._archive = tarfile.TarFile(fileobj=fileobj, mode="r", encoding="utf-8", errors="surrogateescape")
            member = self._archive.next()
            # It would keep every member's header.
            self._archive.members.clear()  # type: ignore[attr-defined]
            if member is None:
                self._check_end(self._forward)
            else:
                self._member = member.name
        return member

    def read(self, member: tarfile.TarInfo) -> bytes:
        """The bytes of the member that `next` gave last."""
        assert self._archive is not None
        with self._sound():
            file = self._archive.extractfile(member)
            assert file is not None
            return b"".join(iter(lambda: file.read(_CHUNK_BYTES), b""))

    def read_if(self, member: tarfile.TarInfo, num_bytes: int, accepts: Callable[[bytes], bool]) -> bytes | None:
        """As `read`, if `accepts` takes the first `num_bytes`; else None, and no more is read."""
        assert self._archive is not None
        with self._sound():
            file = self._archive.extractfile(member)
            assert file is not None
            head = file.read(num_bytes)
            return head + b"".join(iter(lambda: file.read(_CHUNK_BYTES), b"")) if accepts(head) else None

    def _check_end(self, forward: _Forward) -> None:
        """Raise unless tarfile stopped at a block of zeros with nothing but zeros behind it."""
        if len(forward.last) < tarfile.BLOCKSIZE or any(forward.last):
            raise tarfile.ReadError("a header there is damaged")
        while chunk := forward.read(_CHUNK_BYTES):
            if chunk.count(0) != len(chunk):
                forward.ended = False
                raise tarfile.ReadError("there is more behind the mark of its end")

    @contextlib.contextmanager
    def _sound(self) -> Iterator[None]:
        try:
            yield
        except _DAMAGE as error:
            position = self._forward.tell() if self._forward is not None else 0
            broken_off = isinstance(error, EOFError) or (self._forward is not None and self._forward.ended)
            what = "it breaks off there, without the mark of a tar's end" if broken_off else str(error)
            if isinstance(error, RecursionError):
                what = "too many extended headers follow each other"
            where = f"in or after its member {self._member}" if self._member else "before its first member"
            raise SourceError(
                f"data.sources: {locations.printable(locations.redacted(self._location))} is damaged "
                f"{locations.printable(where)}, at byte {position:,} (unpacked): {what}. "
                "Download it again, or pack it anew; then run the command again."
            ) from None
