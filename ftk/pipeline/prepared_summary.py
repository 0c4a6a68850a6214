"""What a prepared dataset holds, in numbers: from its manifest and its tables, shard by shard, and without an image."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ftk import storage
from ftk.contracts import CaptionFinding, PreparedManifest, Reject, ShardRecord, UnmatchedCaption
from ftk.errors import DatasetError
from ftk.pipeline import control_kinds
from ftk.pipeline.dataset import PreparedDataset, own_settings
from ftk.progress import track

EXAMPLES = 3
_LEADING_TAGS_SHOWN, _LEADING_TAGS_HELD, _LEADING_TAG_CHARS = 10, 50_000, 60
_COLUMNS = [
    *("key", "source", "role", "repeats", "width", "height", "bucket_width", "bucket_height"),
    *("resize_width", "resize_height", "flipped", "has_mask", "num_controls", "captions"),
]
Integers = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The least, the middle and the largest of some numbers."""

    least: float
    median: float
    most: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketSummary:
    """One bucket, in pixels; `share` of all samples, from 0 to 1."""

    width: int
    height: int
    num_samples: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionSummary:
    """Captions as they will be trained on; `captions_a_sample` maps a number of captions to samples.

    `leading_tags`: what stands before the first separator, where captions share it.
    """

    num_captions: int
    captions_a_sample: dict[int, int]
    characters: Spread | None
    leading_tags: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSummary:
    """One source; role and repeats are None when it gave no sample. `settings`: its own, in place of those of `data`."""

    name: str
    num_samples: int
    num_rejects: int
    repeats: int | float | None
    role: str | None
    settings: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectSummary:
    """One reason, and the first inputs that were rejected for it."""

    reason: str
    num_inputs: int
    examples: list[dict[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedSummary:
    """What is in a prepared dataset.

    `crop_loss`: the share of a resized image's pixels that its crop leaves out. `num_duplicates` counts samples whose file
    equals an earlier one, `num_near_duplicates` those that look like one; `duplicates` are the first of both, where `bits`
    is -1 for equal files. `num_controls` counts samples that have control images, `controls` these images by their kind,
    and `num_empty_masks` samples whose mask is black all over. `fallback_captions` are the first images that took their
    source's `caption:`, `unmatched_captions` the first text files that are no image's caption.
    """

    directory: str
    fingerprint: str
    num_inputs: int
    num_samples: int
    num_rejects: int
    num_shards: int
    num_bytes: int
    num_upscaled: int
    num_copied: int
    num_flipped: int
    num_masks: int
    num_empty_masks: int
    num_controls: int
    controls: dict[str, int]
    num_long_captions: int
    num_duplicates: int
    num_near_duplicates: int
    num_fallback_captions: int
    num_unmatched_captions: int
    num_cut_wildcards: int
    crop_loss: Spread | None
    original_megapixels: Spread | None
    buckets: list[BucketSummary]
    captions: CaptionSummary
    sources: list[SourceSummary]
    rejects: list[RejectSummary]
    duplicates: list[dict[str, Any]]
    fallback_captions: list[str]
    unmatched_captions: list[UnmatchedCaption]
    hints: list[str]
    caption_findings: list[CaptionFinding]


def summarise(dataset: PreparedDataset) -> PreparedSummary:
    """The dataset's numbers.

    Raises:
        DatasetError: a table is missing or damaged.
    """
    return summary(dataset, scan(dataset), pairs(dataset, EXAMPLES * 2))


class _Numbers:
    """Integers of all samples, four bytes each: medians and plots need them all."""

    def __init__(self) -> None:
        self._pieces: list[Integers] = [np.zeros(0, np.int32)]

    def add(self, column: Any) -> None:
        self._pieces.append(column.to_numpy().astype(np.int32))

    def joined(self) -> Integers:
        self._pieces = [np.concatenate(self._pieces)]
        return self._pieces[0]


@dataclass(slots=True)
class Scan:
    """What one pass over the tables gives; `shard_of` says where the samples lie that were asked for."""

    counts: Counter[str] = field(default_factory=Counter)
    controls: Counter[str] = field(default_factory=Counter)
    sources: Counter[tuple[str, str, int | float]] = field(default_factory=Counter)
    captions_a_sample: Counter[int] = field(default_factory=Counter)
    leading_tags: Counter[str] = field(default_factory=Counter)
    widths: _Numbers = field(default_factory=_Numbers)
    heights: _Numbers = field(default_factory=_Numbers)
    kept_pixels: _Numbers = field(default_factory=_Numbers)
    resized_pixels: _Numbers = field(default_factory=_Numbers)
    characters: _Numbers = field(default_factory=_Numbers)
    shard_of: dict[str, str] = field(default_factory=dict)

    def add(self, table: pa.Table, separator: str) -> None:
        self.widths.add(table["width"])
        self.heights.add(table["height"])
        self.kept_pixels.add(pc.multiply(table["bucket_width"], table["bucket_height"]))
        self.resized_pixels.add(pc.multiply(table["resize_width"], table["resize_height"]))
        self.counts["flipped"] += _sum(table["flipped"])
        self.counts["masks"] += _sum(table["has_mask"])
        self.counts["controls"] += _sum(pc.greater(table["num_controls"], 0))
        self.captions_a_sample.update(pc.list_value_length(table["captions"]).to_pylist())
        self.sources.update(zip(*(table[name].to_pylist() for name in ("source", "role", "repeats")), strict=True))
        captions = pc.list_flatten(table["captions"])
        self.characters.add(pc.utf8_length(captions))
        self._add_leading_tags(captions, separator)

    def _add_leading_tags(self, captions: Any, separator: str) -> None:
        tagged = captions.filter(pc.match_substring(captions, separator))
        heads = pc.utf8_trim_whitespace(pc.list_element(pc.split_pattern(tagged, separator, max_splits=1), 0))
        short = heads.filter(pc.less_equal(pc.utf8_length(heads), _LEADING_TAG_CHARS))
        for counted in pc.value_counts(short).to_pylist():
            self.leading_tags[counted["values"]] += counted["counts"]
        # Captions that all start differently would fill the memory; tags that many share stay.
        if len(self.leading_tags) > _LEADING_TAGS_HELD:
            self.leading_tags = Counter(dict(self.leading_tags.most_common(_LEADING_TAGS_HELD // 2)))


def _sum(column: Any) -> int:
    return int(pc.sum(column).as_py() or 0)


def scan(dataset: PreparedDataset, wanted: Collection[str] = ()) -> Scan:
    """One pass over all tables; `wanted` are keys whose shards are to be found."""
    scan = Scan()
    keys = pa.array(sorted(wanted), pa.string())
    with track("read", len(dataset.manifest.shards), "shard") as progress:
        for shard in dataset.manifest.shards:
            table = samples(dataset, shard, _COLUMNS)
            # A shard holds samples of one source.
            source = table["source"][0].as_py() if len(table) else None
            scan.add(table, caption_settings(dataset.manifest, source).get("tag_separator") or ",")
            settings = source_settings(dataset.manifest, source or "")
            controls = control_kinds.count(len(table), _sum(table["num_controls"]), settings)
            scan.controls.update(controls)
            found = table["key"].filter(pc.is_in(table["key"], value_set=keys))
            scan.shard_of.update(dict.fromkeys(found.to_pylist(), shard.name))
            progress.advance(1)
    return scan


def samples(dataset: PreparedDataset, shard: ShardRecord, columns: list[str] | None = None) -> pa.Table:
    return _table(dataset.directory / "shards" / f"{shard.name}.parquet", columns, shard.table_sha256)


def _table(path: Path, columns: list[str] | None = None, sha256: str | None = None) -> pa.Table:
    """A table, or some of its columns; `DatasetError` when it is missing or damaged."""
    try:
        if sha256 is None or storage.sha256_file(path) == sha256:
            return storage.read_table(path, columns)
        problem = "it does not have its checksum"
    except FileNotFoundError:
        problem = "it is missing"
    except (pa.ArrowException, OSError) as error:
        problem = str(error)
    raise DatasetError(f"{path} is damaged: {problem}. Run `ftk prepare RUN.yaml` again: it makes what is damaged anew.")


def pairs(dataset: PreparedDataset, most: int) -> list[dict[str, Any]]:
    """The first pairs of equal files and of images that look alike, at most half of them equal where there are more of both."""
    table = _table(dataset.directory / "duplicates.parquet")
    equal = pc.less(table["bits"], 0)
    num_alike = len(table) - _sum(equal)
    taken: list[dict[str, Any]] = table.filter(equal).slice(0, max(most // 2, most - num_alike)).to_pylist()
    return [*taken, *table.filter(pc.invert(equal)).slice(0, most - len(taken)).to_pylist()]


def summary(dataset: PreparedDataset, scan: Scan, pairs: list[dict[str, Any]]) -> PreparedSummary:
    manifest = dataset.manifest
    losses = 1 - scan.kept_pixels.joined() / scan.resized_pixels.joined()
    megapixels = scan.widths.joined().astype(np.float64) * scan.heights.joined() / 1e6
    same = (
        *("fingerprint", "num_inputs", "num_samples", "num_rejects", "num_upscaled", "num_copied", "num_empty_masks"),
        *(
            "num_fallback_captions",
            "fallback_captions",
            "num_unmatched_captions",
            "unmatched_captions",
            "hints",
            "caption_findings",
        ),
        "num_cut_wildcards",
    )
    return PreparedSummary(
        directory=str(dataset.directory),
        **{name: getattr(manifest, name) for name in same},
        num_shards=len(manifest.shards),
        num_bytes=sum(shard.bytes for shard in manifest.shards),
        num_flipped=scan.counts["flipped"],
        num_masks=scan.counts["masks"],
        num_controls=scan.counts["controls"],
        controls=dict(sorted(scan.controls.items())),
        num_long_captions=manifest.num_long_captions,
        num_duplicates=manifest.num_duplicates,
        num_near_duplicates=manifest.num_near_duplicates,
        crop_loss=_spread(losses),
        original_megapixels=_spread(megapixels),
        buckets=named_buckets(manifest.buckets),
        captions=CaptionSummary(
            num_captions=len(scan.characters.joined()),
            captions_a_sample=dict(sorted(scan.captions_a_sample.items())),
            characters=_spread(scan.characters.joined()),
            leading_tags=_shared(scan.leading_tags, len(scan.characters.joined())),
        ),
        sources=_sources(manifest, scan.sources),
        rejects=rejects_by_reason(manifest),
        duplicates=pairs,
    )


def _spread(numbers: npt.NDArray[Any]) -> Spread | None:
    if not len(numbers):
        return None
    return Spread(least=float(numbers.min()), median=float(np.median(numbers)), most=float(numbers.max()))


def named_buckets(counted: Mapping[str, int]) -> list[BucketSummary]:
    """Of samples by WIDTHxHEIGHT: from the tallest to the widest."""
    sizes = (name.split("x") for name in counted)
    return buckets([(int(width), int(height), number) for (width, height), number in zip(sizes, counted.values(), strict=True)])


def buckets(counted: Sequence[tuple[int, int, int]]) -> list[BucketSummary]:
    """Of (width, height, samples): from the tallest to the widest."""
    total = sum(number for *_, number in counted)
    return [
        BucketSummary(width=width, height=height, num_samples=number, share=number / total)
        for width, height, number in sorted(counted, key=lambda one: (one[0] / one[1], one[0]))
    ]


def length_bins(lengths: Integers, most: int = 24) -> list[tuple[int, int | None, int]]:
    """Captions by length: (from, below, captions) in steps of 1, 2 or 5 times a power of ten; the last bin may have no end."""
    if not len(lengths):
        return []
    # A few very long captions would leave the rest in one bar.
    top = max(min(float(lengths.max()), max(float(np.percentile(lengths, 95)), 3 * float(np.median(lengths)))), 1.0)
    step = next(size for power in range(9) for one in (1, 2, 5) if (size := one * 10**power) * most >= top)
    edges = list(range(0, int(top) + step, step))
    numbers = np.bincount(np.minimum(lengths // step, len(edges) - 1), minlength=len(edges))
    ends = [*edges[1:], edges[-1] + step if lengths.max() < edges[-1] + step else None]
    return list(zip(edges, ends, numbers.tolist(), strict=True))


def _shared(leading_tags: Counter[str], num_captions: int) -> dict[str, int]:
    """Those that at least three captions, and one in twenty, start with."""
    return {tag: number for tag, number in leading_tags.most_common(_LEADING_TAGS_SHOWN) if number >= max(3, num_captions / 20)}


def _sources(manifest: PreparedManifest, counted: Counter[tuple[str, str, int | float]]) -> list[SourceSummary]:
    rejected = Counter(reject.source for reject in rejects(manifest))
    without_samples = sorted(rejected.keys() - {name for name, _, _ in counted})
    rows: list[tuple[str, str | None, int | float | None, int]] = [
        (*group, number) for group, number in sorted(counted.items())
    ]
    rows += [(name, None, None, 0) for name in without_samples]
    return [
        SourceSummary(
            name=name,
            num_samples=number,
            # Once: a source whose folders say how often they are repeated has a row for each number.
            num_rejects=rejected.pop(name, 0),
            repeats=repeats,
            role=role,
            settings=own_settings(source_settings(manifest, name)),
        )
        for name, role, repeats, number in rows
    ]


def rejects(manifest: PreparedManifest) -> Iterator[Reject]:
    return (reject for shard in manifest.shards for reject in shard.rejects)


def rejects_by_reason(manifest: PreparedManifest) -> list[RejectSummary]:
    """The most frequent reason first."""
    examples: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
    for reject in rejects(manifest):
        if len(examples[reject.reason]) < EXAMPLES:
            examples[reject.reason].append({"source": reject.source, "path": reject.path, "detail": reject.detail})
    return [
        RejectSummary(reason=reason, num_inputs=number, examples=examples[reason])
        for reason, number in sorted(manifest.rejects_by_reason.items(), key=lambda item: (-item[1], item[0]))
    ]


def caption_settings(manifest: PreparedManifest, source: str | None = None) -> Mapping[str, Any]:
    """As the recipe has them for all, or for one source with its own in their place."""
    settings = _mapping(manifest.recipe.get("captions"))
    return settings if source is None else {**settings, **_mapping(source_settings(manifest, source).get("caption_settings"))}


def source_settings(manifest: PreparedManifest, source: str) -> Mapping[str, Any]:
    """What the recipe says of a source."""
    return _mapping(_mapping(manifest.recipe.get("sources")).get(source))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
