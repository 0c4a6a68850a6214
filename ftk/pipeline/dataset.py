"""The prepared dataset on disk: its tables, its shards, and the one reader that later stages use."""

import tarfile
import threading
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from ftk import storage
from ftk.configs.schema import OF_SOURCES, RunConfig, SourceConfig
from ftk.contracts import PREPARED_SCHEMA, PreparedManifest, Reject, RejectReason, SampleRow, ShardRecord
from ftk.errors import DatasetError
from ftk.models.components.geometry import ReferenceRule
from ftk.pipeline import light_webdataset
from ftk.pipeline.conditions import base as conditions
from ftk.pipeline.sources import base as sources

SAMPLE_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("source", pa.string()),
        pa.field("content_sha256", pa.string()),
        pa.field("image_id", pa.string()),
        *(pa.field(name, pa.int32()) for name in ("width", "height", "bucket_width", "bucket_height")),
        *(pa.field(name, pa.int32()) for name in ("resize_width", "resize_height", "crop_x", "crop_y")),
        pa.field("flipped", pa.bool_()),
        pa.field("copied", pa.bool_()),
        pa.field("perceptual_hash", pa.string()),
        pa.field("captions", pa.list_(pa.string())),
        pa.field("repeats", pa.int32()),
        pa.field("role", pa.string()),
        pa.field("num_controls", pa.int32()),
        pa.field("control_ids", pa.list_(pa.string())),
        pa.field("has_mask", pa.bool_()),
        pa.field("mask_id", pa.string()),
        pa.field("shard", pa.string()),
    ]
)
REFERENCE_FIELDS = [
    pa.field("reference_ids", pa.list_(pa.string())),
    pa.field("reference_widths", pa.list_(pa.int32())),
    pa.field("reference_heights", pa.list_(pa.int32())),
]
"""Of datasets whose sources name references; the tables of others do not have these columns."""
SEEN_FIELDS = [
    pa.field("seen_ids", pa.list_(pa.string())),
    pa.field("seen_widths", pa.list_(pa.int32())),
    pa.field("seen_heights", pa.list_(pa.int32())),
]
"""Of shards whose references the text encoder sees at another size than the VAE; see `ReferenceRule.seen_area`."""
_PART_REPEATS = pa.field("repeats", pa.float64())
"""In the tables of a source whose repeats are not whole."""
REJECT_SCHEMA = pa.schema([pa.field(name, pa.string()) for name in ("source", "path", "reason", "detail")])
DUPLICATE_SCHEMA = pa.schema([pa.field("key", pa.string()), pa.field("like", pa.string()), pa.field("bits", pa.int32())])
"""Of each image that looks like an earlier one: its key, the earlier one's, and how many bits of their hashes differ;
-1 for images whose files are equal."""
MANIFEST = "dataset.json"
IMAGE_SUFFIXES = ("png", "jpg", "webp")
_FROM_DATA = (
    *("resolutions", "max_aspect", "bucket_step", "upscale", "upscale_limit", "min_size", "crop", "crops", "flip", "resize"),
    *("captions", "duplicates", "image_format", "quality", "background", "animated"),
)
_INDEXED_SHARDS = 64
_NOT_THE_SAMPLES = {"path", "format", "name", "generate"}


def recipe(config: RunConfig) -> dict[str, Any]:
    """What the configuration says about the samples, without where anything lies: later stages compare it."""
    settings = {source.source_name: _source_recipe(source) for source in config.data.sources}
    # Only where there are some: a dataset without aspects has the recipe that it always had.
    names = {*_FROM_DATA, *(["aspects"] if config.data.aspects else [])}
    plain = {**config.data.model_dump(mode="json", include=names), "sources": settings}
    return without_places(plain, config)


def _source_recipe(source: SourceConfig) -> dict[str, Any]:
    """What is optional only where it is there: a dataset without it has the recipe that it always had."""
    optional = {"references", *OF_SOURCES, "caption_settings"}
    unused = {name for name in optional if not getattr(source, name) and getattr(source, name) is not False}
    plain = source.model_dump(mode="json", exclude=_NOT_THE_SAMPLES | unused)
    for made in conditions.of(source):
        plain["controls"][made.position] = made.plain
    return plain


def own_settings(source: Mapping[str, Any]) -> str:
    """What a source's settings say in place of those of `data`, as it is shown to people; empty where they say nothing."""
    captions = source.get("caption_settings") or {}
    settings = {name: source[name] for name in OF_SOURCES if source.get(name) is not None}
    settings |= {f"captions.{name}": value for name, value in captions.items()}
    return ", ".join(f"{name} {_plain(value)}" for name, value in settings.items())


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " + ".join(map(str, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def without_places(stored: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """A recipe as `recipe` gives it. Earlier versions wrote into theirs where masks, control images and roots lie."""
    kinds = {source.source_name: source for source in config.data.sources}
    settings = {
        name: sources.without_places(kinds[name], source) if name in kinds else source
        for name, source in stored.get("sources", {}).items()
    }
    return {**stored, "sources": settings}


def recipes(config: RunConfig, stored: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(expected, found): the recipe of a run file and one that was stored, to be compared part by part.

    Masks that are no longer asked for count too: whatever names a place is in both, as None where it names none.
    """
    expected, found = recipe(config), without_places(stored, config)
    for source in config.data.sources:
        for settings in (expected["sources"][source.source_name], found["sources"].get(source.source_name, {})):
            settings.update({name: settings.get(name) or None for name in sources.places(source)})
    return expected, found


def sample_table(rows: Sequence[SampleRow], references: ReferenceRule | None = None) -> pa.Table:
    """The rows as an Arrow table, with the columns of references where the source names some, whose rule is given then."""
    extra = [*(REFERENCE_FIELDS if references else []), *(SEEN_FIELDS if references and references.seen_area else [])]
    schema = pa.schema([*SAMPLE_SCHEMA, *extra])
    if any(isinstance(row.repeats, float) for row in rows):
        schema = _with_part_repeats(schema)
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=schema)


def _with_part_repeats(schema: pa.Schema) -> pa.Schema:
    return schema.set(schema.get_field_index("repeats"), _PART_REPEATS)


def plain_row(row: SampleRow) -> dict[str, Any]:
    """The row as JSON values: what lies beside the sample in its tar. Nothing of references where it has none."""
    plain = asdict(row)
    for column in [*(REFERENCE_FIELDS if not row.reference_ids else []), *(SEEN_FIELDS if not row.seen_ids else [])]:
        del plain[column.name]
    return plain


def reject_table(rejects: Iterable[Reject]) -> pa.Table:
    """The rejects as an Arrow table."""
    return pa.Table.from_pylist([asdict(reject) for reject in rejects], schema=REJECT_SCHEMA)


class TarWriter(Protocol):
    """What `tar_writer` returns: a context manager that ends the archive."""

    def __enter__(self) -> "TarWriter": ...

    def __exit__(self, *error: object) -> None: ...

    def write(self, sample: dict[str, Any], /) -> int:
        """Append a member KEY.SUFFIX for each suffix of `{"__key__": KEY, SUFFIX: bytes}`; several are sorted by suffix."""
        ...


def tar_writer(file: BinaryIO) -> TarWriter:
    """webdataset's writer of a shard: members of a fixed owner, mode and time, so equal input is equal bytes."""
    writer = light_webdataset.load().TarWriter(file, user="ftk", group="ftk", mode=0o644, mtime=0, encoder=False)
    # webdataset 1.0 takes a `format` but never passes it to tarfile, whose default differs between versions of Python.
    writer.tarstream.format = tarfile.USTAR_FORMAT
    tar: TarWriter = writer
    return tar


@dataclass(frozen=True, slots=True)
class Span:
    """A file within a shard."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Its bytes."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class PreparedDataset:
    """Reads what `ftk prepare` committed: rows as objects, images as file bytes."""

    def __init__(self, directory: Path, manifest: PreparedManifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._shards = {shard.name: shard for shard in manifest.shards}
        self._members: OrderedDict[str, dict[str, tuple[int, int]]] = OrderedDict()
        self._verified_shards: set[str] = set()
        self._lock = threading.RLock()

    @classmethod
    def open(cls, directory: Path) -> "PreparedDataset":
        """Read and check the manifest; `DatasetError` names a missing, short or foreign file."""
        manifest = read_manifest(directory)
        if manifest is None:
            raise DatasetError(f"{directory} holds no prepared dataset. Run `ftk prepare RUN.yaml` first.")
        for shard in manifest.shards:
            path = directory / "shards" / f"{shard.name}.tar"
            found = path.stat().st_size if path.exists() else None
            if found != shard.bytes:
                size = "no file" if found is None else f"{found:,}"
                raise DatasetError(
                    f"{path} is damaged: expected {shard.bytes:,} bytes, found {size}. "
                    f"Run `ftk prepare RUN.yaml` again: it makes this shard anew."
                )
        return cls(directory, manifest)

    def rows(self) -> list[SampleRow]:
        """Every sample, in order of the shards."""
        return [SampleRow(**row) for shard in self.manifest.shards for row in self._table(shard).to_pylist()]

    def _table(self, shard: ShardRecord) -> pa.Table:
        path = self.directory / "shards" / f"{shard.name}.parquet"
        if not path.exists() or storage.sha256_file(path) != shard.table_sha256:
            raise DatasetError(
                f"{path} is damaged: it does not have its checksum. Run `ftk prepare RUN.yaml` again: it makes this shard anew."
            )
        table = storage.read_table(path)
        schemas = [SAMPLE_SCHEMA]
        for fields in (REFERENCE_FIELDS, SEEN_FIELDS):
            schemas.append(pa.schema([*schemas[-1], *fields]))
        if not any(table.schema.equals(schema) for schema in (*schemas, *map(_with_part_repeats, schemas))):
            raise DatasetError(f"{path} has other columns than this ftk reads. Delete it and run `ftk prepare RUN.yaml` again.")
        if any(name != shard.name for name in pc.unique(table["shard"]).to_pylist()):
            raise DatasetError(f"{path} has samples of another shard. Delete it and run `ftk prepare RUN.yaml` again.")
        for column in [*REFERENCE_FIELDS, *SEEN_FIELDS] if self.has_references else []:
            if column.name not in table.column_names:
                table = table.append_column(column, pa.array([[]] * len(table), column.type))
        return table

    @property
    def has_references(self) -> bool:
        """Whether a source names references: `tables` then have the columns of `REFERENCE_FIELDS` and `SEEN_FIELDS`."""
        return any(source.get("references") for source in self.manifest.recipe.get("sources", {}).values())

    def rejects(self) -> list[Reject]:
        """Every input that did not become a sample."""
        table = storage.read_table(self.directory / "rejects.parquet")
        return [Reject(**{**row, "reason": RejectReason(row["reason"])}) for row in table.to_pylist()]

    def duplicates(self) -> list[dict[str, Any]]:
        """Samples that are equal or alike: see `DUPLICATE_SCHEMA`."""
        rows: list[dict[str, Any]] = storage.read_table(self.directory / "duplicates.parquet").to_pylist()
        return rows

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The samples shard by shard, in order: the columns of `SAMPLE_SCHEMA`, and those of references if there are any.

        With `columns` only those of them: of a large dataset hashes and captions are most of what a table takes in memory.
        `repeats` are floats in all of them if a source has repeats that are not whole.
        """
        for shard in self.manifest.shards:
            table = self._table(shard)
            table = table.cast(_with_part_repeats(table.schema)) if self._has_part_repeats else table
            yield table if columns is None else table.select([name for name in table.column_names if name in columns])

    @property
    def _has_part_repeats(self) -> bool:
        return any(isinstance(source.get("repeats"), float) for source in self.manifest.recipe.get("sources", {}).values())

    def image_bytes(self, row: SampleRow) -> bytes:
        """The encoded image of one sample, read from its shard by offset."""
        return self.span(row.shard, row.key, "image").read()

    def mask_bytes(self, row: SampleRow) -> bytes | None:
        """The sample's mask as an 8-bit grey PNG of the bucket's size; None when it has none."""
        return self.span(row.shard, row.key, "mask").read() if row.has_mask else None

    def control_bytes(self, row: SampleRow) -> list[bytes]:
        """The sample's control images as PNG files of the bucket's size."""
        return [self.span(row.shard, row.key, f"control{number}").read() for number in range(row.num_controls)]

    def reference_bytes(self, row: SampleRow) -> list[bytes]:
        """The sample's references as PNG files, each of its own size."""
        return [self.span(row.shard, row.key, f"reference{number}").read() for number in range(len(row.reference_ids))]

    def span(self, shard: str, key: str, part: str) -> "Span":
        """Where a sample's `image`, `mask`, `controlN`, `referenceN` or `seenN` lies; the shard is verified first."""
        index = self._index(shard)
        suffixes = IMAGE_SUFFIXES if part == "image" else (f"{part}.png",)
        path = self.directory / "shards" / f"{shard}.tar"
        for suffix in suffixes:
            if (name := f"{key}.{suffix}") in index:
                return Span(path, *index[name])
        raise DatasetError(f"{path} holds no {part} of {key}. Delete it and run `ftk prepare RUN.yaml` again.")

    def num_samples(self, shard: str) -> int:
        """How many samples a shard holds."""
        return self._shards[shard].num_samples

    def stream(self, shard: str, parts: Sequence[tuple[str, str]]) -> Iterator[bytes]:
        """The files of (key, part) pairs, parts named as for `span`, read in one pass from the shard's front.

        The pairs must be in the order of the shard's samples; in memory is one sample at a time. The shard's checksum is
        verified first: webdataset itself takes a damaged header for the end of the tar.

        Raises:
            DatasetError: the shard is damaged, or does not hold a part.
        """
        path = self._verified(shard)
        samples = _samples(path, {key for key, _ in parts})
        sample: dict[str, Any] = {}
        try:
            for key, part in parts:
                while sample.get("__key__") != key:
                    sample = next(samples)
                suffixes = IMAGE_SUFFIXES if part == "image" else (f"{part}.png",)
                yield next(sample[suffix] for suffix in suffixes if suffix in sample)
        except (StopIteration, tarfile.TarError) as error:
            # webdataset appends ` @ ` and the open file to a message.
            what = (
                f"it holds no {part} of {key}" if isinstance(error, StopIteration) else str(error.args[0]).partition(" @ ")[0]
            )
            raise DatasetError(f"{path} changed while it was read: {what}. Run `ftk prepare RUN.yaml` again.") from None

    def _verified(self, shard: str) -> Path:
        """The path of a shard; its checksum is verified once."""
        if shard not in self._shards:
            raise DatasetError(f"{self.directory} lists no shard {shard!r}. Run `ftk prepare RUN.yaml` again.")
        path = self.directory / "shards" / f"{shard}.tar"
        with self._lock:
            if shard not in self._verified_shards and storage.sha256_file(path) != self._shards[shard].sha256:
                raise DatasetError(
                    f"{path} is damaged: it does not have its checksum. Run `ftk prepare RUN.yaml` again: it makes this shard "
                    "anew."
                )
            self._verified_shards.add(shard)
        return path

    def _index(self, shard: str) -> dict[str, tuple[int, int]]:
        """Where each member of a shard lies; the shard's checksum is verified before its first use. Threads may ask."""
        with self._lock:
            if shard not in self._members:
                self._members[shard] = self._read_index(shard)
            self._members.move_to_end(shard)
            while len(self._members) > _INDEXED_SHARDS:
                self._members.popitem(last=False)
            return self._members[shard]

    def _read_index(self, shard: str) -> dict[str, tuple[int, int]]:
        with tarfile.open(self._verified(shard), mode="r:") as tar:
            return {member.name: (member.offset_data, member.size) for member in tar}


def _samples(path: Path, keys: Container[str]) -> Iterator[dict[str, Any]]:
    """The samples of these keys as webdataset gives them: `__key__`, and the bytes of each member but the row's JSON."""

    def opened() -> Iterator[dict[str, Any]]:
        # webdataset would open a name as GOPEN_* variables say, and leave closing the file to the garbage collector.
        with path.open("rb") as file:
            yield {"url": str(path), "stream": file}

    def is_needed(member: str) -> bool:
        key, _, suffix = member.partition(".")
        return key in keys and suffix != "json"

    webdataset = light_webdataset.load()
    tar_files = partial(webdataset.tariterators.tar_file_expander, select_files=is_needed)
    samples: Iterator[dict[str, Any]] = iter(webdataset.DataPipeline(opened, tar_files, webdataset.tariterators.group_by_keys))
    return samples


def read_manifest(directory: Path) -> PreparedManifest | None:
    """`dataset.json`, or None when there is none; `DatasetError` when it is damaged or of another version."""
    path = directory / MANIFEST
    try:
        plain = storage.read_json(path)
        version = plain.get("schema_version")
        if version == PREPARED_SCHEMA:
            manifest = storage.checked(PreparedManifest, plain)
            for shard in manifest.shards:
                storage.plain_name(shard.name)
            return manifest
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise DatasetError(f"{path} is damaged: {error}. Delete it and run `ftk prepare RUN.yaml` again.") from None
    raise DatasetError(
        f"{path} has schema version {version}; this ftk reads version {PREPARED_SCHEMA}. Prepare into a new workspace."
    )


def shard_record(plain: dict[str, Any]) -> ShardRecord:
    """A shard's record from its JSON."""
    record = storage.checked(ShardRecord, plain)
    storage.plain_name(record.name)
    return record
