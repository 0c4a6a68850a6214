"""Zips of images, with a caption file beside each as in a folder, or with a table that names them; never extracted.

A member's name is only ever text here, and a table's row can name members alone: `../a` and `/a` lead nowhere. A member
that is damaged, encrypted or larger than images are is a reject; the other members are read all the same.
"""

import contextlib
import io
import posixpath
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Any, BinaryIO

from pydantic import BaseModel, Field

from ftk import locations, storage
from ftk.configs.schema import SourceConfig
from ftk.contracts import Reject, RejectReason
from ftk.errors import SourceError
from ftk.pipeline import captions, sidecars, tables
from ftk.pipeline.captions import Problem
from ftk.pipeline.labels import is_null
from ftk.pipeline.sources import table, webdataset
from ftk.pipeline.sources.base import Blob, Notes, Partition, Record, beside
from ftk.pipeline.sources.folder import TABLES, CaptionSuffixes
from ftk.pipeline.table_files import has_image_suffix, several

MAX_TABLE_BYTES = 512 << 20
_CHUNK_BYTES = 1 << 20
_ENCRYPTED = 0x1
# What zipfile lets through when the bytes make no sense to it.
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, LookupError, OverflowError)

Entry = tuple[int, str, int | None]
"""An image of a zip without a table: its place in the zip's directory, its name, and its caption file's place."""
Row = tuple[str, str, tuple[str, ...], tuple[str, str] | None, str | None, tuple[tuple[str, ...], ...]]
"""A table's row: its identity; its image's name; its captions; or why it can be no sample; its mask's name (None where none
is asked for) and its controls', all as names of members."""


class ZipSettings(table.ColumnSettings):
    """What is written for a zip: how its caption files end, or which columns its table has."""

    caption_suffix: CaptionSuffixes = Field(
        default=sidecars.SUFFIXES, min_length=1, description="how caption files end, the first that is there"
    )
    caption_lines: bool = Field(default=False, description="each line of a .txt or .caption is a caption of its own")


class Zip:
    """Runs of images or rows of one zip; a pattern such as `photos/*.zip` names many."""

    Settings: type[BaseModel] = ZipSettings

    def accepts(self, path: str) -> bool:
        """By the suffix."""
        return locations.without_secrets(path).lower().endswith(".zip")

    def partitions(self, config: SourceConfig, settings: ZipSettings, shard_samples: int) -> Iterator[Partition]:
        """Runs of `shard_samples` images or rows of one zip, in the order of their names, or of the table."""
        places = locations.expand(config.path)
        if not places:
            raise SourceError(f"data.sources: no zip matches {tables.shown(config.path)}. Name one.")
        for location, name in zip(places, webdataset.names_of(places), strict=True):
            with _opened(location) as archive:
                signature = locations.signature(location)
                last: Partition | None = None
                for kind, batch, notes in _batches(config, settings, archive, shard_samples):
                    if last is not None:
                        yield last
                    digest = storage.digest([name, signature, kind, batch])
                    last = Partition(
                        payload=(location, name, kind, batch), signature=digest, num_records=len(batch), notes=notes()
                    )
                if last is None:
                    raise SourceError(_no_images(location, archive))
                yield last

    def read(self, config: SourceConfig, settings: ZipSettings, partition: Partition) -> Iterator[Record | Reject]:
        """Each image or row; in memory are the members of one."""
        location, name, kind, batch = partition.payload
        with _opened(location) as archive:
            make = _image_record if kind == "images" else _row_record
            for entry in batch:
                item = make(config, settings, archive, name, entry)
                if isinstance(item, Problem):
                    path = locations.printable(f"{name}/{entry[1]}")
                    detail = locations.printable(item.detail)
                    yield Reject(source=config.source_name, path=path, reason=item.reason, detail=detail)
                else:
                    yield item


class _Archive:
    """A zip's members: names as they are written, with `/` between folders whatever the program that packed it took."""

    def __init__(self, location: str, file: BinaryIO) -> None:
        self.location = location
        self._zip = zipfile.ZipFile(file)
        self.infos = self._zip.infolist()
        self.names = [info.filename.replace("\\", "/") for info in self.infos]
        self.place_of: dict[str, int] = {}
        for place, name in enumerate(self.names):
            self.place_of.setdefault(name, place)

    def files(self) -> list[tuple[int, str]]:
        """(place, name) of what is no folder and not hidden, by folders and names; a folder comes before those in it."""
        files = [
            (place, name)
            for place, name in enumerate(self.names)
            if not self.infos[place].is_dir() and not name.endswith("/") and not _is_hidden(name)
        ]
        return sorted(files, key=lambda file: (file[1].rpartition("/")[0].split("/"), file[1].rpartition("/")[2], file[0]))

    def read(self, place: int, limit: int) -> bytes | Problem:
        """A member's bytes, or why there are none."""
        info, name = self.infos[place], self.names[place]
        if info.flag_bits & _ENCRYPTED:
            return _unreadable(f"{name} is encrypted: pack it again without a password")
        if info.file_size > limit:
            return _unreadable(f"{name} has {info.file_size:,} bytes, more than the {limit:,} that are read")
        try:
            with self._zip.open(info) as file:
                return b"".join(iter(lambda: file.read(_CHUNK_BYTES), b""))
        except _DAMAGE as error:
            what = str(error) or type(error).__name__
            return _unreadable(f"{name} is damaged, or packed in a way that is not read: {what[:200]}")


def _unreadable(detail: str) -> Problem:
    return Problem(reason=RejectReason.UNREADABLE, detail=detail)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part.strip(".") for part in name.split("/")) or name.startswith("__MACOSX/")


@contextlib.contextmanager
def _opened(location: str) -> Iterator[_Archive]:
    name = tables.shown(location)
    try:
        with locations.open_seekable(location) as file:
            try:
                archive = _Archive(location, file)
            except (*_DAMAGE, OSError) as error:
                raise SourceError(
                    f"data.sources: {name} is damaged, or not a zip: {error}. Download it again, or pack it again; then "
                    "run the command again."
                ) from None
            yield archive
    except OSError as error:
        advice = "Name a zip that exists and that you may read."
        raise SourceError(f"data.sources: {name}: {error.strerror or error}. {advice}") from None


def _batches(
    config: SourceConfig, settings: ZipSettings, archive: _Archive, shard_samples: int
) -> Iterator[tuple[str, tuple[Any, ...], Any]]:
    """(kind, entries, notes) of each partition; the notes are complete with the last."""
    table_places = [place for place, name in archive.files() if posixpath.basename(name) in TABLES]
    unmatched = sidecars.Unmatched(config.source_name)
    if table_places:
        _refuse(config, settings, ("caption_suffix", "caption_lines"), "where a table in the zip has the captions")
        seen = table.Seen()
        entries: Iterator[Any] = (row for place in table_places for row in _rows(config, settings, archive, place, seen))
    else:
        _refuse(
            config, settings, ("image", "captions", "mask", "controls"), "without a metadata.jsonl, .csv or .parquet in the zip"
        )
        entries = _images(settings, archive, unmatched)

    def notes() -> Notes:
        return Notes(num_unmatched_captions=unmatched.number, unmatched_captions=unmatched.examples())

    following = tuple(islice(entries, shard_samples))
    while batch := following:
        following = tuple(islice(entries, shard_samples))
        yield "rows" if table_places else "images", batch, Notes if following else notes


def _refuse(config: SourceConfig, settings: ZipSettings, names: Sequence[str], why: str) -> None:
    for name in names:
        if getattr(settings, name) != type(settings).model_fields[name].default:
            raise SourceError(f"data.sources: source {config.source_name}: `{name}` has no effect {why}. Leave it out.")


def _no_images(location: str, archive: _Archive) -> str:
    names = archive.names[:5]
    more = f" and {len(archive.names) - 5} more" if len(archive.names) > 5 else ""
    held = locations.printable(", ".join(names)) + more if names else "nothing"
    return f"data.sources: {tables.shown(location)} holds no images. Found: {held}. Name a zip of images."


# Images with caption files beside them.


def _images(settings: ZipSettings, archive: _Archive, unmatched: sidecars.Unmatched) -> Iterator[Entry]:
    for directory, group in groupby(archive.files(), key=lambda file: file[1].rpartition("/")[0]):
        members = list(group)
        images = [(place, name) for place, name in members if has_image_suffix(name)]
        candidates = {
            posixpath.basename(name): locations.File(location="", relative=name, signature=str(place))
            for place, name in reversed(members)
            if not has_image_suffix(name)
        }
        names = list(dict.fromkeys(posixpath.basename(name) for _, name in images))
        files = sidecars.FolderFiles(images=names, others=candidates)
        matches = sidecars.match(files, settings.caption_suffix)
        unmatched.add(f"{directory}/" if directory else "", files, matches)
        for place, name in images:
            sidecar = matches.captions.get(posixpath.basename(name))
            yield place, name, int(sidecar.signature) if sidecar else None


def _image_record(
    config: SourceConfig, settings: ZipSettings, archive: _Archive, zip_name: str, entry: Entry
) -> Record | Problem:
    place, name, sidecar = entry
    if archive.place_of[name] != place:
        return Problem(reason=RejectReason.NAME_TAKEN, detail=f"the zip has two members called {name}: rename one")
    texts = _sidecar_captions(config, settings, archive, name, sidecar)
    if isinstance(texts, Problem):
        return texts
    image = _blob(archive, name)
    if isinstance(image, Problem):
        return image
    captions_or_fallback = texts or (str(captions.fallback(config)),)
    return Record(identity=f"{zip_name}/{name}", image=image, captions=captions_or_fallback, is_fallback=not texts)


def _sidecar_captions(
    config: SourceConfig, settings: ZipSettings, archive: _Archive, name: str, sidecar: int | None
) -> tuple[str, ...] | Problem:
    has_fallback = captions.fallback(config) is not None
    if sidecar is None and has_fallback:
        return ()
    if sidecar is None:
        wanted = ", ".join(f"{posixpath.splitext(name)[0]}{suffix}" for suffix in settings.caption_suffix)
        return Problem(
            reason=RejectReason.CAPTION_MISSING,
            detail=f"no {wanted} in the zip, and the source has no `caption:` to fall back on",
        )
    data = archive.read(sidecar, captions.MAX_JSON_BYTES)
    if isinstance(data, Problem):
        return replace(data, reason=RejectReason.CAPTION_MISSING)
    return captions.parse(data, locations.printable(archive.names[sidecar]), settings.caption_lines, has_fallback)


def _blob(archive: _Archive, name: str) -> Blob | Problem:
    data = archive.read(archive.place_of[name], webdataset.MAX_MEMBER_BYTES)
    return data if isinstance(data, Problem) else Blob(location=f"{archive.location}#{name}", data=data)


# Images that a table names.


@dataclass(frozen=True, slots=True)
class _Named:
    """The members that a table in a zip may name: those below its own folder."""

    archive: _Archive
    folder: str

    def member(self, cell: object) -> str | None:
        """The name of the member that a cell names; as the cell has it where there is none, None where it names nothing."""
        if not isinstance(cell, str) or is_null(cell):
            return None
        name = posixpath.normpath(posixpath.join(self.folder, cell.replace("\\", "/")))
        return name if name in self.archive.place_of else cell


def _rows(config: SourceConfig, settings: ZipSettings, archive: _Archive, place: int, seen: table.Seen) -> Iterator[Row]:
    table_name = archive.names[place]
    data = archive.read(place, MAX_TABLE_BYTES)
    if isinstance(data, Problem):
        raise SourceError(f"data.sources: {tables.shown(archive.location)}: {locations.printable(data.detail)}.")
    fallback = captions.fallback(config)
    named = _Named(archive, posixpath.dirname(table_name))
    with tables.open_table_in(f"{archive.location}#{table_name}", io.BytesIO(data)) as opened:
        if not opened.columns:
            return
        columns = table.columns_of(config, settings, opened)
        for number, (where, row) in enumerate(opened.rows(columns.names)):
            record = _row(row, where, columns, named, f"{table_name}/{number}", fallback)
            yield seen.identity(record[0]), *record[1:]


def _row(row: tables.Row, where: str, columns: table.Columns, named: _Named, label: str, fallback: str | None) -> Row:
    name = named.member(row.get(columns.image))
    mask = (named.member(row.get(columns.mask)) or "") if columns.mask else None
    controls = tuple(tuple(named.member(each) or "" for each in several(row.get(column))) for column in columns.controls)
    problem = None
    texts = table.captions_of(row, where, columns, fallback)
    if name is None:
        found = locations.printable(repr(row.get(columns.image))[:100])
        problem = (RejectReason.FILE_MISSING.value, f"{columns.image} in {where} is {found}, not a file name")
    elif isinstance(texts, Problem):
        problem = (texts.reason.value, texts.detail)
    given = () if isinstance(texts, Problem) else texts
    return name or label, name or label, given, problem, mask, controls


def _row_record(config: SourceConfig, settings: ZipSettings, archive: _Archive, zip_name: str, row: Row) -> Record | Problem:
    identity, name, texts, problem, mask, controls = row
    if problem is not None:
        return Problem(reason=RejectReason(problem[0]), detail=problem[1])
    wanted = [(name, RejectReason.FILE_MISSING)]
    wanted += [] if mask is None else [(mask, RejectReason.MASK_MISSING)]
    wanted += [(each, RejectReason.CONTROL_MISSING) for names in controls for each in names]
    blobs: list[Blob] = []
    for each, reason in wanted:
        if each not in archive.place_of:
            detail = f"{each} is not a member of the zip, below the folder of its table" if each else "the row names no file"
            return Problem(reason=reason, detail=detail)
        blob = _blob(archive, each)
        if isinstance(blob, Problem):
            return blob
        blobs.append(blob)
    if not settings.optional and not all(controls):
        column = settings.controls[controls.index(())]
        return Problem(reason=RejectReason.CONTROL_MISSING, detail=f"the row has nothing under {column}")
    rest = iter(blobs[1 if mask is None else 2 :])
    return Record(
        identity=f"{zip_name}/{identity}",
        image=blobs[0],
        captions=texts or (str(captions.fallback(config)),),
        is_fallback=not texts,
        mask=blobs[1] if mask is not None else None,
        **beside(config, [[next(rest) for _ in names] for names in controls]),
    )


SOURCE = Zip()
