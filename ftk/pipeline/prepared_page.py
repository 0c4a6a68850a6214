"""A prepared dataset as one HTML page to look at: its numbers, contact sheets with crops, rejects, pairs that look alike."""

import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from ftk.contracts import PreparedManifest, Reject, SampleRow, ShardRecord
from ftk.pipeline import control_kinds, page_parts, prepared_summary
from ftk.pipeline.dataset import PreparedDataset
from ftk.progress import track

_SHEET_OF_A_BUCKET, _SHEET_OF_ALL, _SHEET_LEAST = 24, 360, 4
_MOST_REJECTS = 500
_MOST_PAIRS = 100
_THUMBNAIL_PX = 192
_CONTROL_PX = 128
# To show an image its whole shard is read and verified; of a larger dataset some shards are shown, so that it takes a minute.
_READ_BYTES = 4 << 30


def page(dataset: PreparedDataset) -> tuple[prepared_summary.PreparedSummary, bytes]:
    """The dataset's numbers, and one self-contained HTML page of them with samples to look at.

    Raises:
        DatasetError: a table, or a shard that is shown, is missing or damaged.
    """
    pairs = prepared_summary.pairs(dataset, _MOST_PAIRS)
    scan = prepared_summary.scan(dataset, {pair[side] for pair in pairs for side in ("key", "like")})
    summary = prepared_summary.summary(dataset, scan, pairs[: prepared_summary.EXAMPLES * 2])
    opened = _shards_to_open(dataset.manifest)
    sheets = _sheets(dataset, opened)
    html = _template().render(
        summary=summary,
        name=page_parts.short_name(dataset.directory),
        recipe=json.dumps(dataset.manifest.recipe, indent=2, ensure_ascii=False),
        long_chars=_long_chars(dataset.manifest),
        has_own_settings=any(source.settings for source in summary.sources),
        sizes=_size_plot(scan, summary.buckets),
        lengths=prepared_summary.length_bins(scan.characters.joined()),
        sheets=[(bucket, sheets[f"{bucket.width}x{bucket.height}"]) for bucket in summary.buckets],
        num_opened=len(opened),
        rejects=_some_rejects(dataset.manifest),
        pairs=_pair_cards(dataset, pairs, scan.shard_of, {shard.name for shard in opened}),
    )
    return summary, page_parts.encoded(html)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Card:
    """One sample as the page shows it; `image` is a data URI, and `controls` are those of control images, each with a label."""

    row: SampleRow
    image: str
    controls: list[tuple[str, str]]
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
    table = prepared_summary.samples(dataset, shard)
    widths, heights = (table[name].to_numpy() for name in ("bucket_width", "bucket_height"))
    chosen: list[int] = []
    for bucket, positions in picks.items():
        width, height = map(int, bucket.split("x"))
        chosen.extend(np.flatnonzero((widths == width) & (heights == height))[list(positions)].tolist())
    return [SampleRow(**row) for row in table.take(sorted(chosen)).to_pylist()]


def _card(dataset: PreparedDataset, row: SampleRow) -> _Card:
    with Image.open(io.BytesIO(dataset.image_bytes(row))) as image:
        thumbnail = page_parts.thumbnail(image, _THUMBNAIL_PX)
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
        image=thumbnail,
        controls=_controls(dataset, row),
        captions=page_parts.shortened(row.captions),
        badges=[badge for badge, is_set in flags.items() if is_set],
        loss=1 - row.bucket_width * row.bucket_height / (row.resize_width * row.resize_height),
    )


def _controls(dataset: PreparedDataset, row: SampleRow) -> list[tuple[str, str]]:
    source = prepared_summary.source_settings(dataset.manifest, row.source)
    labels = control_kinds.labels(source)
    if source.get("optional") or len(labels) != row.num_controls:
        # An image may lack some, or have several of one kind: which of them these are is not known.
        labels = [f"control {number}" for number in range(row.num_controls)]
    thumbnails = []
    for data in dataset.control_bytes(row):
        with Image.open(io.BytesIO(data)) as image:
            thumbnails.append(page_parts.thumbnail(image, _CONTROL_PX))
    return list(zip(labels, thumbnails, strict=True))


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
            table = prepared_summary.samples(dataset, shards[name])
            for row in table.filter(pc.is_in(table["key"], value_set=pa.array(sorted(keys)))).to_pylist():
                cards[row["key"]] = _card(dataset, SampleRow(**row))
                progress.advance(1)
    return [{**pair, "earlier": cards.get(pair["like"]), "later": cards.get(pair["key"])} for pair in pairs]


def _long_chars(manifest: PreparedManifest) -> int | None:
    """Above how many characters a caption counts as long; None where sources differ in it."""
    numbers = {
        prepared_summary.caption_settings(manifest, source).get("long_chars")
        for source in (None, *manifest.recipe.get("sources", {}))
    }
    return numbers.pop() if len(numbers) == 1 else None


def _some_rejects(manifest: PreparedManifest) -> list[Reject]:
    """As many of each reason as there is room for; the rarest reason first, which the others would bury."""
    groups: dict[str, list[Reject]] = {group.reason: [] for group in reversed(prepared_summary.rejects_by_reason(manifest))}
    for reject in prepared_summary.rejects(manifest):
        if len(groups[reject.reason]) < _MOST_REJECTS:
            groups[reject.reason].append(reject)
    shown: list[Reject] = []
    for position, group in enumerate(groups.values()):
        shown += group[: (_MOST_REJECTS - len(shown)) // (len(groups) - position)]
    return shown


def _size_plot(scan: prepared_summary.Scan, buckets: Sequence[prepared_summary.BucketSummary]) -> dict[str, Any]:
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


def _template() -> jinja2.Template:
    return page_parts.environment("ftk.pipeline").get_template("prepared.html")
