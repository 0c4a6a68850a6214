"""What a prepared dataset holds: its numbers, and a page to look at it. Tables are read shard by shard, images to show them."""

import base64
import hashlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from ftk import storage
from ftk.contracts import PreparedManifest, Reject, SampleRow, ShardRecord
from ftk.errors import DatasetError
from ftk.pipeline.dataset import PreparedDataset
from ftk.progress import human_bytes, track

_EXAMPLES = 3
_SHEET_OF_A_BUCKET, _SHEET_OF_ALL, _SHEET_LEAST = 24, 360, 4
_MOST_REJECTS = 500
_MOST_PAIRS = 100
_MOST_CAPTIONS, _CAPTION_CHARS = 5, 400
_THUMBNAIL_PX = 192
# To show an image its whole shard is read and verified; of a larger dataset some shards are shown, so that it takes a minute.
_READ_BYTES = 4 << 30
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
    """One source; role and repeats are None when it gave no sample."""

    name: str
    num_samples: int
    num_rejects: int
    repeats: int | None
    role: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectSummary:
    """One reason, and the first inputs that were rejected for it."""

    reason: str
    num_inputs: int
    examples: list[dict[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What is in a prepared dataset.

    `crop_loss`: the share of a resized image's pixels that its crop leaves out. `num_duplicates` counts samples whose file
    equals an earlier one, `num_near_duplicates` those that look like one; `duplicates` are the first of both, where `bits`
    is -1 for equal files. `num_controls` counts samples that have control images.
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
    num_controls: int
    num_long_captions: int
    num_duplicates: int
    num_near_duplicates: int
    crop_loss: Spread | None
    original_megapixels: Spread | None
    buckets: list[BucketSummary]
    captions: CaptionSummary
    sources: list[SourceSummary]
    rejects: list[RejectSummary]
    duplicates: list[dict[str, Any]]


def summarise(dataset: PreparedDataset) -> Summary:
    """The dataset's numbers.

    Raises:
        DatasetError: a table is missing or damaged.
    """
    return _summary(dataset, _scan(dataset), _pairs(dataset, _EXAMPLES * 2))


def page(dataset: PreparedDataset) -> tuple[Summary, bytes]:
    """The dataset's numbers, and one self-contained HTML page of them with samples to look at.

    Raises:
        DatasetError: a table, or a shard that is shown, is missing or damaged.
    """
    pairs = _pairs(dataset, _MOST_PAIRS)
    scan = _scan(dataset, {pair[side] for pair in pairs for side in ("key", "like")})
    summary = _summary(dataset, scan, pairs[: _EXAMPLES * 2])
    opened = _shards_to_open(dataset.manifest)
    sheets = _sheets(dataset, opened)
    html = _template().render(
        summary=summary,
        name="/".join(dataset.directory.resolve().parts[-2:]),
        recipe=json.dumps(dataset.manifest.recipe, indent=2, ensure_ascii=False),
        long_chars=_caption_settings(dataset.manifest).get("long_chars"),
        sizes=_size_plot(scan, summary.buckets),
        lengths=_length_bins(scan.characters.joined()),
        sheets=[(bucket, sheets[f"{bucket.width}x{bucket.height}"]) for bucket in summary.buckets],
        num_opened=len(opened),
        rejects=_some_rejects(dataset.manifest),
        pairs=_pair_cards(dataset, pairs, scan.shard_of, {shard.name for shard in opened}),
    )
    # A folder's name may hold bytes that are no UTF-8.
    return summary, html.encode("utf-8", "backslashreplace")


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
class _Scan:
    """What one pass over the tables gives; `shard_of` says where the samples lie that were asked for."""

    counts: Counter[str] = field(default_factory=Counter)
    sources: Counter[tuple[str, str, int]] = field(default_factory=Counter)
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


def _scan(dataset: PreparedDataset, wanted: Collection[str] = ()) -> _Scan:
    """One pass over all tables; `wanted` are keys whose shards are to be found."""
    scan = _Scan()
    keys = pa.array(sorted(wanted), pa.string())
    separator = _caption_settings(dataset.manifest).get("tag_separator") or ","
    with track("read", len(dataset.manifest.shards), "shard") as progress:
        for shard in dataset.manifest.shards:
            table = _samples(dataset, shard, _COLUMNS)
            scan.add(table, separator)
            found = table["key"].filter(pc.is_in(table["key"], value_set=keys))
            scan.shard_of.update(dict.fromkeys(found.to_pylist(), shard.name))
            progress.advance(1)
    return scan


def _samples(dataset: PreparedDataset, shard: ShardRecord, columns: list[str] | None = None) -> pa.Table:
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


def _pairs(dataset: PreparedDataset, most: int) -> list[dict[str, Any]]:
    """The first pairs of equal files and of images that look alike, at most half of them equal where there are more of both."""
    table = _table(dataset.directory / "duplicates.parquet")
    equal = pc.less(table["bits"], 0)
    num_alike = len(table) - _sum(equal)
    taken: list[dict[str, Any]] = table.filter(equal).slice(0, max(most // 2, most - num_alike)).to_pylist()
    return [*taken, *table.filter(pc.invert(equal)).slice(0, most - len(taken)).to_pylist()]


def _summary(dataset: PreparedDataset, scan: _Scan, pairs: list[dict[str, Any]]) -> Summary:
    manifest = dataset.manifest
    losses = 1 - scan.kept_pixels.joined() / scan.resized_pixels.joined()
    megapixels = scan.widths.joined().astype(np.float64) * scan.heights.joined() / 1e6
    same = ("fingerprint", "num_inputs", "num_samples", "num_rejects", "num_upscaled", "num_copied")
    return Summary(
        directory=str(dataset.directory),
        **{name: getattr(manifest, name) for name in same},
        num_shards=len(manifest.shards),
        num_bytes=sum(shard.bytes for shard in manifest.shards),
        num_flipped=scan.counts["flipped"],
        num_masks=scan.counts["masks"],
        num_controls=scan.counts["controls"],
        num_long_captions=manifest.num_long_captions,
        num_duplicates=manifest.num_duplicates,
        num_near_duplicates=manifest.num_near_duplicates,
        crop_loss=_spread(losses),
        original_megapixels=_spread(megapixels),
        buckets=_buckets(manifest),
        captions=CaptionSummary(
            num_captions=len(scan.characters.joined()),
            captions_a_sample=dict(sorted(scan.captions_a_sample.items())),
            characters=_spread(scan.characters.joined()),
            leading_tags=_shared(scan.leading_tags, len(scan.characters.joined())),
        ),
        sources=_sources(manifest, scan.sources),
        rejects=_rejects_by_reason(manifest),
        duplicates=pairs,
    )


def _spread(numbers: npt.NDArray[Any]) -> Spread | None:
    if not len(numbers):
        return None
    return Spread(least=float(numbers.min()), median=float(np.median(numbers)), most=float(numbers.max()))


def _buckets(manifest: PreparedManifest) -> list[BucketSummary]:
    """From the tallest to the widest."""
    sized = [(*map(int, name.split("x")), number) for name, number in manifest.buckets.items()]
    return [
        BucketSummary(width=width, height=height, num_samples=number, share=number / manifest.num_samples)
        for width, height, number in sorted(sized, key=lambda one: (one[0] / one[1], one[0]))
    ]


def _shared(leading_tags: Counter[str], num_captions: int) -> dict[str, int]:
    """Those that at least three captions, and one in twenty, start with."""
    return {tag: number for tag, number in leading_tags.most_common(_LEADING_TAGS_SHOWN) if number >= max(3, num_captions / 20)}


def _sources(manifest: PreparedManifest, counted: Counter[tuple[str, str, int]]) -> list[SourceSummary]:
    rejected = Counter(reject.source for reject in _rejects(manifest))
    without_samples = sorted(rejected.keys() - {name for name, _, _ in counted})
    return [
        SourceSummary(name=name, num_samples=number, num_rejects=rejected[name], repeats=repeats, role=role)
        for (name, role, repeats), number in sorted(counted.items())
    ] + [
        SourceSummary(name=name, num_samples=0, num_rejects=rejected[name], repeats=None, role=None) for name in without_samples
    ]


def _rejects(manifest: PreparedManifest) -> Iterator[Reject]:
    return (reject for shard in manifest.shards for reject in shard.rejects)


def _rejects_by_reason(manifest: PreparedManifest) -> list[RejectSummary]:
    """The most frequent reason first."""
    examples: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
    for reject in _rejects(manifest):
        if len(examples[reject.reason]) < _EXAMPLES:
            examples[reject.reason].append({"source": reject.source, "path": reject.path, "detail": reject.detail})
    return [
        RejectSummary(reason=reason, num_inputs=number, examples=examples[reason])
        for reason, number in sorted(manifest.rejects_by_reason.items(), key=lambda item: (-item[1], item[0]))
    ]


def _caption_settings(manifest: PreparedManifest) -> Mapping[str, Any]:
    settings = manifest.recipe.get("captions")
    return settings if isinstance(settings, dict) else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Card:
    """One sample as the page shows it; `image` is a data URI."""

    row: SampleRow
    image: str
    captions: list[str]
    badges: list[str]
    loss: float


def _shards_to_open(manifest: PreparedManifest) -> list[ShardRecord]:
    """All shards, or of a large dataset some at even distances, and more where a bucket would have no sample."""
    shards = manifest.shards
    total_bytes = sum(shard.bytes for shard in shards)
    number = len(shards) if total_bytes <= _READ_BYTES else max(1, len(shards) * _READ_BYTES // total_bytes)
    chosen = set(_evenly(len(shards), number))
    covered = {bucket for position in chosen for bucket in shards[position].buckets}
    for position, shard in enumerate(shards):
        if not shard.buckets.keys() <= covered:
            chosen.add(position)
            covered |= shard.buckets.keys()
    return [shards[position] for position in sorted(chosen)]


def _evenly(number: int, most: int) -> list[int]:
    """At most `most` positions out of `number`, at even distances."""
    shown = min(number, most)
    return [position * number // shown for position in range(shown)]


def _sheets(dataset: PreparedDataset, opened: Sequence[ShardRecord]) -> dict[str, list[_Card]]:
    """For each bucket, samples from all over the opened shards."""
    picks = _picks(dataset.manifest, opened)
    total = sum(len(positions) for of_shard in picks.values() for positions in of_shard.values())
    sheets: defaultdict[str, list[_Card]] = defaultdict(list)
    with track("draw", total, "image") as progress:
        for shard in opened:
            for row in _picked_rows(dataset, shard, picks[shard.name]) if shard.name in picks else ():
                sheets[f"{row.bucket_width}x{row.bucket_height}"].append(_card(dataset, row))
                progress.advance(1)
    return sheets


def _picks(manifest: PreparedManifest, opened: Sequence[ShardRecord]) -> dict[str, dict[str, list[int]]]:
    """By shard and bucket: which of the shard's samples in that bucket to show, counted from 0."""
    most = max(_SHEET_LEAST, min(_SHEET_OF_A_BUCKET, _SHEET_OF_ALL // max(1, len(manifest.buckets))))
    picks: defaultdict[str, dict[str, list[int]]] = defaultdict(dict)
    for bucket in manifest.buckets:
        positions = _evenly(sum(shard.buckets.get(bucket, 0) for shard in opened), most)
        first = 0
        for shard in opened:
            end = first + shard.buckets.get(bucket, 0)
            if inside := [position - first for position in positions if first <= position < end]:
                picks[shard.name][bucket] = inside
            first = end
    return picks


def _picked_rows(dataset: PreparedDataset, shard: ShardRecord, picks: Mapping[str, Sequence[int]]) -> list[SampleRow]:
    table = _samples(dataset, shard)
    widths, heights = (table[name].to_numpy() for name in ("bucket_width", "bucket_height"))
    chosen: list[int] = []
    for bucket, positions in picks.items():
        width, height = map(int, bucket.split("x"))
        chosen.extend(np.flatnonzero((widths == width) & (heights == height))[list(positions)].tolist())
    return [SampleRow(**row) for row in table.take(sorted(chosen)).to_pylist()]


def _card(dataset: PreparedDataset, row: SampleRow) -> _Card:
    with Image.open(io.BytesIO(dataset.image_bytes(row))) as image:
        image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX), Image.Resampling.LANCZOS, reducing_gap=2.0)
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=80)
    upscaled = row.resize_width > row.width or row.resize_height > row.height
    flags = {
        "upscaled": upscaled,
        "flipped": row.flipped,
        "copied": row.copied,
        "mask": row.has_mask,
        f"{row.num_controls} control{'s' if row.num_controls > 1 else ''}": row.num_controls > 0,
    }
    return _Card(
        row=row,
        image="data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(),
        captions=[_shortened(caption) for caption in row.captions[:_MOST_CAPTIONS]],
        badges=[badge for badge, is_set in flags.items() if is_set],
        loss=1 - row.bucket_width * row.bucket_height / (row.resize_width * row.resize_height),
    )


def _shortened(caption: str) -> str:
    return caption if len(caption) <= _CAPTION_CHARS else f"{caption[:_CAPTION_CHARS]}… ({len(caption):,} characters)"


def _pair_cards(
    dataset: PreparedDataset, pairs: Sequence[dict[str, Any]], shard_of: Mapping[str, str], opened: set[str]
) -> list[dict[str, Any]]:
    """Each pair with its two cards; without them once too many shards would have to be read."""
    shards = {shard.name: shard for shard in dataset.manifest.shards}
    left_bytes = _READ_BYTES
    wanted: defaultdict[str, set[str]] = defaultdict(set)
    for pair in pairs:
        places = {pair[side]: shard_of[pair[side]] for side in ("like", "key") if pair[side] in shard_of}
        cost = sum(shards[name].bytes for name in set(places.values()) - opened)
        if cost <= left_bytes:
            left_bytes -= cost
            opened = opened | set(places.values())
            for key, name in places.items():
                wanted[name].add(key)
    cards: dict[str, _Card] = {}
    with track("draw pairs", sum(map(len, wanted.values())), "image") as progress:
        for name, keys in sorted(wanted.items()):
            table = _samples(dataset, shards[name])
            for row in table.filter(pc.is_in(table["key"], value_set=pa.array(sorted(keys)))).to_pylist():
                cards[row["key"]] = _card(dataset, SampleRow(**row))
                progress.advance(1)
    return [{**pair, "earlier": cards.get(pair["like"]), "later": cards.get(pair["key"])} for pair in pairs]


def _some_rejects(manifest: PreparedManifest) -> list[Reject]:
    """As many of each reason as there is room for; the rarest reason first, which the others would bury."""
    groups: dict[str, list[Reject]] = {group.reason: [] for group in reversed(_rejects_by_reason(manifest))}
    for reject in _rejects(manifest):
        if len(groups[reject.reason]) < _MOST_REJECTS:
            groups[reject.reason].append(reject)
    shown: list[Reject] = []
    for position, group in enumerate(groups.values()):
        shown += group[: (_MOST_REJECTS - len(shown)) // (len(groups) - position)]
    return shown


def _size_plot(scan: _Scan, buckets: Sequence[BucketSummary]) -> dict[str, Any]:
    """Original sizes on two logarithmic axes from 0 to 1: (x, y, width, height, samples) of each cell that has any."""
    sides = np.stack([scan.widths.joined(), scan.heights.joined()])
    if not sides.size:
        return {}
    all_sides = [int(sides.min()), int(sides.max()), *(side for one in buckets for side in (one.width, one.height))]
    low, high = int(np.floor(np.log2(min(all_sides)))), int(np.ceil(np.log2(max(all_sides) + 1)))
    cells_an_octave = 12
    cells, numbers = np.unique(np.round(np.log2(sides) * cells_an_octave), axis=1, return_counts=True)
    places = (cells / cells_an_octave - low) / (high - low)
    pixels = np.round(2 ** (cells / cells_an_octave))
    return {
        "dots": list(zip(*places.tolist(), *pixels.astype(int).tolist(), numbers.tolist(), strict=True)),
        "buckets": [
            ((np.log2(one.width) - low) / (high - low), (np.log2(one.height) - low) / (high - low), one) for one in buckets
        ],
        "ticks": [(2**power, (power - low) / (high - low)) for power in range(low, high + 1)],
    }


def _length_bins(characters: Integers) -> list[tuple[int, int | None, int]]:
    """Captions by length: (from, below, captions) in steps of 1, 2 or 5 times a power of ten; the last bin has no end."""
    if not len(characters):
        return []
    # A few very long captions would leave the rest in one bar.
    top = max(min(float(characters.max()), max(float(np.percentile(characters, 95)), 3 * float(np.median(characters)))), 1.0)
    step = next(size for power in range(9) for one in (1, 2, 5) if (size := one * 10**power) * 24 >= top)
    edges = list(range(0, int(top) + step, step))
    numbers = np.bincount(np.minimum(characters // step, len(edges) - 1), minlength=len(edges))
    ends = [*edges[1:], edges[-1] + step if characters.max() < edges[-1] + step else None]
    return list(zip(edges, ends, numbers.tolist(), strict=True))


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ftk.pipeline"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["commas"] = lambda number: f"{number:,}"
    environment.filters["percent"] = lambda share: f"{share:.1%}"
    environment.filters["number"] = lambda value: f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
    environment.filters["bytes"] = human_bytes
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode()
    return environment.get_template("prepared.html")
