"""Tables (JSON Lines, CSV, TSV, Parquet) that name images, as Hugging Face's imagefolder does, or in Parquet hold them."""

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Annotated, Any

import pyarrow as pa
from pydantic import BaseModel, Field

from ftk import locations, storage
from ftk.configs.schema import SourceConfig
from ftk.contracts import Reject, RejectReason
from ftk.errors import SourceError, did_you_mean
from ftk.pipeline import captions, labels, table_files, tables
from ftk.pipeline.sources.base import Blob, MayLack, Partition, Place, Record, beside
from ftk.pipeline.table_files import TableFiles, several

IMAGE_COLUMNS = ("file_name", "image", "path", "url")
CAPTION_COLUMNS = ("text", "caption", "prompt", "captions")
_BATCH_IMAGES = 16

Entry = tuple[str, str, tuple[str, ...], tuple[str, str] | None, str | None, tuple[str | tuple[str, ...], ...]]
"""A row in a partition: its identity; its file name; its captions; or why it can be no sample; its mask's file
name (None where none is asked for) and its controls', several of a column that holds a list, and empty where there is none."""


class ColumnSettings(MayLack):
    """Which columns of a table are what."""

    image: str | None = Field(default=None, description="column of file names, URLs or image bytes")
    captions: tuple[str, ...] = Field(
        default=(), description="columns of captions; text, caption, prompt or captions by default"
    )
    mask: str | None = Field(default=None, description="column of masks")
    controls: tuple[str, ...] = Field(default=(), description="columns of control images, each a name or a list of names")


class TableSettings(ColumnSettings):
    """What is written for a table, beside the fields of every source."""

    root: Annotated[str | None, Place()] = Field(
        default=None, min_length=1, description="where file names start; the table's folder by default"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The columns of a table that are read: those that the settings name, or the defaults that the table has."""

    image: str
    captions: tuple[str, ...]
    mask: str | None
    controls: tuple[str, ...]
    labels: labels.Labels

    @property
    def by_role(self) -> tuple[str | None, ...]:
        return (self.image, self.mask, *self.controls)

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([*self.of_files, *self.captions]))

    @property
    def of_files(self) -> list[str]:
        return [column for column in self.by_role if column]


class Table:
    """Rows in their order; several tables in the order of their names."""

    Settings: type[BaseModel] = TableSettings

    def accepts(self, path: str) -> bool:
        """By the suffix."""
        return (path.partition("?")[0] if locations.is_url(path) else path).lower().endswith(tables.SUFFIXES)

    def partitions(self, config: SourceConfig, settings: TableSettings, shard_samples: int) -> Iterator[Partition]:
        """Runs of `shard_samples` rows of one table, which carry the rows themselves; of image bytes, whole row groups."""
        found = 0
        seen = Seen()
        for label, location in _tables(config).items():
            with tables.open_table(location) as table:
                if not table.columns:
                    continue
                columns = columns_of(config, settings, table)
                holds_bytes = table.parquet and _holds_bytes(table.parquet, columns)
                cut = _row_groups if holds_bytes else partial(_runs, seen)
                for partition in cut(config, settings, table, columns, label, shard_samples):
                    found += partition.num_records or 0
                    yield partition
        if not found:
            raise SourceError(f"data.sources: {tables.shown(config.path)} has no rows. Name a table of images and captions.")

    def read(self, config: SourceConfig, settings: TableSettings, partition: Partition) -> Iterator[Record | Reject]:
        """Each row, as a record or a reject."""
        kind, *payload = partition.payload
        return (_read_rows if kind == "rows" else _read_row_groups)(config, settings, *payload)


def _tables(config: SourceConfig) -> dict[str, str]:
    """The tables by what their rows are called after: the stem, or where two are equal the path below a common folder."""
    found = locations.expand(config.path)
    if not found:
        raise SourceError(f"data.sources: no table matches {tables.shown(config.path)}.{tables.nearest(config.path)} Name one.")
    names = [locations.without_secrets(location) for location in found]
    stems = [posixpath.splitext(name)[0].rpartition("/")[2] for name in names]
    if len(set(stems)) == len(stems):
        return dict(zip(stems, found, strict=True))
    parts = [name.split("/") for name in names]
    common = next(index for index, each in enumerate(zip(*parts, strict=False)) if len(set(each)) > 1)
    return {"/".join(each[common:]): location for each, location in zip(parts, found, strict=True)}


# Rows that name files.


class Seen:
    """Names that rows have used: several rows may name one file, each with a caption of its own."""

    def __init__(self) -> None:
        self._times: dict[int, int] = {}

    def identity(self, name: str) -> str:
        """The name, and from the second time on the number of the time."""
        # What follows the ? of a URL is often a signature that expires, or a secret.
        name = locations.without_secrets(name)
        # 8 bytes of hash for a name: a table can have more rows than there is room for their names.
        short = int(storage.digest(name, 16), 16)
        times = self._times[short] = self._times.get(short, 0) + 1
        return name if times == 1 else f"{name}#{times}"


def _runs(
    seen: Seen,
    config: SourceConfig,
    settings: TableSettings,
    table: tables.OpenTable,
    columns: Columns,
    label: str,
    shard_samples: int,
) -> Iterator[Partition]:
    fallback = captions.fallback(config)
    files = TableFiles(_root(settings, table.location))
    rows = enumerate(table.rows(columns.names))
    entries = (_entry(row, where, columns, f"{label}/{number}", fallback, files) for number, (where, row) in rows)
    named = ((seen.identity(entry[0]), *entry) for entry in entries)
    while batch := tuple(islice(named, shard_samples)):
        names = [each for _, name, _, _, mask, controls in batch for each in (name, mask, *_flat(controls)) if each]
        signature = storage.digest([batch, files.signatures(names)])
        yield Partition(payload=("rows", table.location, batch), signature=signature, num_records=len(batch))


def _flat(controls: tuple[str | tuple[str, ...], ...]) -> Iterator[str]:
    for names in controls:
        yield from (names,) if isinstance(names, str) else names


def _entry(row: tables.Row, where: str, columns: Columns, label: str, fallback: str | None, files: TableFiles) -> Any:
    name, mask = (files.name(row.get(column)) if column else None for column in (columns.image, columns.mask))
    controls = tuple(_control_names(row.get(column), files) for column in columns.controls)
    others = None if columns.mask is None else mask or "", tuple("" if names is None else names for names in controls)
    if name is None:
        found = locations.printable(repr(row.get(columns.image))[:100])
        problem = (RejectReason.FILE_MISSING.value, f"{columns.image} in {where} is {found}, not a file name")
        return label, (), problem, *others
    if None in controls:
        column = columns.controls[controls.index(None)]
        found = locations.printable(repr(row.get(column))[:100])
        detail = f"{column} in {where} is {found}, not a file name or a list of them"
        return name, (), (RejectReason.CONTROL_MISSING.value, detail), *others
    given = captions_of(row, where, columns, fallback)
    if isinstance(given, captions.Problem):
        return name, (), (given.reason.value, given.detail), *others
    return name, given, None, *others


def _control_names(value: object, files: TableFiles) -> str | tuple[str, ...] | None:
    """The file names in a cell of control images; empty when it names none, None when it holds something else."""
    values = several(value)
    names = [files.name(each) for each in values]
    if any(name is None for name in names):
        return None
    given = tuple(name for name in names if name is not None)
    return given if isinstance(value, list) or len(given) > 1 else "".join(given)


def captions_of(row: tables.Row, where: str, columns: Columns, fallback: str | None) -> tuple[str, ...] | captions.Problem:
    """The row's own captions; none where it takes the source's."""
    place = f"{', '.join(columns.captions) or 'no column'} in {where}"
    texts = captions.gather((columns.labels.text(column, row.get(column)) for column in columns.captions), place)
    lacks = isinstance(texts, captions.Problem) and texts.reason != RejectReason.CAPTION_NOT_TEXT
    return () if lacks and fallback is not None else texts


def _root(settings: TableSettings, table: str) -> str:
    return settings.root or posixpath.dirname(table.partition("?")[0] if locations.is_url(table) else table) or "."


def _read_rows(
    config: SourceConfig, settings: TableSettings, table: str, entries: tuple[Entry, ...]
) -> Iterator[Record | Reject]:
    files = TableFiles(_root(settings, table))
    for identity, name, texts, problem, mask, controls in entries:
        if problem is not None:
            yield _reject(config, identity, RejectReason(problem[0]), problem[1])
            continue
        blob = files.blob(name)
        if _is_missing(blob):
            yield _reject(config, identity, RejectReason.FILE_MISSING, _absence(settings, files, name))
            continue
        others = [[files.blob(each) for each in _flat((names,)) if each] for names in (mask or "", *controls)]
        yield _record(config, settings, identity, blob, texts, others)


def _absence(settings: TableSettings, files: TableFiles, name: str) -> str:
    """As the row names the file: where the table and its files lie is no part of a dataset."""
    if not table_files.is_relative(name):
        return f"{name} does not exist"
    place = " below `root`" if settings.root else " beside the table"
    several_fit = files.fitting(name)
    if several_fit:
        return f"{name} is not a file{place}, and {' and '.join(several_fit[:3])} fit it: write the name with its suffix"
    if not table_files.has_image_suffix(name):
        return f"{name} does not exist{place}, and neither does an image of this name with a suffix"
    return f"{name} does not exist{place}"


def _record(
    config: SourceConfig,
    settings: TableSettings,
    identity: str,
    image: Blob,
    texts: tuple[str, ...],
    others: Sequence[list[Blob]],
) -> Record | Reject:
    """A record, or the reject of one that lacks its mask (the first of the others) or a control image."""
    mask, *controls = others
    reasons = [RejectReason.MASK_MISSING, *[RejectReason.CONTROL_MISSING] * len(controls)]
    for column, blobs, reason in zip((settings.mask, *settings.controls), others, reasons, strict=True):
        missing = next((blob for blob in blobs if _is_missing(blob)), None)
        if missing is not None:
            return _reject(config, identity, reason, f"{missing.name}, under {column}, does not exist")
        if column and not blobs and (reason is RejectReason.MASK_MISSING or not settings.optional):
            return _reject(config, identity, reason, f"the row has nothing under {column}")
    captions_or_fallback = texts or (str(captions.fallback(config)),)
    return Record(
        identity=identity,
        image=image,
        captions=captions_or_fallback,
        mask=mask[0] if mask else None,
        is_fallback=not texts,
        **beside(config, controls),
    )


def _is_missing(blob: Blob) -> bool:
    return blob.data is None and table_files.local_signature(blob.location) == "missing"


def _reject(config: SourceConfig, name: str, reason: RejectReason, detail: str) -> Reject:
    path, detail = locations.printable(name), locations.redacted(locations.printable(detail))
    return Reject(source=config.source_name, path=path, reason=reason, detail=detail)


# Rows that hold bytes.


def _holds_bytes(parquet: Any, columns: Columns) -> bool:
    return any(_byte_column(parquet.schema_arrow.field(name).type, name) for name in columns.of_files)


def _byte_column(kind: pa.DataType, name: str) -> str | None:
    """The Parquet name of the column that holds a file column's bytes: itself, or `bytes` in `datasets`' struct.

    Of a list of such the list's own name: an empty list counts as a null there, so that nothing vouches for it.
    """
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return name if _byte_column(kind.value_type, name) else None
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return name
    if pa.types.is_struct(kind) and "bytes" in {field.name for field in kind}:
        return f"{name}.bytes"
    return None


def _row_groups(
    config: SourceConfig, settings: TableSettings, table: tables.OpenTable, columns: Columns, label: str, shard_samples: int
) -> Iterator[Partition]:
    metadata = table.parquet.metadata
    table_signature = locations.signature(table.location)
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    start = first_row = num_rows = 0
    for group, size in enumerate(sizes):
        num_rows += size
        if group + 1 < len(sizes) and num_rows + sizes[group + 1] <= shard_samples:
            continue
        groups = tuple(range(start, group + 1))
        vouched = _have_all_bytes(table.parquet, columns, groups)
        yield Partition(
            payload=("groups", table.location, label, first_row, groups),
            signature=storage.digest([table_signature, label, groups]) if vouched else None,
            num_records=num_rows,
        )
        start, first_row, num_rows = group + 1, first_row + num_rows, 0


def _have_all_bytes(parquet: Any, columns: Columns, groups: tuple[int, ...]) -> bool:
    """Whether no row leaves its bytes out, and perhaps names a file instead: then the table vouches for all of them."""
    metadata, schema = parquet.metadata, parquet.schema_arrow
    position = {metadata.schema.column(index).path: index for index in range(metadata.num_columns)}
    for name in columns.of_files:
        column = _byte_column(schema.field(name).type, name)
        if column is None or column not in position:
            return False
        found = [metadata.row_group(group).column(position[column]).statistics for group in groups]
        if any(each is None or not each.has_null_count or each.null_count for each in found):
            return False
    return True


def _read_row_groups(
    config: SourceConfig, settings: TableSettings, location: str, label: str, first_row: int, groups: tuple[int, ...]
) -> Iterator[Record | Reject]:
    files, fallback = TableFiles(_root(settings, location)), captions.fallback(config)
    with tables.open_table(location) as table:
        columns = columns_of(config, settings, table)
        for number, row in enumerate(tables.parquet_rows(table.parquet, columns.names, _BATCH_IMAGES, groups), first_row):
            where = f"row {number} of {locations.file_name(location)}"
            cells = [row.get(column) if column else None for column in columns.by_role]
            blobs = [[_blob(each, files, f"{label}/{number}") for each in several(cell)] for cell in cells]
            # The path beside the bytes is a name from elsewhere, often the same in every row.
            identity = "-".join([f"{label}/{number}", *posixpath.basename(_named_file(cells[0], files) or "").split()])
            texts = captions_of(row, where, columns, fallback)
            image = blobs[0][0] if len(blobs[0]) == 1 else None
            if image is None or _is_missing(image):
                yield _reject(config, identity, RejectReason.FILE_MISSING, f"{columns.image} in {where} holds no image")
            elif isinstance(texts, captions.Problem):
                yield _reject(config, identity, texts.reason, texts.detail)
            elif column := next((name for name, found in zip(columns.by_role, blobs, strict=True) if None in found), None):
                reason = RejectReason.MASK_MISSING if column == columns.mask else RejectReason.CONTROL_MISSING
                yield _reject(config, identity, reason, f"{column} in {where} holds something else than images")
            else:
                others = [[blob for blob in found if blob is not None] for found in blobs[1:]]
                yield _record(config, settings, identity, image, texts, others)


def _named_file(cell: object, files: TableFiles) -> str | None:
    return files.name(cell.get("path") if isinstance(cell, dict) else cell)


def _blob(cell: Any, files: TableFiles, label: str) -> Blob | None:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(data, bytes):
        return Blob(location=label, data=data)
    name = _named_file(cell, files)
    return files.blob(name) if name else None


# Columns.


def columns_of(config: SourceConfig, settings: ColumnSettings, table: tables.OpenTable) -> Columns:
    """Settle which columns are read.

    Raises:
        SourceError: the table does not have one.
    """
    given = {"image": settings.image, "mask": settings.mask}
    for setting, names in {"captions": settings.captions, "controls": settings.controls}.items():
        given.update({f"{setting}.{index}": name for index, name in enumerate(names)})
    for setting, name in given.items():
        if name is not None and name not in table.columns:
            where = tables.shown(table.location)
            meant = locations.printable(did_you_mean(name, table.columns))
            raise SourceError(f"data.sources: `{setting}: {name}`: {where} has no such column.{meant} {_listed(table)}")
    image = settings.image or _present(table.columns, IMAGE_COLUMNS)
    if image is None:
        raise SourceError(
            f"data.sources: {tables.shown(table.location)} has no column {_either(IMAGE_COLUMNS)}. "
            f"Name the one of the images with `image:`. {_listed(table)}"
        )
    caption = _present(table.columns, CAPTION_COLUMNS)
    if not settings.captions and caption is None and config.caption is None:
        raise SourceError(
            f"data.sources: {tables.shown(table.location)} has no column {_either(CAPTION_COLUMNS)}. "
            f"Name those of the captions with `captions: [NAME]`, or give all images one `caption:`. {_listed(table)}"
        )
    found = settings.captions or ((caption,) if caption else ())
    return Columns(
        image=image,
        captions=found,
        mask=settings.mask,
        controls=settings.controls,
        labels=labels.of_parquet(table.parquet) if table.parquet else labels.Labels({}),
    )


def _present(columns: list[str], wanted: tuple[str, ...]) -> str | None:
    by_lower = {name.lower(): name for name in reversed(columns)}
    return next((name if name in columns else by_lower[name] for name in wanted if name in by_lower), None)


def _either(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _listed(table: tables.OpenTable) -> str:
    return f"Its columns: {', '.join(locations.printable(name) for name in table.columns)}."


SOURCE = Table()
