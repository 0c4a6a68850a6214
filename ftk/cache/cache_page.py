"""A cache as one HTML page to look at: its numbers, and latents decoded beside the pictures that they were made of.

Shape legend: B batch, C latent channels, H W pixels, h w latent cells.
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image

from ftk import devices
from ftk.cache import cache_summary, fingerprint
from ftk.cache.cache_summary import SEED, ChannelSummary, LatentSummary
from ftk.cache.store import CacheStore
from ftk.contracts import CachedSample, CacheManifest, SampleRow
from ftk.errors import ModelError
from ftk.models import base as models
from ftk.models.base import Family
from ftk.pipeline import page_parts
from ftk.pipeline.dataset import PreparedDataset
from ftk.progress import track

_MOST_SHOWN = 24
_PICTURE_PX = 320

Pixels = npt.NDArray[np.uint8]


def page(
    store: CacheStore, model: Path | None = None, prepared: PreparedDataset | None = None
) -> tuple[cache_summary.CacheSummary, bytes]:
    """The cache's numbers, and one self-contained HTML page of them.

    Args:
        model: the folder of the model, or of its VAE: with it the page has a sheet of decoded latents.
        prepared: the dataset that the cache was made from: with it the sheet has the pictures and their captions.

    Raises:
        CacheError: an item that is read is damaged.
        DatasetError: a shard with a picture that is shown is damaged.
        ModelError: there is no VAE of the cache's family in `model`.
    """
    decoder = None if model is None else Decoder.load(store.manifest, model)
    summary = cache_summary.summarise(store)
    directory, manifest = Path(store.location), store.manifest
    recorded = {
        "encoders": manifest.encoders,
        "normalisation": manifest.normalisation,
        "prepared_fingerprint": manifest.prepared_fingerprint,
        "prepared_recipe": manifest.prepared_recipe,
    }
    cards = [] if decoder is None else _cards(store, decoder, prepared)
    ratios = [card.comparisons[0].psnr for card in cards]
    known = [ratio for ratio in ratios if ratio is not None]
    html = _template().render(
        summary=summary,
        name=page_parts.short_name(directory),
        encoders={kind: cache_summary.flat_parts(parts) for kind, parts in summary.encoders.items()},
        recorded=json.dumps(recorded, indent=2, ensure_ascii=False),
        values=_value_plot(summary.latents),
        intervals=_intervals(summary.latents.channels),
        decoder=decoder,
        cards=cards,
        median_psnr=float(np.median(known)) if known else None,
        prepared=None if prepared is None else str(prepared.directory),
    )
    return summary, page_parts.encoded(html)


@dataclass(frozen=True, slots=True)
class Decoder:
    """A VAE in memory; `differences` says where its weights are not those that made the cache (part, expected, found)."""

    family: Family
    vae: Any
    model: str
    differences: list[tuple[str, str, str]]

    @classmethod
    def load(cls, manifest: CacheManifest, directory: Path) -> "Decoder":
        """The VAE of the cache's family, in fp32, from the model's folder or from its own."""
        family = models.get(manifest.family)
        model = _model_directory(family, directory)
        expected = manifest.encoders.get("latents", {}).get("weights", {})
        is_full = fingerprint.is_full({"weights": expected})
        found = {name: fingerprint.weights_digest(model / name, is_full) for name in expected if (model / name).is_dir()}
        vae = family.load_vae(model, torch.float32, devices.resolve_device("auto"))
        return cls(family, vae, str(model), fingerprint.differences(expected, found))

    def decode(self, latents_Chw: torch.Tensor) -> Pixels:
        """[H,W,3] of one item's latents."""
        (pixels_CHW,) = self.family.decode(self.vae, latents_Chw[None].float()).float().cpu()
        shown = (pixels_CHW.nan_to_num(nan=-1.0).clamp(-1, 1) + 1) * 127.5
        pixels: Pixels = shown.round().to(torch.uint8).permute(1, 2, 0).numpy()
        return pixels


def _model_directory(family: Family, directory: Path) -> Path:
    """The folder with the components in it that `load_vae` wants; a user may name the VAE's own folder."""
    own = directory.resolve()
    for candidate in (directory, own.parent if own.name in family.latent_components else directory):
        if all((candidate / name).is_dir() for name in family.latent_components):
            return candidate
    found = ", ".join(sorted(path.name for path in directory.iterdir())[:8]) if directory.is_dir() else "no such folder"
    raise ModelError(
        f"--model {directory}: no {' and '.join(family.latent_components)} folder of a {family.name} model in it "
        f"(found: {found or 'nothing'}). Name the model's folder in the Diffusers layout."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Comparison:
    """A picture of a sample as it was prepared and as the cache holds it, as data URIs; PSNR in dB."""

    name: str
    source: str | None
    cached: str
    psnr: float | None = None
    is_mask: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Card:
    """One sample as the page shows it; without a `row` its prepared sample was not found, or has other pixels now."""

    sample: CachedSample
    row: SampleRow | None
    captions: list[str]
    comparisons: list[_Comparison]


def _cards(store: CacheStore, decoder: Decoder, prepared: PreparedDataset | None) -> list[_Card]:
    numbers = _picks(store.table)
    samples = {number: store.sample(number) for number in numbers}
    rows = {} if prepared is None else _rows(prepared, [sample.key for sample in samples.values()])
    cards = []
    with track("decode", len(numbers), "sample") as progress:
        for number, sample in samples.items():
            row = rows.get(sample.key)
            row = row if row is not None and row.image_id == sample.latents else None
            sources = _sources(prepared, row) if prepared is not None and row is not None else {}
            cards.append(
                _Card(
                    sample=sample,
                    row=row,
                    captions=page_parts.shortened(row.captions) if row else [],
                    comparisons=_comparisons(store, number, decoder, sources),
                )
            )
            progress.advance(1)
    return cards


def _picks(table: pa.Table) -> list[int]:
    """Samples from every bucket, as many of each as there is room for, the tallest bucket first."""
    widths, heights = (table[name].to_numpy().astype(np.int64) for name in ("bucket_width", "bucket_height"))
    sizes, bucket_of, counts = np.unique(np.stack([widths, heights]), axis=1, return_inverse=True, return_counts=True)
    bucket_of = bucket_of.reshape(-1)
    shown = np.zeros_like(counts)
    for _ in range(min(_MOST_SHOWN, len(table))):
        # The bucket with the fewest shown; of several the one with the most samples.
        left = np.flatnonzero(shown < counts)
        shown[min(left, key=lambda bucket: (shown[bucket], -counts[bucket]))] += 1
    generator = np.random.default_rng(SEED)
    picks: list[int] = []
    for bucket in np.lexsort((sizes[0], sizes[0] / sizes[1])):
        positions = cache_summary.spread(int(counts[bucket]), int(shown[bucket]), generator)
        if len(positions):
            picks += np.flatnonzero(bucket_of == bucket)[positions].tolist()
    return picks


def _rows(prepared: PreparedDataset, keys: Sequence[str]) -> dict[str, SampleRow]:
    """The prepared samples with these keys, as far as they are there."""
    wanted = pa.array(keys, pa.string())
    found: dict[str, SampleRow] = {}
    for table in prepared.tables():
        matching = table.filter(pc.is_in(table["key"], value_set=wanted))
        found |= {row["key"]: SampleRow(**row) for row in matching.to_pylist()}
        if len(found) == len(wanted):
            break
    return found


def _sources(prepared: PreparedDataset, row: SampleRow) -> dict[str, Pixels]:
    """A sample's pictures in 8 bits, by part: [H,W,3], of a mask [H,W]."""
    parts = [("image", prepared.image_bytes(row), "RGB")]
    parts += [(f"control {number}", data, "RGB") for number, data in enumerate(prepared.control_bytes(row), 1)]
    mask = prepared.mask_bytes(row)
    parts += [("mask", mask, "L")] if mask is not None else []
    sources = {}
    for name, data, mode in parts:
        with Image.open(io.BytesIO(data)) as image:
            sources[name] = np.asarray(image.convert(mode))
    return sources


def _comparisons(store: CacheStore, number: int, decoder: Decoder, sources: Mapping[str, Pixels]) -> list[_Comparison]:
    latents = {"image": store.latents(number)[0]}
    latents |= {f"control {position}": mean for position, (mean, _) in enumerate(store.controls(number), 1)}
    comparisons = []
    for name, mean_Chw in latents.items():
        decoded, source = decoder.decode(mean_Chw), sources.get(name)
        comparisons.append(
            _Comparison(
                name=name,
                source=None if source is None else _thumbnail(source),
                cached=_thumbnail(decoded),
                psnr=None if source is None else psnr(source, decoded),
            )
        )
    mask_hw = store.mask(number)
    if mask_hw is not None:
        source = sources.get("mask")
        cells = (mask_hw.float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        cached = page_parts.data_uri(Image.fromarray(cells), "PNG")
        comparisons.append(
            _Comparison(name="mask", source=None if source is None else _thumbnail(source), cached=cached, is_mask=True)
        )
    return comparisons


def _thumbnail(pixels: Pixels) -> str:
    # What the VAE loses is to be seen, not what JPEG would lose.
    return page_parts.thumbnail(Image.fromarray(pixels), _PICTURE_PX, quality=92, subsampling=0)


def psnr(expected: Pixels, found: Pixels) -> float | None:
    """Peak signal-to-noise ratio of 8-bit pictures in dB, over all channels; infinite when they are equal.

    None when they have not the same size.
    """
    if expected.shape != found.shape:
        return None
    error = float(np.mean(np.square(expected.astype(np.float64) - found)))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def _value_plot(latents: LatentSummary) -> dict[str, Any]:
    """Bins as (from, below, values), and beside them what a standard normal distribution would have in each."""
    bins = latents.histogram
    step = bins[len(bins) // 2][1] or 0.0  # the bin that begins at zero
    reach = step * len(bins) / 2
    total = sum(number for *_, number in bins)
    edges = -reach + step * np.arange(len(bins) + 1)
    below = np.array([0.5 * (1 + math.erf(edge / math.sqrt(2))) for edge in edges])
    expected = np.diff(below) * total
    tallest = max(float(expected.max()), *(number for *_, number in bins), 1.0)
    ticks = np.linspace(-reach, reach, 9)
    return {
        "bins": [(low, high, number, number / tallest) for low, high, number in bins],
        "normal": [((place + 0.5) / len(bins), number / tallest) for place, number in enumerate(expected.tolist())],
        "ticks": [((tick / reach + 1) / 2, f"{tick:g}") for tick in ticks.tolist()],
    }


def _intervals(channels: Sequence[ChannelSummary]) -> list[tuple[float, float, float] | None]:
    """Each channel's (mean - std, mean, mean + std) on one axis, from 0 to 1 with zero in the middle; None where unknown.

    The first is of a standard normal distribution.
    """
    spans = [(-1.0, 0.0, 1.0), *((one.mean - one.std, one.mean, one.mean + one.std) for one in channels)]
    furthest = max(abs(end) for span in spans for end in span if math.isfinite(end))
    reach = max(2.0, 2.0 ** math.ceil(math.log2(furthest)))
    places = [((low / reach + 1) / 2, (mean / reach + 1) / 2, (high / reach + 1) / 2) for low, mean, high in spans]
    return [place if all(map(math.isfinite, place)) else None for place in places]


def _template() -> Any:
    return page_parts.environment("ftk.cache").get_template("cache.html")
