"""`ftk prepare`: sources in, tar shards and tables out. Plan, make the shards that are not there, seal."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ftk import locations, storage
from ftk.configs.load import default_workers
from ftk.configs.schema import DataConfig, RunConfig, SourceConfig
from ftk.contracts import PREPARED_SCHEMA, PreparedManifest, ShardRecord
from ftk.errors import ConfigError, SourceError
from ftk.models.base import sizes_of
from ftk.pipeline import caption_check, class_images, dataset, duplicates, images, prepare_report, shard_writer, source_units
from ftk.pipeline.buckets import bucket_sizes
from ftk.pipeline.class_images import ClassImages
from ftk.pipeline.conditions import base as conditions
from ftk.pipeline.dataset import own_settings
from ftk.pipeline.engine import WHOLE, JobPart, WorkerPool, map_units
from ftk.pipeline.reachability import Reachability
from ftk.pipeline.shard_writer import Made, PrepareJob
from ftk.pipeline.sources.base import Notes
from ftk.progress import ProgressBar, track
from ftk.run import Run

LOGGER = logging.getLogger("ftk")
_GIB = 1 << 30
_UNITS_AT_ONCE = 64


def run(run: Run, part: JobPart = WHOLE) -> prepare_report.PrepareReport:
    """Prepare the dataset, or one part of it; shards whose inputs and recipe are unchanged are kept as they are.

    Raises:
        SourceError: nothing usable was found, or class images are missing or were drawn with something else.
        TooManyRejects: more rejects than `data.max_reject_fraction` or `data.max_unreachable_fraction`; the dataset, or
            what was fetched of it, is committed before this is raised.
        EnvironmentFault: disk, memory, network, or another writer.
    """
    config = run.config
    job = PrepareJob(directory=run.paths.prepared, recipes=image_recipes(run), data=config.data)
    wanted = check(run)
    class_images.refuse_changes(wanted, config.model)
    class_images.refuse_missing(wanted)
    with storage.lock(job.directory, part.label):
        if part == WHOLE:
            storage.sweep(job.directory)
            storage.sweep(job.directory / "shards")
        equal = source_units.find_duplicates(config.data, partial(shard_writer.known_hashes, job))
        planned = _planned(job, equal, part)
        reachability = Reachability(config.data.max_unreachable_fraction, planned.totals(part)[0])
        reachability.has_kept = any(shard.num_samples for unit in planned.made if unit for shard in unit.shards)
        _make_missing(job, equal, part, planned, reachability)
        _look_again(job, equal, planned)
        made = [unit for unit in planned.made if unit is not None]
        if len(made) < len(planned.made):
            return prepare_report.of_part(
                job.directory, dataset.recipe(config), made, len(planned.made) - len(made), planned.notes
            )
        manifest = _seal(job, config, [shard for unit in made for shard in unit.shards], planned.notes)
    report = prepare_report.of_dataset(job.directory, manifest, sum(unit.num_reused for unit in made))
    prepare_report.warn_of_empty_masks(manifest, config)
    prepare_report.warn_of_captions(manifest)
    prepare_report.check_unreachable(report, config.data, reachability)
    prepare_report.check_rejects(report, config.data)
    return report


def check(run: Run) -> tuple[ClassImages, ...]:
    """Look at settings and local sources before anything is drawn or written; class images may be missing still.

    Raises:
        ConfigError, SourceError: a source is missing or empty, or a setting does not go with the family.
    """
    image_recipes(run)
    wanted = class_images.wanted(run)
    source_units.look(class_images.listable(run.config.data, wanted))
    return wanted


def image_recipes(run: Run) -> dict[str, images.ImageRecipe]:
    """By source, the buckets and image settings that the configuration and the family's geometry come to.

    Raises:
        ConfigError, SourceError: a setting does not go with the family.
    """
    with_references = next((source.source_name for source in run.config.data.sources if source.references), None)
    if with_references is not None and run.family.references is None:
        raise ConfigError(
            f"data.sources: source {with_references} has `references`, and {run.family.name} takes no input images: those are "
            f"for edit models. Leave it out; what a control network reads is named under `controls`."
        )
    return {source.source_name: _image_recipe(run, source) for source in run.config.data.sources}


def _image_recipe(run: Run, source: SourceConfig) -> images.ImageRecipe:
    data, multiple = run.config.data.of(source), run.family.geometry.pixel_multiple
    where = f"data.sources: source {source.source_name}: resolutions" if source.resolutions else "data.resolutions"
    step = data.bucket_step or multiple
    if step % multiple:
        raise SourceError(f"data.bucket_step {step} is not a multiple of {multiple}, which {run.family.name} needs.")
    edges = [resolution for resolution in data.resolutions if isinstance(resolution, int)]
    small = [edge for edge in edges if edge < step]
    if small:
        raise SourceError(f"{where}: {small[0]} is smaller than one bucket step of {step} px.")
    exact = {size for each in data.resolutions if not isinstance(each, int) for size in sizes_of(run.family, each, where)}
    settings = {name for name in images.ImageRecipe.__slots__ if name not in ("sizes", "exact_sizes", "references", "made")}
    made = conditions.of(source)
    for control in made:
        control.maker()
    return images.ImageRecipe(
        sizes=tuple(tuple(bucket_sizes(edge, step, data.max_aspect)) for edge in edges),
        exact_sizes=tuple(sorted(exact)),
        references=run.family.references,
        made=made,
        **data.model_dump(include=settings),
    )


def dry_run(run: Run, part: JobPart = WHOLE) -> dict[str, Any]:
    """What `run` would make, from listings, captions and image headers alone; writes nothing."""
    wanted = class_images.wanted(run)
    class_images.refuse_changes(wanted, run.config.model)
    data = class_images.listable(run.config.data, wanted)
    estimate = prepare_report.Estimate()
    job = PrepareJob(directory=run.paths.prepared, recipes=image_recipes(run), data=data)
    reachability = Reachability(data.max_unreachable_fraction)
    with _pool(data) as pool, track("plan", None, "image") as progress:
        for unit in source_units.units(data, source_units.find_duplicates(data)):
            estimate.notes = estimate.notes.and_also(unit.partition.notes)
            if not part.has(unit.number):
                continue
            num_inputs = 0
            records = source_units.records(unit)
            for item, probe in shard_writer.worked(records, job, unit.source, images.probe_image, pool, reachability):
                num_inputs += 1
                if reachability.stopped:
                    raise reachability.error()
                progress.advance(1)
                estimate.add(item, probe, unit.source)
            estimate.num_inputs += num_inputs
            estimate.num_shards += max(1, -(-num_inputs // data.shard_samples))
    return {
        "source_settings": [
            f"{source.source_name}: {text}" for source in data.sources if (text := own_settings(source.model_dump(mode="json")))
        ],
        "num_class_images_to_draw": {one.source.source_name: one.num_missing for one in wanted if one.num_missing},
        **estimate.report(data.image_format),
    }


@dataclass(slots=True)
class _Planned:
    """By unit: its shards when they are there, what identifies its records, and how many they are when that is known."""

    made: list[Made | None]
    listings: list[str]
    num_records: list[int | None]
    notes: Notes

    def totals(self, part: JobPart) -> tuple[int | None, int]:
        """(all records of the part, or None when only reading can tell; those that are done)."""
        mine = [number for number in range(len(self.made)) if part.has(number)]
        done = sum(shard.num_inputs for number in mine if (made := self.made[number]) for shard in made.shards)
        open_counts = [self.num_records[number] for number in mine if self.made[number] is None]
        known = [count for count in open_counts if count is not None]
        return (done + sum(known) if len(known) == len(open_counts) else None), done


def _planned(job: PrepareJob, equal: dict[int, source_units.Duplicates], part: JobPart) -> _Planned:
    """List the sources once, and see which shards are there."""

    def there(unit: source_units.SourceUnit) -> Made | None:
        return (shard_writer.committed if part.has(unit.number) else shard_writer.committed_by_others)(job, unit)

    planned = _Planned(made=[], listings=[], num_records=[], notes=Notes())
    # Hashing a shard frees the interpreter; some units at a time keep the memory constant.
    with ThreadPoolExecutor(default_workers(job.data.workers)) as pool, track("plan", None, "image") as progress:
        units = source_units.units(job.data, equal)
        while batch := list(islice(units, _UNITS_AT_ONCE)):
            planned.listings.extend(unit.listing for unit in batch)
            planned.num_records.extend(unit.partition.num_records for unit in batch)
            planned.made.extend(pool.map(there, batch))
            for unit in batch:
                planned.notes = planned.notes.and_also(unit.partition.notes)
            progress.advance(sum(unit.partition.num_records or 0 for unit in batch))
    return planned


def _make_missing(
    job: PrepareJob,
    equal: dict[int, source_units.Duplicates],
    part: JobPart,
    planned: _Planned,
    reachability: Reachability,
) -> None:
    """Make the part's shards that are not there; lists the sources a second time, so that no listing is held in memory."""

    def missing() -> Iterator[source_units.SourceUnit]:
        for unit in _listed_again(job, equal, planned):
            if planned.made[unit.number] is None and part.has(unit.number):
                yield unit

    total, done = planned.totals(part)
    if total == done:
        return
    with track("prepare", total, "image", done) as progress:
        for made in _make_units(job, missing(), progress, reachability):
            planned.made[made.unit] = made


def _listed_again(
    job: PrepareJob, equal: dict[int, source_units.Duplicates], planned: _Planned
) -> Iterator[source_units.SourceUnit]:
    """The units once more; `SourceError` when they are not the same ones."""
    count = 0
    for unit in source_units.units(job.data, equal):
        if unit.number >= len(planned.made) or unit.listing != planned.listings[unit.number]:
            raise SourceError(_changed(unit.source.path))
        count += 1
        yield unit
    if count < len(planned.made):
        paths = [source.path for source in job.data.sources]
        raise SourceError(_changed(paths[0] if len(paths) == 1 else "One of the sources"))


def _changed(what: str) -> str:
    what = locations.redacted(locations.printable(what))
    return f"{what} changed while prepare was listing it. Finished shards are kept: run the command again."


def _look_again(job: PrepareJob, equal: dict[int, source_units.Duplicates], planned: _Planned) -> None:
    """See what other parts have made meanwhile: of parts that run at once, the one that ends last seals the dataset."""
    if None in planned.made:
        for unit in _listed_again(job, equal, planned):
            if planned.made[unit.number] is None:
                planned.made[unit.number] = shard_writer.committed_by_others(job, unit)


def _make_units(
    job: PrepareJob, units: Iterable[source_units.SourceUnit], progress: ProgressBar, reachability: Reachability
) -> Iterator[Made]:
    if job.data.engine == "local":
        with _pool(job.data) as pool:
            make = partial(shard_writer.make_unit, job, pool=pool, advance=progress.advance, reachability=reachability)
            yield from map_units("local", make, units, workers=1)
        return
    workers = job.data.workers or 1
    for made in map_units("ray", partial(_make_unit_there, job, workers), units, workers=workers):
        progress.advance(sum(shard.num_inputs for shard in made.shards))
        yield made


def _make_unit_there(job: PrepareJob, workers: int, unit: source_units.SourceUnit) -> Made:
    """On another machine: with workers, and a count of what is unreachable, of its own."""
    reachability = Reachability(job.data.max_unreachable_fraction, None)
    with _pool(job.data, workers) as pool:
        return shard_writer.make_unit(job, unit, pool, lambda _: None, reachability)


def _pool(data: DataConfig, workers: int = 0) -> WorkerPool:
    return WorkerPool(workers or default_workers(data.workers), data.worker_seconds, round(data.worker_memory_gib * _GIB))


def _seal(job: PrepareJob, config: RunConfig, made: list[ShardRecord], notes: Notes) -> PreparedManifest:
    """Commit the rejects, the duplicates and the manifest, then remove shards that it does not name."""
    rejects = [reject for shard in made for reject in shard.rejects]
    buckets: Counter[str] = Counter()
    for shard in made:
        buckets.update(shard.buckets)
    equal = duplicates.find(_columns(job.directory, made), config.data.near_duplicate_bits)
    manifest = PreparedManifest(
        schema_version=PREPARED_SCHEMA,
        fingerprint=storage.digest([[shard.recipe_fingerprint, shard.contents_fingerprint] for shard in made]),
        recipe=dataset.recipe(config),
        num_inputs=sum(shard.num_inputs for shard in made),
        num_samples=sum(shard.num_samples for shard in made),
        num_rejects=len(rejects),
        num_upscaled=sum(shard.num_upscaled for shard in made),
        num_copied=sum(shard.num_copied for shard in made),
        num_long_captions=sum(shard.num_long_captions for shard in made),
        num_duplicates=int(pc.sum(pc.less(equal["bits"], 0)).as_py() or 0),
        num_near_duplicates=int(pc.sum(pc.greater_equal(equal["bits"], 0)).as_py() or 0),
        num_empty_masks=sum(len(shard.empty_masks) for shard in made),
        rejects_by_reason=dict(sorted(Counter(reject.reason.value for reject in rejects).items())),
        buckets=dict(sorted(buckets.items())),
        shards=made,
        caption_findings=caption_check.check(_caption_tables(job.directory, made), config.data.sources),
        **prepare_report.notes_of(made, notes),
    )
    storage.commit_table(job.directory / "rejects.parquet", dataset.reject_table(rejects))
    storage.commit_table(job.directory / "duplicates.parquet", equal)
    storage.commit_json(job.directory / dataset.MANIFEST, manifest)
    named = {shard.name for shard in made}
    for path in (job.directory / "shards").glob("[0-9]*"):
        if path.stem not in named:
            path.unlink(missing_ok=True)
    return manifest


def _caption_tables(directory: Path, made: Sequence[ShardRecord]) -> Iterator[pa.Table]:
    return (storage.read_table(shard_writer.shard_files(directory, shard.name)[1], caption_check.COLUMNS) for shard in made)


def _columns(directory: Path, made: Sequence[ShardRecord]) -> pa.Table:
    """What the search for duplicates needs of all samples."""
    columns = ["key", "image_id", "content_sha256", "perceptual_hash"]
    schema = pa.schema([dataset.SAMPLE_SCHEMA.field(name) for name in columns])
    tables = [storage.read_table(shard_writer.shard_files(directory, shard.name)[1], columns) for shard in made]
    return pa.concat_tables([schema.empty_table(), *tables])
