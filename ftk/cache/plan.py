"""What has to be encoded: what the samples need, cut into units, less what is there. Pure functions."""

from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from ftk import storage
from ftk.configs.schema import SampleConfig
from ftk.models.base import LatentGeometry

IMAGE_COLUMNS = [
    *("key", "shard", "bucket_width", "bucket_height", "image_id", "num_controls", "control_ids", "has_mask", "mask_id"),
]

_TOKENS_OF_A_TEMPLATE = 8
_BYTES_A_TOKEN = 4


@dataclass(frozen=True, slots=True)
class ImageItem:
    """An image, control image or mask to encode: where it lies in the prepared dataset, and its size in pixels."""

    id: str
    shard: str
    key: str
    part: str
    width: int
    height: int

    @property
    def is_mask(self) -> bool:
        """Masks are averaged over each latent cell; the VAE sees the rest."""
        return self.part == "mask"


@dataclass(frozen=True, slots=True)
class TextItem:
    """A caption, the empty one or a prompt."""

    id: str
    caption: str


Item = TypeVar("Item", ImageItem, TextItem)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit(Generic[Item]):
    """One cache shard to be; `number` says whose it is when several machines share the work."""

    number: int
    items: tuple[Item, ...]


def text_id(caption: str) -> str:
    """Names a caption by its content: equal captions are stored once."""
    return storage.digest(["text", caption])


def prompts(sample: SampleConfig) -> list[str]:
    """The prompts that sample images are drawn from, the negative one too."""
    return list(dict.fromkeys([*sample.prompts, sample.negative_prompt])) if sample.prompts else []


def needed_texts(captions: pa.ChunkedArray, sample: SampleConfig) -> Iterator[TextItem]:
    """Every text that training and its sample images need, each once: captions (lists, a sample each), empty, prompts."""
    distinct: list[str] = pc.unique(pc.list_flatten(captions)).to_pylist()
    for caption in dict.fromkeys([*distinct, "", *prompts(sample)]):
        yield TextItem(text_id(caption), caption)


def needed_pictures(tables: Iterable[pa.Table]) -> Iterator[ImageItem]:
    """Every image, control image and mask, each once: equal pixels are stored once."""
    seen: set[str] = set()
    for table in tables:
        for row in table.select(IMAGE_COLUMNS).to_pylist():
            size = (row["bucket_width"], row["bucket_height"])
            parts = [(row["image_id"], "image")]
            parts += [(control, f"control{number}") for number, control in enumerate(row["control_ids"])]
            parts += [(row["mask_id"], "mask")] if row["has_mask"] else []
            for item, part in parts:
                if item not in seen:
                    seen.add(item)
                    yield ImageItem(item, row["shard"], row["key"], part, *size)


def picture_bytes(picture: ImageItem, geometry: LatentGeometry, itemsize: int) -> int:
    """Size of one stored item: mean and std of each channel, or a mask."""
    cells = (picture.width // geometry.factor) * (picture.height // geometry.factor)
    return (1 if picture.is_mask else 2 * geometry.channels) * cells * itemsize


def text_bytes(text: TextItem, token_bytes: int) -> int:
    """A guess at one text item's size before it is tokenised; it only decides where a shard ends."""
    return (len(text.caption.encode("utf-8", "replace")) // _BYTES_A_TOKEN + _TOKENS_OF_A_TEMPLATE) * token_bytes


def units(needed: Iterable[Item], size: Callable[[Item], int], shard_bytes: int, there: Container[str]) -> Iterator[Unit[Item]]:
    """Cut all that is needed into shards of up to `shard_bytes`, in order, and leave out what is there.

    The cuts do not depend on what is there, so machines that share the work, and runs that go on after a kill, agree on
    them without a word; what one unit lacks changes only when that unit is made.
    """
    pending: list[Item] = []
    number = filled = 0
    for item in needed:
        if pending and filled + size(item) > shard_bytes:
            yield from _unit(number, pending, there)
            number, filled, pending = number + 1, 0, []
        pending.append(item)
        filled += size(item)
    yield from _unit(number, pending, there)


def _unit(number: int, items: list[Item], there: Container[str]) -> Iterator[Unit[Item]]:
    missing = tuple(item for item in items if item.id not in there)
    if missing:
        yield Unit(number=number, items=missing)
