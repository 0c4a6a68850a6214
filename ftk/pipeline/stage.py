"""`ftk prepare`: sources in, tar shards and tables out. Plan, make the shards that are not there, seal."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftk import storage
from ftk.configs.load import default_workers, workspace_paths
from ftk.configs.schema import DataConfig, RunConfig
from ftk.contracts import PREPARED_SCHEMA, PreparedManifest, Reject, RejectReason, SampleRow, ShardRecord
from ftk.errors import SourceError, TooManyRejects
from ftk.models import base as models
from ftk.pipeline import dataset, images
from ftk.pipeline.buckets import bucket_sizes, place
from ftk.pipeline.engine import ordered_map
from ftk.pipeline.sources import folder
from ftk.pipeline.sources.base import Record
from ftk.progress import track


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareReport:
    """What `ftk prepare` did; `buckets` maps WIDTHxHEIGHT to samples."""

    num_samples: int
    num_rejects: int
    rejects_by_reason: dict[str, int]
    num_shards: int
    num_shards_reused: int
    num_upscaled: int
    buckets: dict[str, int]
    directory: str
    rejects: list[dict[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unit:
    """One shard to be: consecutive records, with the hash of each file."""

    name: str
    fingerprint: str
    records: tuple[tuple[Record, str], ...]


def run(config: RunConfig) -> PrepareReport:
    """Prepare the dataset; shards whose inputs and recipe are unchanged are kept as they are.

    Raises:
        SourceError: nothing usable was found.
        TooManyRejects: more rejects than `data.max_reject_fraction`; the dataset is committed before this is raised.
    """
    directory = workspace_paths(config)[0]
    recipe = image_recipe(config)
    records, rejects = _scan(config.data)
    with storage.lock(directory):
        storage.sweep(directory)
        storage.sweep(directory / "shards")
        units, unreadable = _plan(records, recipe, config.data)
        done = {unit.name: record for unit in units if (record := _committed(directory, unit)) is not None}
        num_images = sum(len(unit.records) for unit in units)
        num_done = sum(len(unit.records) for unit in units if unit.name in done)
        with track("prepare", num_images, "image", num_done) as progress:
            shards = [
                done.get(unit.name) or _make_shard(directory, unit, recipe, config.data, progress.advance) for unit in units
            ]
        manifest = _seal(directory, config, shards, [*rejects, *unreadable])
    report = report_of(directory, manifest, len(done))
    check_rejects(report, config.data)
    return report


def image_recipe(config: RunConfig) -> images.ImageRecipe:
    """The buckets and image settings that the configuration and the family's geometry come to."""
    multiple = models.get(config.model.family).geometry.pixel_multiple
    data = config.data
    step = data.bucket_step or multiple
    if step % multiple:
        raise SourceError(f"data.bucket_step {step} is not a multiple of {multiple}, which {config.model.family} needs.")
    small = [edge for edge in data.resolutions if edge < step]
    if small:
        raise SourceError(f"data.resolutions {small[0]} is smaller than one bucket step of {step} px.")
    sizes = tuple(tuple(bucket_sizes(resolution, step, data.max_aspect)) for resolution in data.resolutions)
    return images.ImageRecipe(
        sizes=sizes,
        image_format=data.image_format,
        background=data.background,
        max_pixels=data.max_pixels,
        max_input_aspect=data.max_input_aspect,
    )


def dry_run(config: RunConfig) -> dict[str, Any]:
    """What `run` would make, from directory listings and image headers alone."""
    recipe = image_recipe(config)
    records, rejects = _scan(config.data)
    buckets: Counter[str] = Counter()
    unreadable = 0
    for record in records:
        size = images.header_size(record.location)
        if size is None:
            unreadable += 1
            continue
        for sizes in recipe.sizes:
            placement = place(*size, list(sizes))
            buckets[f"{placement.bucket_width}x{placement.bucket_height}"] += 1
    rejected = Counter(reject.reason.value for reject in rejects)
    if unreadable:
        rejected[RejectReason.UNREADABLE.value] += unreadable
    return {
        "num_images": len(records) + len(rejects),
        "num_samples": sum(buckets.values()),
        "num_shards": -(-len(records) // config.data.shard_samples),
        "rejects_by_reason": dict(rejected),
        "buckets": dict(sorted(buckets.items())),
    }


def check_rejects(report: PrepareReport, data: DataConfig) -> None:
    """Raise when nothing, or too little, was good."""
    listed = "".join(f"\n  {row['path']}: {row['reason']} ({row['detail']})" for row in report.rejects[:10])
    more = f"\n  and {report.num_rejects - 10} more" if report.num_rejects > 10 else ""
    table = f"{report.directory}/rejects.parquet"
    if not report.num_samples:
        raise SourceError(f"No image could be used; {table} says why for each:{listed}{more}")
    num_inputs = report.num_rejects + report.num_samples // len(data.resolutions)
    if report.num_rejects > data.max_reject_fraction * num_inputs:
        raise TooManyRejects(
            f"{report.num_rejects} of {num_inputs} images were rejected, more than data.max_reject_fraction "
            f"{data.max_reject_fraction:g} allows:{listed}{more}\nThe {report.num_samples} good samples are kept in "
            f"{report.directory}. Mend the inputs and run the command again, or raise data.max_reject_fraction."
        )


def _scan(data: DataConfig) -> tuple[list[Record], list[Reject]]:
    records: list[Record] = []
    rejects: list[Reject] = []
    for source in data.sources:
        for item in folder.SOURCE.records(source):
            if isinstance(item, Record):
                records.append(item)
            else:
                rejects.append(item)
    return records, rejects


def _plan(records: Sequence[Record], recipe: images.ImageRecipe, data: DataConfig) -> tuple[list[_Unit], list[Reject]]:
    """Cut the records into shards: a pure function of the input files' bytes, the captions and the recipe."""
    hashed: list[tuple[Record, str]] = []
    rejects: list[Reject] = []
    with ThreadPoolExecutor(default_workers(data.workers)) as pool:
        for record, content in zip(records, pool.map(_hash, records), strict=True):
            if isinstance(content, OSError):
                detail = content.strerror or str(content)
                rejects.append(_reject(record, RejectReason.UNREADABLE, detail))
            else:
                hashed.append((record, content))
    recipe_digest = storage.digest([images.IMAGES_VERSION, asdict(recipe)])
    units: list[_Unit] = []
    for start in range(0, len(hashed), data.shard_samples):
        members = tuple(hashed[start : start + data.shard_samples])
        inputs = [
            [record.source, _bytes_of(record.identity), record.captions, record.repeats, record.role, content]
            for record, content in members
        ]
        fingerprint = storage.digest([PREPARED_SCHEMA, recipe_digest, inputs])
        units.append(_Unit(name=f"{len(units):05d}", fingerprint=fingerprint, records=members))
    return units, rejects


def _hash(record: Record) -> str | OSError:
    try:
        return storage.sha256_file(record.location)
    except OSError as error:
        return error


def _committed(directory: Path, unit: _Unit) -> ShardRecord | None:
    """The record of this unit's shard if it is there, whole, and made of the same inputs."""
    try:
        record = dataset.shard_record(storage.read_json(directory / "shards" / f"{unit.name}.json"))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    tar, table = _shard_files(directory, unit.name)
    if record.unit_fingerprint != unit.fingerprint or not (tar.exists() and table.exists()):
        return None
    whole = storage.sha256_file(tar) == record.sha256 and storage.sha256_file(table) == record.table_sha256
    return record if whole else None


def _shard_files(directory: Path, name: str) -> tuple[Path, Path]:
    return directory / "shards" / f"{name}.tar", directory / "shards" / f"{name}.parquet"


def _make_shard(directory: Path, unit: _Unit, recipe: images.ImageRecipe, data: DataConfig, advance: Any) -> ShardRecord:
    """Tar, table, then the receipt that names their hashes: only the receipt makes the shard count."""
    tar_path, table_path = _shard_files(directory, unit.name)
    workers = min(default_workers(data.workers), len(unit.records))
    tasks = (images.ImageTask(path=record.location, content_sha256=sha, recipe=recipe) for record, sha in unit.records)
    rows: list[SampleRow] = []
    rejects: list[Reject] = []
    num_upscaled = 0
    with storage.committing(tar_path) as file:
        tar = dataset.TarWriter(file)
        for (record, content), result in zip(unit.records, ordered_map(images.prepare_image, tasks, workers), strict=True):
            advance(1)
            if isinstance(result, images.ImageProblem):
                rejects.append(_reject(record, result.reason, result.detail))
                continue
            for row, variant in _rows(unit.name, record, content, result):
                _add_to_tar(tar, row, variant, images.SUFFIXES[recipe.image_format])
                rows.append(row)
                num_upscaled += variant.placement.upscales(result.width, result.height)
        tar.close()
    storage.commit_table(table_path, dataset.sample_table(rows))
    shard = ShardRecord(
        name=unit.name,
        unit_fingerprint=unit.fingerprint,
        num_samples=len(rows),
        num_upscaled=num_upscaled,
        bytes=tar_path.stat().st_size,
        sha256=storage.sha256_file(tar_path),
        table_sha256=storage.sha256_file(table_path),
        rejects=rejects,
    )
    storage.commit_json(directory / "shards" / f"{unit.name}.json", shard)
    return shard


def _rows(
    shard: str, record: Record, content: str, prepared: images.PreparedImage
) -> Iterator[tuple[SampleRow, images.Variant]]:
    for variant in prepared.variants:
        geometry = asdict(variant.placement)
        yield (
            SampleRow(
                key=sample_key(record, variant.placement.bucket_width, variant.placement.bucket_height),
                source=record.source,
                content_sha256=content,
                image_id=variant.image_id,
                width=prepared.width,
                height=prepared.height,
                flipped=False,
                captions=list(record.captions),
                repeats=record.repeats,
                role=record.role,
                num_controls=0,
                has_mask=False,
                shard=shard,
                **geometry,
            ),
            variant,
        )


def sample_key(record: Record, bucket_width: int, bucket_height: int) -> str:
    """A stable key from source, path and size: readable, distinct, and without dots, as WebDataset wants it.

    The hash is of the path's bytes, so names that differ in case, normal form or extension stay apart.
    """
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(record.identity).with_suffix("").as_posix()).strip("-")[-40:]
    unique = storage.digest([record.source, _bytes_of(record.identity), bucket_width, bucket_height], 12)
    return f"{readable}-{unique}" if readable else unique


def _bytes_of(identity: str) -> str:
    return identity.encode("utf-8", "surrogateescape").hex()


def _add_to_tar(tar: dataset.TarWriter, row: SampleRow, variant: images.Variant, suffix: str) -> None:
    tar.add(f"{row.key}.{suffix}", variant.data)
    tar.add(f"{row.key}.json", json.dumps(asdict(row), sort_keys=True, ensure_ascii=False).encode())


def _reject(record: Record, reason: RejectReason, detail: str) -> Reject:
    path = record.identity.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return Reject(source=record.source, path=path, reason=reason, detail=detail)


def _seal(directory: Path, config: RunConfig, shards: list[ShardRecord], rejects: list[Reject]) -> PreparedManifest:
    """Commit the rejects and the manifest, then remove shards that it does not name."""
    all_rejects = [*rejects, *(reject for shard in shards for reject in shard.rejects)]
    buckets: Counter[str] = Counter()
    for shard in shards:
        table = storage.read_table(_shard_files(directory, shard.name)[1])
        pairs = zip(table["bucket_width"].to_pylist(), table["bucket_height"].to_pylist(), strict=True)
        buckets.update(f"{width}x{height}" for width, height in pairs)
    plain_rejects = [[reject.source, reject.path, reject.reason.value] for reject in all_rejects]
    manifest = PreparedManifest(
        schema_version=PREPARED_SCHEMA,
        fingerprint=storage.digest([[shard.unit_fingerprint for shard in shards], plain_rejects]),
        recipe=dataset.recipe(config),
        num_samples=sum(shard.num_samples for shard in shards),
        num_rejects=len(all_rejects),
        num_upscaled=sum(shard.num_upscaled for shard in shards),
        rejects_by_reason=dict(sorted(Counter(reject.reason.value for reject in all_rejects).items())),
        buckets=dict(sorted(buckets.items())),
        shards=shards,
    )
    storage.commit_table(directory / "rejects.parquet", dataset.reject_table(all_rejects))
    storage.commit_json(directory / dataset.MANIFEST, manifest)
    named = {shard.name for shard in shards}
    for path in (directory / "shards").glob("[0-9]*"):
        if path.stem not in named:
            path.unlink()
    return manifest


def report_of(directory: Path, manifest: PreparedManifest, num_reused: int) -> PrepareReport:
    """The report on a committed dataset."""
    rejects = dataset.PreparedDataset(directory, manifest).rejects()
    return PrepareReport(
        num_samples=manifest.num_samples,
        num_rejects=manifest.num_rejects,
        rejects_by_reason=manifest.rejects_by_reason,
        num_shards=len(manifest.shards),
        num_shards_reused=num_reused,
        num_upscaled=manifest.num_upscaled,
        buckets=manifest.buckets,
        directory=str(directory),
        rejects=[{name: str(value) for name, value in asdict(reject).items()} for reject in rejects],
    )
