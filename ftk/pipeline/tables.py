"""Reads tables row by row: JSON Lines, CSV, TSV and Parquet, from a path or URL. A table is its user's own file: what is
malformed is an error that names the line, not a reject."""

import csv
import json
import posixpath
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ftk import locations
from ftk.errors import SourceError, did_you_mean

SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_MAX_LINE_BYTES = 16 << 20
_ROWS_LOOKED_AT = 1000
"""Of JSON Lines, for the names of the columns: any row may leave some of them out."""
_BATCH_ROWS = 4096
_PARQUET_BUFFER_BYTES = 4 << 20

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenTable:
    """A table that is being read: its columns; its rows, of some columns at least, each with the words by which its owner
    finds it; and its Parquet file if it is one."""

    location: str
    columns: list[str]
    rows: Callable[[Sequence[str]], Iterator[tuple[str, Row]]]
    parquet: Any = None


@contextmanager
def open_table(location: str) -> Iterator[OpenTable]:
    """Raise `SourceError` when the table is missing or malformed, also while its rows are read."""
    opened = locations.open_seekable if _suffix(location) == ".parquet" else locations.open_stream
    with _explained(location), opened(location) as file:
        yield _open(location, file)


@contextmanager
def open_table_in(location: str, file: BinaryIO) -> Iterator[OpenTable]:
    """As `open_table`, of an open file; its name tells its kind."""
    with _explained(location):
        yield _open(location, file)


def _suffix(location: str) -> str:
    suffix = posixpath.splitext(location.partition("?")[0] if locations.is_url(location) else location)[1].lower()
    if suffix not in SUFFIXES:
        raise SourceError(f"data.sources: {shown(location)} is no table (known: {', '.join(SUFFIXES)}).")
    return suffix


def _open(location: str, file: BinaryIO) -> OpenTable:
    suffix = _suffix(location)
    if suffix == ".parquet":
        return _parquet(location, file)
    return _json_lines(location, file) if suffix in (".jsonl", ".ndjson") else _csv(location, file, suffix)


@contextmanager
def _explained(location: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise SourceError(f"data.sources: {shown(location)} does not exist.{nearest(location)} Name a table.") from None
    except OSError as error:
        raise SourceError(f"data.sources: {shown(location)} cannot be read: {error.strerror or error}.") from None
    except pa.ArrowException as error:
        raise SourceError(f"data.sources: {shown(location)} is damaged, or no Parquet file: {error}") from None


def _parquet(location: str, file: BinaryIO) -> OpenTable:
    # A buffer makes it read a column page by page, and not all of a row group's images at once.
    parquet = pq.ParquetFile(file, buffer_size=_PARQUET_BUFFER_BYTES, pre_buffer=False)
    columns = parquet.schema_arrow.names
    if (doubled := _doubled(columns)) is not None:
        raise SourceError(f"data.sources: {shown(location)} has two columns called {doubled!r}. Rename one.")

    def rows(columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
        for number, row in enumerate(parquet_rows(parquet, columns, _BATCH_ROWS)):
            yield f"row {number} of {locations.file_name(location)}", row

    return OpenTable(location=location, columns=columns, rows=rows, parquet=parquet)


def _doubled(columns: Sequence[str]) -> str | None:
    return next((name for name in dict.fromkeys(columns) if columns.count(name) > 1), None)


def _json_lines(location: str, file: BinaryIO) -> OpenTable:
    rows = _json_rows(location, file)
    first = list(islice(rows, _ROWS_LOOKED_AT))
    columns = list(dict.fromkeys(name for _, row in first for name in row))
    return OpenTable(location=location, columns=columns, rows=lambda _: chain(first, rows))


def _json_rows(location: str, file: BinaryIO) -> Iterator[tuple[str, Row]]:
    for number, text in _text_lines(location, file):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _malformed(location, number, f"is not JSON: {error}. Each line must be one object") from None
        if not isinstance(row, dict):
            raise _malformed(location, number, f"holds {type(row).__name__}, not an object with a value for each column")
        yield f"line {number} of {locations.file_name(location)}", row


def _csv(location: str, file: BinaryIO, suffix: str) -> OpenTable:
    csv.field_size_limit(_MAX_LINE_BYTES)
    reader = csv.reader(
        (text for _, text in _text_lines(location, file)), delimiter="\t" if suffix == ".tsv" else ",", strict=True
    )
    rows = _csv_rows(location, reader)
    columns = [name.strip() for name in next(rows, (0, []))[1]]
    if (doubled := _doubled(columns)) is not None:
        raise _malformed(location, 1, f"names the column {doubled!r} twice: rename one")

    def checked(_: Sequence[str]) -> Iterator[tuple[str, Row]]:
        for number, cells in rows:
            if len(cells) != len(columns):
                what = f"has {len(cells)} fields where the header has {len(columns)}: quote texts that hold a separator"
                raise _malformed(location, number, what)
            yield f"line {number} of {locations.file_name(location)}", dict(zip(columns, cells, strict=True))

    return OpenTable(location=location, columns=columns, rows=checked)


def _csv_rows(location: str, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Each row that is not blank, and the line it begins on."""
    line = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise _malformed(location, line, f"is not CSV: {error}") from None
        if cells is None:
            return
        if cells:
            yield line, cells
        line = reader.line_num + 1


def _text_lines(location: str, file: BinaryIO) -> Iterator[tuple[int, str]]:
    number = 0
    while data := file.readline(_MAX_LINE_BYTES + 1):
        number += 1
        if len(data) > _MAX_LINE_BYTES:
            raise _malformed(location, number, f"is longer than {_MAX_LINE_BYTES >> 20} MiB")
        try:
            yield number, data.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _malformed(location, number, f"is not UTF-8 at its byte {error.start}: save the table as UTF-8") from None


def _malformed(location: str, line: int, what: str) -> SourceError:
    return SourceError(f"data.sources: {shown(location)}: line {line} {what}.")


def parquet_rows(parquet: Any, columns: Sequence[str], batch_rows: int, groups: tuple[int, ...] | None = None) -> Iterator[Row]:
    """Some columns of a Parquet file, of all row groups or some."""
    for batch in parquet.iter_batches(batch_size=batch_rows, row_groups=groups, columns=list(columns)):
        yield from batch.to_pylist()


def shown(location: str) -> str:
    """A location for messages."""
    return locations.redacted(locations.printable(location))


def nearest(location: str) -> str:
    """Which table beside a missing one might have been meant."""
    if locations.is_url(location):
        return ""
    path = locations.local_path(location)
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    tables = (name for name in names if name.lower().endswith(SUFFIXES))
    return locations.printable(did_you_mean(path.name, tables, str(path.parent)))
