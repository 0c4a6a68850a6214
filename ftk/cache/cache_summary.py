"""What a cache holds, in numbers: from its tables, and from a bounded sample of its latents.

Shape legend: C latent channels, h w latent cells, N cells of one item.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ftk.cache.shards import KINDS, RECEIPT, SHARD
from ftk.cache.store import CacheStore
from ftk.configs.schema import negative_key
from ftk.contracts import CacheManifest
from ftk.models import base as models
from ftk.pipeline.prepared_summary import BucketSummary, buckets, length_bins
from ftk.progress import track

SEED = 0
_LATENTS_READ = 512
_NORMAL_MEAN, _NORMAL_STD = 0.5, (0.5, 2.0)
# Values of latents are first counted in fine steps over a wide range, then shown over the range where they lie.
_FINE_A_UNIT, _WIDEST, _NARROWEST = 32, 64.0, 0.5
_VALUE_BINS, _SHARE_SHOWN = 32, 0.999

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageSummary:
    """Items of one kind on disk.

    `num_bytes` is of all its files. No sample and no prompt names the `num_unnamed` items, nor the view the files with
    `unlisted_bytes` (shards of other encoders, set aside, or left over): `ftk gc` removes both.
    """

    kind: str
    num_items: int
    num_shards: int
    num_bytes: int
    num_unnamed: int
    unnamed_bytes: int
    unlisted_bytes: int

    @property
    def garbage_bytes(self) -> int:
        """What `ftk gc` would remove."""
        return self.unnamed_bytes + self.unlisted_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthSummary:
    """Captions of all samples by length in tokens; those at the encoder's `limit` were cut, or end just there.

    `histogram`: (from, below, captions); the last bin may have no end.
    """

    num_captions: int
    least: int
    median: float
    percentile_95: float
    most: int
    limit: int | None
    num_at_limit: int
    histogram: list[tuple[int, int | None, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelSummary:
    """One latent channel: mean and standard deviation of the posterior means, and the mean posterior std."""

    mean: float
    std: float
    posterior_std: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSummary:
    """Latents of a seeded sample of the images and control images, every cell of an item alike.

    Values that are not finite are counted, in means and stds, and left out of the rest. `largest` is the largest absolute
    value of a mean. `histogram` of the means: (from, below, values), where the first and the last bin have no end.
    """

    num_read: int
    dtype: str
    mean: float
    std: float
    posterior_std: float
    largest: float
    non_finite_share: float
    is_normalised: bool
    channels: list[ChannelSummary]
    histogram: list[tuple[float | None, float | None, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSummary:
    """What is in a cache. Images, control images, masks and texts are counted once each, however many samples name them.

    `num_texts` leaves out the empty caption and the prompts, which no sample needs to name. `encoders` are the parts of
    each fingerprint, and the fingerprint.
    """

    directory: str
    digest: str
    family: str
    num_samples: int
    num_images: int
    num_controls: int
    num_masks: int
    num_texts: int
    storage: list[StorageSummary]
    buckets: list[BucketSummary]
    text_lengths: LengthSummary
    latents: LatentSummary
    encoders: dict[str, dict[str, Any]]
    prompts: list[str]
    prepared_fingerprint: str


def summarise(store: CacheStore) -> CacheSummary:
    """The cache's numbers.

    Raises:
        CacheError: an item that is read is damaged.
    """
    manifest, table = store.manifest, store.table
    images, texts = pc.unique(table["latents"]), pc.unique(pc.list_flatten(table["texts"]))
    controls = pc.unique(pc.list_flatten(table["controls"]))
    masks = pc.unique(table["mask"].filter(pc.not_equal(table["mask"], "")))
    fingerprints = {"latents": manifest.latents_fingerprint, "texts": manifest.texts_fingerprint}
    return CacheSummary(
        directory=store.location,
        digest=manifest.digest,
        family=manifest.family,
        num_samples=len(store),
        num_images=len(images),
        num_controls=len(controls),
        num_masks=len(masks),
        num_texts=len(texts),
        storage=[_storage(store, kind, store.named(kind)) for kind in KINDS],
        buckets=_buckets(table),
        text_lengths=_lengths(pc.list_flatten(table["text_lengths"]).to_numpy(), _limit(manifest)),
        latents=_latents(store, _LATENTS_READ),
        encoders={kind: {"fingerprint": fingerprints[kind], **manifest.encoders.get(kind, {})} for kind in KINDS},
        prompts=["(no prompt)" if key == negative_key(None) else key for key in manifest.prompts],
        prepared_fingerprint=manifest.prepared_fingerprint,
    )


def spread(number: int, most: int, generator: np.random.Generator) -> Positions:
    """At most `most` positions out of `number`, in order: one at random out of each of as many equal stretches."""
    shown = min(number, most)
    edges = np.arange(shown + 1) * number // max(shown, 1)
    return edges[:-1] + np.floor(generator.random(shown) * np.diff(edges)).astype(np.int64)


def _storage(store: CacheStore, kind: str, named: pa.Array) -> StorageSummary:
    items = store.index(kind)
    unnamed = items.filter(pc.invert(pc.is_in(items["id"], value_set=named)))
    shards = store.shard_table.filter(pc.equal(store.shard_table["kind"], kind))
    listed = {
        f"{fingerprint}/{name}{suffix}"
        for fingerprint, name in zip(shards["fingerprint"].to_pylist(), shards["name"].to_pylist(), strict=True)
        for suffix in (SHARD, RECEIPT)
    }
    folder = Path(store.location) / kind
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return StorageSummary(
        kind=kind,
        num_items=len(items),
        num_shards=len(shards),
        num_bytes=sum(sizes.values()),
        num_unnamed=len(unnamed),
        unnamed_bytes=int(pc.sum(unnamed["bytes"]).as_py() or 0),
        unlisted_bytes=sum(size for name, size in sizes.items() if name not in listed),
    )


def _buckets(table: pa.Table) -> list[BucketSummary]:
    sides = ["bucket_width", "bucket_height"]
    counted = table.select(sides).group_by(sides).aggregate([([], "count_all")])
    return buckets(list(zip(*(counted[name].to_pylist() for name in (*sides, "count_all")), strict=True)))


def _limit(manifest: CacheManifest) -> int | None:
    """Tokens at which the encoder cut: what it recorded, else what its family does now; None when neither is known."""
    if manifest.family in models.available() and models.get(manifest.family).pads_texts:
        return None
    recorded = manifest.encoders.get("texts", {}).get("max_text_tokens")
    if isinstance(recorded, int):
        return recorded
    return models.get(manifest.family).max_text_tokens if manifest.family in models.available() else None


def _lengths(lengths: npt.NDArray[np.int32], limit: int | None) -> LengthSummary:
    least, median, percentile_95, most = np.percentile(lengths, [0, 50, 95, 100])
    return LengthSummary(
        num_captions=len(lengths),
        least=int(least),
        median=float(median),
        percentile_95=float(percentile_95),
        most=int(most),
        limit=limit,
        num_at_limit=0 if limit is None else int((lengths >= limit).sum()),
        histogram=length_bins(lengths),
    )


def _latents(store: CacheStore, most: int) -> LatentSummary:
    """Samples lie in the order of their shards, so positions that are spread over them are spread over the shards."""
    num_controls = int(pc.sum(pc.list_value_length(store.table["controls"])).as_py())
    most_samples = max(1, most * len(store) // (len(store) + num_controls))
    moments = _Moments()
    positions = spread(len(store), most_samples, np.random.default_rng(SEED))
    seen: set[str] = set()
    with track("read", len(positions), "sample") as progress:
        for position in positions.tolist():
            names = [store.table["latents"][position].as_py(), *store.table["controls"][position].as_py()]
            for name, (mean, std) in zip(names, (store.latents(position), *store.controls(position)), strict=True):
                if name not in seen:
                    moments.add(mean, std)
                    seen.add(name)
            progress.advance(1)
    return moments.summary()


class _Moments:
    """Sums over the latents that were read; in fp64, so that nothing is lost."""

    def __init__(self) -> None:
        self.num_read = 0
        self.dtypes: set[str] = set()
        self.sums_4C: torch.Tensor | None = None  # of values, means, squared means and stds
        self.largest = 0.0
        self.num_values = self.num_not_finite = 0
        self.fine = torch.zeros(int(2 * _WIDEST * _FINE_A_UNIT), dtype=torch.float64)

    def add(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """One item: its posterior mean and std, [C,...]."""
        self.num_read += 1
        self.dtypes |= {str(one.dtype).removeprefix("torch.") for one in (mean, std)}
        mean_CN, std_CN = mean.flatten(1).double(), std.flatten(1).double()
        finite_CN = mean_CN.isfinite() & std_CN.isfinite()
        self.num_values += mean_CN.numel() + std_CN.numel()
        self.num_not_finite += int((~mean_CN.isfinite()).sum() + (~std_CN.isfinite()).sum())
        # Not a product with the mask: 0 times infinity is no number.
        mean_CN, std_CN = (torch.where(finite_CN, one, 0.0) for one in (mean_CN, std_CN))
        sums_4C = torch.stack([finite_CN.double().sum(1), mean_CN.sum(1), mean_CN.square().sum(1), std_CN.sum(1)])
        self.sums_4C = sums_4C if self.sums_4C is None else self.sums_4C + sums_4C
        self.largest = max(self.largest, float(mean_CN.abs().max()))
        inside = mean_CN[finite_CN].float().clamp(-_WIDEST, _WIDEST)
        self.fine += torch.histc(inside, bins=len(self.fine), min=-_WIDEST, max=_WIDEST)

    def summary(self) -> LatentSummary:
        """All of it."""
        assert self.sums_4C is not None, "a cache has samples"
        mean, std, posterior_std = _moments(self.sums_4C.sum(1))
        of_channels = zip(*(one.tolist() for one in _moments(self.sums_4C)), strict=True)
        least, most = _NORMAL_STD
        return LatentSummary(
            num_read=self.num_read,
            dtype=", ".join(sorted(self.dtypes)),
            mean=float(mean),
            std=float(std),
            posterior_std=float(posterior_std),
            largest=self.largest,
            non_finite_share=self.num_not_finite / self.num_values,
            is_normalised=abs(float(mean)) <= _NORMAL_MEAN and least <= float(std) <= most,
            channels=[ChannelSummary(mean=one[0], std=one[1], posterior_std=one[2]) for one in of_channels],
            histogram=_value_bins(self.fine),
        )


def _moments(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(mean, std, mean posterior std) from sums of values, means, squared means and stds; NaN where there are none."""
    count, mean, square, posterior_std = sums
    variance = square / count - (mean / count).square()
    return mean / count, variance.clamp(min=0).sqrt(), posterior_std / count


def _value_bins(fine: torch.Tensor) -> list[tuple[float | None, float | None, int]]:
    """Over the least range around zero, a power of two, that holds nearly all."""
    middle, reach = len(fine) // 2, _NARROWEST
    while reach < _WIDEST and float(_around(fine, reach).sum()) < _SHARE_SHOWN * float(fine.sum()):
        reach *= 2
    shown = _around(fine, reach).reshape(_VALUE_BINS, -1).sum(1)
    side = int(reach * _FINE_A_UNIT)
    shown[0] += fine[: middle - side].sum()
    shown[-1] += fine[middle + side :].sum()
    step = 2 * reach / _VALUE_BINS
    edges = [None, *(-reach + number * step for number in range(1, _VALUE_BINS)), None]
    return list(zip(edges[:-1], edges[1:], shown.long().tolist(), strict=True))


def _around(fine: torch.Tensor, reach: float) -> torch.Tensor:
    """A copy of the fine bins from `-reach` to `reach`."""
    middle, side = len(fine) // 2, int(reach * _FINE_A_UNIT)
    return fine[middle - side : middle + side].clone()


def flat_parts(parts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The parts of an encoder's fingerprint as (name, value), inner ones with dots in their names."""
    rows: list[tuple[str, str]] = []
    for name, value in parts.items():
        rows += flat_parts(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", str(value))]
    return rows
