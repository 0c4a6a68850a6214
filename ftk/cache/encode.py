"""Encodes one shard's images or captions. One component is in memory at a time; the caller frees it."""

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from ftk.cache.plan import Unit, text_id
from ftk.contracts import SampleRow
from ftk.errors import CacheError
from ftk.models.base import Family
from ftk.pipeline.dataset import PreparedDataset

Items = list[tuple[str, dict[str, torch.Tensor]]]
Advance = Callable[[int], None]


def encode_latents(
    unit: Unit[SampleRow],
    dataset: PreparedDataset,
    family: Family,
    vae: object,
    dtype: torch.dtype,
    batch_size: int,
    advance: Advance,
) -> Items:
    """`mean` and `std` [C,h,w] of each image, in the order of the unit; a batch holds one bucket."""
    encoded: dict[str, dict[str, torch.Tensor]] = {}
    buckets: dict[tuple[int, int], list[SampleRow]] = {}
    for row in unit.items:
        buckets.setdefault((row.bucket_height, row.bucket_width), []).append(row)
    with ThreadPoolExecutor(4) as pool:
        for rows in buckets.values():
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                pixels_BCHW = torch.stack(list(pool.map(lambda row: read_pixels(dataset, row), batch)))
                mean, std = family.encode_images(vae, pixels_BCHW)
                for row, one_mean, one_std in zip(batch, mean, std, strict=True):
                    item = {"mean": one_mean.to("cpu", dtype), "std": one_std.to("cpu", dtype)}
                    encoded[row.image_id] = {name: _finite(tensor, row.key, dtype) for name, tensor in item.items()}
                advance(len(batch))
    return [(row.image_id, encoded[row.image_id]) for row in unit.items]


def encode_texts(
    unit: Unit[str], family: Family, encoder: object, dtype: torch.dtype, batch_size: int, advance: Advance
) -> Items:
    """The family's tensors of each caption, in the order of the unit; captions of like length share a batch."""
    captions = sorted(unit.items, key=lambda caption: (len(caption), caption))
    encoded: dict[str, dict[str, torch.Tensor]] = {}
    for start in range(0, len(captions), batch_size):
        batch = captions[start : start + batch_size]
        for caption, item in zip(batch, family.encode_texts(encoder, batch), strict=True):
            # clone: an item that is a view would keep, and save, its whole batch
            encoded[caption] = {name: tensor.to("cpu", dtype).clone() for name, tensor in item.items()}
        advance(len(batch))
    return [(text_id(caption), encoded[caption]) for caption in unit.items]


def read_pixels(dataset: PreparedDataset, row: SampleRow) -> torch.Tensor:
    """[3,H,W] fp32 in [-1, 1] of one prepared sample."""
    with Image.open(io.BytesIO(dataset.image_bytes(row))) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1.0


def total_bytes(items: Sequence[tuple[str, dict[str, torch.Tensor]]]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.nbytes for _, tensors in items for tensor in tensors.values())


def _finite(tensor: torch.Tensor, key: str, dtype: torch.dtype) -> torch.Tensor:
    if not torch.isfinite(tensor).all():
        raise CacheError(
            f"The VAE gave values that {str(dtype).removeprefix('torch.')} cannot hold for sample {key}. "
            f"Set cache.latents_dtype: float32, or cache.vae_dtype: float32 if it is not."
        )
    return tensor
