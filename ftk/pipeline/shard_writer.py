"""From a unit to its shards: read, prepare in worker processes, write the tar, the table, and last the receipt."""

import hashlib
import json
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from ftk import locations, storage
from ftk.configs.schema import DataConfig, SourceConfig
from ftk.contracts import Reject, RejectReason, SampleRow, ShardRecord
from ftk.pipeline import captions, dataset, decode, images, outcomes, source_units
from ftk.pipeline.engine import Lost, WorkerPool
from ftk.pipeline.outcomes import EarlierShard, Outcome, Reused
from ftk.pipeline.reachability import Reachability
from ftk.pipeline.source_units import SourceUnit
from ftk.pipeline.sources.base import Blob, Record

_FALLBACK_EXAMPLES = 10
_BY_LIMITS = {RejectReason.WORKER_CRASHED, RejectReason.WORKER_TIMED_OUT, RejectReason.WORKER_OUT_OF_MEMORY}
_BY_DECODERS = {RejectReason.UNREADABLE, RejectReason.MASK_UNREADABLE, RejectReason.CONTROL_UNREADABLE}

Result = TypeVar("Result")
_FETCH_SHARE = 0.75
"""Of `data.worker_seconds`, what fetching may take: the worker lives to say why that failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareJob:
    """What all units of a run have in common, the recipes by source. Plain values: it can be sent to another machine."""

    directory: Path
    recipes: Mapping[str, images.ImageRecipe]
    data: DataConfig

    def recipe_fingerprint(self, unit: SourceUnit) -> str:
        """Stands for everything but the records themselves that shapes the unit's shards."""
        return unit.recipe_fingerprint(self.recipes[unit.source.source_name], self.data.of(unit.source))


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """A committed shard: its record, the signature of its inputs, their listing, and what became of each.

    `outcomes` are kept of shards alone that have files which are fetched once, or that were unreachable.
    """

    record: ShardRecord
    signature: str | None
    listing: str
    outcomes: tuple[Outcome, ...]

    @property
    def is_final(self) -> bool:
        """Whether the same inputs can only give the same shard: an input that was unreachable is asked for again."""
        return all(reject.reason != RejectReason.UNREACHABLE for reject in self.record.rejects)


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A unit's shards, and how many of them were there before."""

    unit: int
    shards: tuple[ShardRecord, ...]
    num_reused: int


def shard_files(directory: Path, name: str) -> tuple[Path, Path, Path]:
    """(tar, table, receipt) of a shard."""
    folder = directory / "shards"
    return folder / f"{name}.tar", folder / f"{name}.parquet", folder / f"{name}.json"


def committed(job: PrepareJob, unit: SourceUnit) -> Made | None:
    """The unit's shards if all are there, whole, final, and made of the same inputs; reads no source."""
    made = _receipts(job, unit, deep=True)
    same = unit.signature is not None and all(each.is_final and each.signature == unit.signature for each in made)
    return _made(unit, made) if made and same else None


def committed_by_others(job: PrepareJob, unit: SourceUnit) -> Made | None:
    """The shards of a unit that another part of the job array makes, if all are there and made of inputs of these names.

    Whether those inputs have changed since, and whether the shards are still whole, is for that part to see.
    """
    made = _receipts(job, unit, deep=False)
    return _made(unit, made) if made and all(each.listing == unit.listing for each in made) else None


def known_hashes(job: PrepareJob, unit: SourceUnit) -> dict[str, str]:
    """The remembered hashes of images in the unit's shards, whatever settings those were made with, by `outcomes.key_of`."""
    hashes: dict[str, str] = {}
    piece, is_last = 0, False
    while not is_last:
        try:
            plain = storage.read_json(shard_files(job.directory, unit.shard_name(piece))[2])
            hashes.update({outcome["key"]: str(outcome["contents"][0]) for outcome in plain.get("outcomes", [])})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
            break
        piece, is_last = piece + 1, bool(plain.get("is_last", True))
    return hashes


def _made(unit: SourceUnit, receipts: list[Receipt]) -> Made:
    return Made(unit=unit.number, shards=tuple(receipt.record for receipt in receipts), num_reused=len(receipts))


def _receipts(job: PrepareJob, unit: SourceUnit, deep: bool) -> list[Receipt]:
    """Of all shards of the unit; empty when one is missing."""
    receipts: list[Receipt] = []
    while not receipts or not receipts[-1].record.is_last:
        receipt = _receipt(job, unit, unit.shard_name(len(receipts)), deep)
        if receipt is None:
            return []
        receipts.append(receipt)
    return receipts


def make_unit(
    job: PrepareJob, unit: SourceUnit, pool: WorkerPool, advance: Callable[[int], Any], reachability: Reachability
) -> Made:
    """Make the unit's shards, but for those that are there and were made of the same inputs.

    Idempotent: made twice, or by two machines at once, the shards have the same bytes.

    Raises:
        SourceError: a file of the source is damaged (a tar that breaks off).
        TooManyRejects: too many remote files are unreachable; what was fetched is committed.
        EnvironmentFault: the disk or the network failed.
    """
    shards: list[ShardRecord] = []
    num_reused = 0
    inputs = _Inputs(source_units.records(unit))
    while not shards or inputs.has_more():
        name = unit.shard_name(len(shards))
        piece: Iterable[Record | Reject] = islice(inputs, job.data.shard_samples)
        receipt = _receipt(job, unit, name, deep=True)
        earlier = None
        if receipt is not None:
            # Only here must a whole piece be held: to compare it, and if it differs to make it.
            piece = list(piece)
            earlier = _earlier_shard(job, unit, receipt)
        if receipt is not None and _unchanged(job, unit, receipt, list(piece), is_last=not inputs.has_more()):
            num_reused += 1
            advance(receipt.record.num_inputs)
            shards.append(receipt.record)
        else:
            shards.append(_make_shard(job, unit, _Piece(name, piece, inputs, earlier), pool, advance, reachability))
        if reachability.stopped:
            raise reachability.error()
    return Made(unit=unit.number, shards=tuple(shards), num_reused=num_reused)


class _Inputs(Iterator[Record | Reject]):
    """A stream of inputs that knows whether there are more."""

    def __init__(self, items: Iterator[Record | Reject]) -> None:
        self._items = items
        self._ahead: deque[Record | Reject] = deque()

    def __next__(self) -> Record | Reject:
        return self._ahead.popleft() if self._ahead else next(self._items)

    def has_more(self) -> bool:
        if not self._ahead:
            self._ahead.extend(islice(self._items, 1))
        return bool(self._ahead)


def _receipt(job: PrepareJob, unit: SourceUnit, name: str, deep: bool) -> Receipt | None:
    """A whole shard's record, if it was made with this recipe."""
    tar, table, receipt = shard_files(job.directory, name)
    try:
        plain = storage.read_json(receipt)
        record, signature, listing = dataset.shard_record(plain), plain["signature"], plain["listing"]
        outcomes = tuple(storage.checked(Outcome, each) for each in plain.get("outcomes", []))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    if record.name != name or record.recipe_fingerprint != job.recipe_fingerprint(unit):
        return None
    if plain.get("conditions") != _conditions(job, record.rejects):
        return None
    if not (tar.exists() and table.exists() and tar.stat().st_size == record.bytes):
        return None
    damaged = deep and (storage.sha256_file(table) != record.table_sha256 or storage.sha256_file(tar) != record.sha256)
    return None if damaged else Receipt(record=record, signature=signature, listing=listing, outcomes=outcomes)


def _unchanged(job: PrepareJob, unit: SourceUnit, receipt: Receipt, inputs: list[Record | Reject], is_last: bool) -> bool:
    """Whether a committed shard is of these inputs: same signature, or else, read and hashed, the same bytes."""
    record = receipt.record
    if record.is_last != is_last or not receipt.is_final:
        return False
    if receipt.signature is not None and receipt.signature == unit.signature:
        return True
    earlier = _earlier_shard(job, unit, receipt)
    if len(inputs) != record.num_inputs or not all(earlier.has_fetched(item) for item in inputs):
        return False
    contents = source_units.contents_digest([_input_line(item, _hashes(item, earlier)) for item in inputs])
    if contents != record.contents_fingerprint:
        return False
    _commit_receipt(job, unit, record, receipt.outcomes)
    return True


def _earlier_shard(job: PrepareJob, unit: SourceUnit, receipt: Receipt) -> EarlierShard:
    tar, table, _ = shard_files(job.directory, receipt.record.name)
    is_same = receipt.signature is not None and receipt.signature == unit.signature
    return EarlierShard(tar, table, receipt.outcomes, is_same=is_same)


def _commit_receipt(job: PrepareJob, unit: SourceUnit, record: ShardRecord, kept: Sequence[Outcome]) -> None:
    seen = {"signature": unit.signature, "listing": unit.listing, "conditions": _conditions(job, record.rejects)}
    # Only where there are some: the receipts of local files stay small.
    remembered = {"outcomes": outcomes.plain(kept)} if kept else {}
    storage.commit_json(shard_files(job.directory, record.name)[2], {**asdict(record), **seen, **remembered})


def _conditions(job: PrepareJob, rejects: Iterable[Reject]) -> list[Any]:
    """What of this machine and its limits decided rejects: under others the same inputs may give samples."""
    reasons = {reject.reason for reject in rejects}
    limits = [job.data.worker_seconds, job.data.worker_memory_gib] if reasons & _BY_LIMITS else []
    return [*limits, *(decode.decoders() if reasons & _BY_DECODERS else [])]


def _input_line(item: Record | Reject, contents: Sequence[str]) -> list[Any]:
    """What one input says to `contents_digest`: it decides the sample, or the reject."""
    if isinstance(item, Reject):
        return [item.path, item.reason.value, item.detail]
    # Only where they are set: most records have none of them.
    extra: list[Any] = [[item.is_fallback, item.repeats]] if item.is_fallback or item.repeats != 1 else []
    extra += [] if item.num_references is None else [item.num_references]
    extra += [] if item.made_at is None else [{"made_at": item.made_at}]
    return [
        *(item.identity.encode("utf-8", "surrogateescape").hex(), list(item.captions), len(item.controls), list(contents)),
        *extra,
    ]


def _line_digest(item: Record, contents: Sequence[str]) -> str:
    return storage.digest(_input_line(item, contents))


def _hashes(item: Record | Reject, earlier: EarlierShard) -> list[str]:
    """Of all files of an input; those that `earlier` knows are not read."""
    if isinstance(item, Reject):
        return []
    return [earlier.content(item, position, blob) or _sha256(blob) for position, blob in enumerate(item.blobs)]


def _sha256(blob: Blob) -> str:
    try:
        return hashlib.sha256(blob.read()).hexdigest()
    except (OSError, locations.UnreachableError):
        return ""


@dataclass(frozen=True, slots=True)
class _Piece:
    """The inputs of one shard, within those of its unit, and the shard of this name that is there already."""

    name: str
    items: Iterable[Record | Reject]
    inputs: _Inputs
    earlier: EarlierShard | None

    def reusing(self, unit: SourceUnit, reachability: Reachability) -> Iterator[Record | Reject | Reused]:
        """The inputs, with the outcomes that are taken over; once it is no use to fetch more, remote ones are rejects."""
        for item in self.items:
            reused = self._reused(item) if isinstance(item, Record) else None
            if reused is not None:
                reachability.has_kept |= bool(reused.rows)
                yield reused
            elif isinstance(item, Record) and item.is_remote and reachability.stopped:
                yield source_units.reject(unit, item, RejectReason.UNREACHABLE, "not asked for: too many others failed")
            else:
                yield item

    def _reused(self, record: Record) -> Reused | None:
        if self.earlier is None or not self.earlier.knows(record):
            return None
        contents = [
            self.earlier.content(record, position, blob) or ("" if blob.is_remote else _sha256(blob))
            for position, blob in enumerate(record.blobs)
        ]
        return self.earlier.reuse(record, _line_digest(record, contents))


class _Shard:
    """What accumulates while a shard is being made."""

    def __init__(self, job: PrepareJob, unit: SourceUnit, name: str) -> None:
        self.job, self.unit, self.name = job, unit, name
        self.captions = job.data.of(unit.source).captions
        self.rows: list[SampleRow] = []
        self.rejects: list[Reject] = []
        self.lines: list[list[Any]] = []
        self.outcomes: list[Outcome] = []
        self.empty_masks: list[str] = []
        self.num_fallback = 0
        self.num_cut_wildcards = 0
        self.fallback_names: list[str] = []
        self.num_upscaled = 0
        self.num_made = 0
        self.fetches_once = False

    def add(self, tar: dataset.TarWriter, item: Record | Reject | Reused, result: Any) -> None:
        if isinstance(item, Reject):
            self.rejects.append(item)
            self.lines.append(_input_line(item, ()))
        elif isinstance(item, Reused):
            self._take_over(tar, item)
        elif isinstance(result, (images.ImageProblem, Lost)):
            self.rejects.append(source_units.reject(self.unit, item, result.reason, result.detail))
            # What a lost worker was reading is not known: its shard is made again when the signature changes.
            self.lines.append(_input_line(item, result.contents if isinstance(result, images.ImageProblem) else ["lost"]))
            if isinstance(result, images.ImageProblem) and result.reason != RejectReason.UNREACHABLE:
                self._remember(item, result.contents, 0, [result.reason.value, result.detail])
        else:
            self.lines.append(_input_line(item, result.contents))
            num_empty_masks = sum(variant.has_empty_mask for variant in result.variants)
            self._remember(item, result.contents, len(result.variants), None, num_empty_masks)
            self._note(item, num_empty_masks)
            for row, variant in _rows(self, item, result):
                _add_to_tar(tar, row.key, _members(row, variant))
                self._add_row(row)

    def _note(self, record: Record, num_empty_masks: int) -> None:
        """Count what the report tells of an image that gives samples."""
        self.empty_masks += [source_units.printable(record)] * num_empty_masks
        self.num_cut_wildcards += captions.num_cut(record.captions, self.unit.source, self.captions) > 0
        if record.is_fallback:
            self.num_fallback += 1
            if self.num_fallback <= _FALLBACK_EXAMPLES:
                self.fallback_names.append(source_units.shown_name(self.unit, record, self.job.data))

    def _add_row(self, row: SampleRow) -> None:
        self.rows.append(row)
        self.num_upscaled += max(row.bucket_width / row.width, row.bucket_height / row.height) > 1

    def _take_over(self, tar: dataset.TarWriter, item: Reused) -> None:
        self.lines.append(_input_line(item.record, item.outcome.contents))
        self.outcomes.append(item.outcome)
        self.fetches_once |= any(blob.fetched_once for blob in item.record.blobs)
        if item.reject is not None:
            self.rejects.append(source_units.reject(self.unit, item.record, *item.reject))
        else:
            self._note(item.record, item.outcome.num_empty_masks)
        for row in item.rows:
            _add_to_tar(tar, row.key, item.files(row))
            self._add_row(row)

    def _remember(
        self, record: Record, contents: Sequence[str], num_rows: int, reject: list[str] | None, num_empty_masks: int = 0
    ) -> None:
        self.num_made += 1
        self.fetches_once |= any(blob.fetched_once for blob in record.blobs)
        self.outcomes.append(
            Outcome(
                key=outcomes.key_of(record),
                line=_line_digest(record, contents),
                contents=list(contents),
                num_rows=num_rows,
                num_empty_masks=num_empty_masks,
                reject=reject,
            )
        )

    @property
    def kept_outcomes(self) -> list[Outcome]:
        """Those that a later run may take over: none where the source vouches for its files, and all were there."""
        waiting = any(reject.reason == RejectReason.UNREACHABLE for reject in self.rejects)
        return self.outcomes if waiting or self.fetches_once else []

    def record(self, is_last: bool) -> ShardRecord:
        tar, table, _ = shard_files(self.job.directory, self.name)
        long_chars = self.captions.long_chars
        return ShardRecord(
            name=self.name,
            is_last=is_last,
            recipe_fingerprint=self.job.recipe_fingerprint(self.unit),
            contents_fingerprint=source_units.contents_digest(self.lines),
            num_inputs=len(self.lines),
            num_samples=len(self.rows),
            num_upscaled=self.num_upscaled,
            num_copied=sum(row.copied for row in self.rows),
            num_long_captions=sum(any(len(caption) > long_chars for caption in row.captions) for row in self.rows),
            buckets=dict(sorted(Counter(f"{row.bucket_width}x{row.bucket_height}" for row in self.rows).items())),
            bytes=tar.stat().st_size,
            sha256=storage.sha256_file(tar),
            table_sha256=storage.sha256_file(table),
            rejects=self.rejects,
            empty_masks=self.empty_masks,
            num_fallback_captions=self.num_fallback,
            fallback_captions=self.fallback_names,
            num_cut_wildcards=self.num_cut_wildcards,
        )


def _make_shard(
    job: PrepareJob,
    unit: SourceUnit,
    piece: _Piece,
    pool: WorkerPool,
    advance: Callable[[int], Any],
    reachability: Reachability,
) -> ShardRecord:
    """Tar, table, then the receipt that names their hashes: only the receipt makes the shard count."""
    tar_path, table_path, _ = shard_files(job.directory, piece.name)
    shard = _Shard(job, unit, piece.name)
    items = piece.reusing(unit, reachability)
    with storage.committing(tar_path) as file, dataset.tar_writer(file) as tar:
        for item, result in worked(items, job, unit.source, images.prepare_image, pool, reachability):
            shard.add(tar, item, result)
            advance(1)
        if reachability.stopped and not shard.num_made:
            raise reachability.error()  # nothing new: what is there stays
    rule = job.recipes[unit.source.source_name].references if unit.source.references else None
    storage.commit_table(table_path, dataset.sample_table(shard.rows, rule))
    record = shard.record(is_last=not piece.inputs.has_more())
    _commit_receipt(job, unit, record, shard.kept_outcomes)
    return record


def worked(
    items: Iterable[Record | Reject | Reused],
    job: PrepareJob,
    source: SourceConfig,
    function: Callable[[images.ImageTask], Result],
    pool: WorkerPool,
    reachability: Reachability,
) -> Iterator[tuple[Record | Reject | Reused, Result | Lost | None]]:
    """Each input, and what `function` made of it if it is a record; in order, holding no more inputs than are in flight.

    Args:
        source: where the inputs come from; the last of a record's controls are its references.
        reachability: counts the remote inputs.
    """
    waiting: deque[Record | Reject | Reused] = deque()

    def tasks() -> Iterator[images.ImageTask]:
        for item in items:
            waiting.append(item)
            if isinstance(item, Record):
                given = len(source.references) if item.num_references is None else item.num_references
                first = len(item.controls) - given
                yield images.ImageTask(
                    image=item.image,
                    mask=item.mask,
                    controls=item.controls[:first],
                    references=item.controls[first:],
                    made_at=item.made_at,
                    recipe=job.recipes[source.source_name],
                    fetch_seconds=_FETCH_SHARE * job.data.worker_seconds,
                )

    for result in pool.map(function, tasks(), lambda task: task.held_bytes):
        while not isinstance(waiting[0], Record):
            yield waiting.popleft(), None
        item = waiting.popleft()
        if isinstance(item, Record) and item.is_remote:
            problem = result if isinstance(result, (images.ImageProblem, Lost)) else None
            reachability.note(problem.reason if problem else None, problem.detail if problem else "")
        yield item, result
    while waiting:
        yield waiting.popleft(), None


def _rows(shard: _Shard, record: Record, prepared: images.PreparedImage) -> Iterator[tuple[SampleRow, images.Variant]]:
    source = shard.unit.source
    ordinals: Counter[tuple[int, int, bool]] = Counter()
    for variant in prepared.variants:
        place = (variant.placement.bucket_width, variant.placement.bucket_height, variant.flipped)
        key = sample_key(source.source_name, record.identity, (*place, ordinals[place]))
        ordinals[place] += 1
        row = SampleRow(
            key=key,
            source=source.source_name,
            content_sha256=prepared.contents[0],
            image_id=variant.image_id,
            width=prepared.width,
            height=prepared.height,
            flipped=variant.flipped,
            copied=variant.copied,
            perceptual_hash=prepared.perceptual_hash,
            captions=captions.finish(record.captions, source, shard.captions, key),
            repeats=source.repeats * record.repeats,
            role=source.role,
            num_controls=len(variant.controls),
            control_ids=list(variant.control_ids),
            has_mask=variant.mask is not None,
            mask_id=variant.mask_id,
            shard=shard.name,
            reference_ids=list(variant.reference_ids),
            reference_widths=[width for width, _ in variant.reference_sizes],
            reference_heights=[height for _, height in variant.reference_sizes],
            seen_ids=list(variant.seen_ids),
            seen_widths=[width for width, _ in variant.seen_sizes],
            seen_heights=[height for _, height in variant.seen_sizes],
            **asdict(variant.placement),
        )
        yield row, variant


def sample_key(source: str, identity: str, variant: Sequence[int]) -> str:
    """A stable key from source, path and variant: readable, distinct, and without dots, as WebDataset wants it.

    The hash is of the path's bytes, so names that differ in case, normal form or extension stay apart.
    """
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(identity).with_suffix("").as_posix()).strip("-")[-40:]
    unique = storage.digest([source, identity.encode("utf-8", "surrogateescape").hex(), list(variant)], 12)
    return f"{readable}-{unique}" if readable else unique


def _members(row: SampleRow, variant: images.Variant) -> list[tuple[str, bytes]]:
    """(suffix, bytes) of a sample's files, in the order of the tar."""
    members = [(variant.suffix, variant.data)]
    if variant.mask is not None:
        members.append(("mask.png", variant.mask))
    members += [(f"control{number}.png", control) for number, control in enumerate(variant.controls)]
    members += [(f"reference{number}.png", reference) for number, reference in enumerate(variant.references)]
    members += [(f"seen{number}.png", seen) for number, seen in enumerate(variant.seen)]
    members.append(("json", json.dumps(dataset.plain_row(row), sort_keys=True, ensure_ascii=False).encode()))
    return members


def _add_to_tar(tar: dataset.TarWriter, key: str, members: Iterable[tuple[str, bytes]]) -> None:
    for suffix, data in members:
        # One at a time: the writer would sort them, and control10 would come before control2.
        tar.write({"__key__": key, suffix: data})
