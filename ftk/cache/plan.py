"""What has to be encoded: what the samples need, cut into units, less what is there. Pure functions."""

import itertools
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ftk import storage
from ftk.configs.schema import PreservationConfig
from ftk.methods.base import CacheNeeds
from ftk.models.components.geometry import LatentGeometry
from ftk.pipeline.conditions.base import MadeControl
from ftk.pipeline.dataset import REFERENCE_FIELDS, SEEN_FIELDS

IMAGE_COLUMNS = [
    *("key", "shard", "bucket_width", "bucket_height", "image_id", "num_controls", "control_ids", "has_mask", "mask_id"),
]

_REFERENCE_COLUMNS = [column.name for column in REFERENCE_FIELDS]
_SEEN_COLUMNS = [column.name for column in SEEN_FIELDS]
_SEEN = (_SEEN_COLUMNS[0], _REFERENCE_COLUMNS[0])
SAMPLE_COLUMNS = [*IMAGE_COLUMNS, *_REFERENCE_COLUMNS, *_SEEN_COLUMNS, "captions"]
"""What is read of the prepared dataset to know what its samples need."""

_TOKENS_OF_A_TEMPLATE = 8
_BYTES_A_TOKEN = 4
Form = Literal["latents", "mask", "pixels"]
"""What is stored of an image: the VAE's latents, a mask averaged over latent cells, or its pixels in 8 bits."""


@dataclass(frozen=True, slots=True)
class ImageItem:
    """An image, control image, reference or mask to encode: where it lies, and its size in pixels.

    In the prepared dataset it is a part of a sample in a shard; of a prompt's image `shard` is empty and `key` its file, from
    which a control image is `made`, or which it is itself.
    """

    id: str
    shard: str
    key: str
    part: str
    width: int
    height: int
    form: Form = "latents"
    made: MadeControl | None = None

    @property
    def is_mask(self) -> bool:
        """Masks are averaged over each latent cell; the VAE sees the rest."""
        return self.form == "mask"


@dataclass(frozen=True, slots=True)
class TextItem:
    """A caption, what stands for none, or a prompt; with the references that the text encoder sees beside it, if any.

    `caption` is None for no text at all: see `Family.unconditional`. `part` says what is stored of it, where the first states
    depend on the references alone: these (`shared`), or the rest (`own`).
    """

    id: str
    caption: str | None
    references: tuple[ImageItem, ...] = ()
    part: Literal["whole", "shared", "own"] = "whole"


Item = TypeVar("Item", ImageItem, TextItem)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit(Generic[Item]):
    """One cache shard to be; `number` says whose it is when several machines share the work."""

    number: int
    items: tuple[Item, ...]


def text_id(caption: str | None, references: Sequence[str] = ()) -> str:
    """Names a caption, or no text, with the ids of the references that its encoding depends on: equal ones are stored once."""
    return storage.digest(["text", caption, *([list(references)] if references else [])])


def shared_text_id(references: Sequence[str]) -> str:
    """Names what all texts beside these references begin with; "" where there are none."""
    return storage.digest(["shared text", list(references)]) if references else ""


def text_items(caption: str | None, references: tuple[ImageItem, ...], *, is_split: bool) -> list[TextItem]:
    """What is stored of a caption beside these references; what it shares with other captions comes first."""
    ids = [each.id for each in references]
    if not (references and is_split):
        return [TextItem(text_id(caption, ids), caption, references)]
    shared = TextItem(shared_text_id(ids), "", references, part="shared")
    return [shared, TextItem(text_id(caption, ids), caption, references, part="own")]


def pixels_id(image: str) -> str:
    """Names the pixels of an image, which are another item than its latents."""
    return storage.digest(["pixels", image])


def control_ids(ids: pa.ChunkedArray, needs: CacheNeeds) -> pa.ChunkedArray:
    """The items of each sample's control images, from the ids that the prepared dataset has for them."""
    if needs.controls == "latents":
        return ids
    flat = pa.array([pixels_id(each) for each in pc.list_flatten(ids).to_pylist()], pa.string())
    lengths = pc.fill_null(pc.list_value_length(ids), 0).to_numpy()
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.chunked_array([pa.ListArray.from_arrays(offsets, flat)])


def needed_texts(captions: pa.ChunkedArray, prompts: Iterable[TextItem], dropped: str | None) -> Iterator[TextItem]:
    """Every text that training and its sample images need, each once: captions (lists), what dropped ones train, prompts."""
    distinct = (caption.as_py() for caption in pc.unique(pc.list_flatten(captions)))
    texts = (TextItem(text_id(caption), caption) for caption in itertools.chain(distinct, [dropped]))
    return each_once(itertools.chain(texts, prompts))


def needed_texts_of_edits(
    tables: Iterable[pa.Table], prompts: Iterable[TextItem], dropped: str | None, *, is_split: bool
) -> Iterator[TextItem]:
    """The same where texts depend on references: each sample's captions, and the dropped one, beside its own references.

    Args:
        is_split: whether what texts of the same references begin with is an item of its own.
    """

    def all_of() -> Iterator[TextItem]:
        for table in tables:
            for row in table.select([*IMAGE_COLUMNS, "captions", *_REFERENCE_COLUMNS, *_SEEN_COLUMNS]).to_pylist():
                references = tuple(_seen(row))
                for caption in [*row["captions"], dropped]:
                    yield from text_items(caption, references, is_split=is_split)
        yield TextItem(text_id(dropped), dropped)
        yield from prompts

    return each_once(all_of())


def preserved_texts(captions: pa.ChunkedArray, settings: PreservationConfig) -> Iterator[TextItem]:
    """The texts for which the base model's prediction is kept, each once."""
    distinct: list[str] = pc.unique(pc.list_flatten(captions)).to_pylist()
    texts = [text for caption in distinct if (text := settings.text(caption)) is not None]
    yield from each_once(TextItem(text_id(text), text) for text in texts)


def preserved_texts_of_edits(tables: Iterable[pa.Table], settings: PreservationConfig, *, is_split: bool) -> Iterator[TextItem]:
    """The same where texts depend on references: beside each sample's own; `is_split` as in `needed_texts_of_edits`."""

    def all_of() -> Iterator[TextItem]:
        for table in tables:
            for row in table.to_pylist():
                references = tuple(_seen(row))
                for text in map(settings.text, row["captions"]):
                    if text is not None:
                        yield from text_items(text, references, is_split=is_split)

    return each_once(all_of())


def needed_pictures(tables: Iterable[pa.Table], needs: CacheNeeds, prompts: Iterable[ImageItem] = ()) -> Iterator[ImageItem]:
    """Every image, control image, reference and mask, each once: equal pixels are stored once."""

    def all_of() -> Iterator[ImageItem]:
        for table in tables:
            references = [name for name in _REFERENCE_COLUMNS if name in table.column_names]
            for row in table.select([*IMAGE_COLUMNS, *references]).to_pylist():
                # One string for all samples of a shard: every picture is in memory until the last one is encoded.
                row["shard"] = sys.intern(row["shard"])
                place, size = (row["shard"], row["key"]), (row["bucket_width"], row["bucket_height"])
                yield ImageItem(row["image_id"], *place, "image", *size)
                for number, control in enumerate(row["control_ids"]):
                    item = ImageItem(control, *place, f"control{number}", *size)
                    yield item if needs.controls == "latents" else as_pixels(item)
                yield from _references(row) if references else ()
                if row["has_mask"]:
                    yield ImageItem(row["mask_id"], *place, "mask", *size, form="mask")
        yield from prompts

    return each_once(all_of())


def as_pixels(image: ImageItem) -> ImageItem:
    """The pixels of an image in place of its latents."""
    return replace(image, id=pixels_id(image.id), form="pixels")


def seen_ids(table: pa.Table) -> list[list[str]]:
    """Of each sample, the ids of its references as its texts depend on them."""
    return [seen or references for seen, references in zip(*(table[name].to_pylist() for name in _SEEN), strict=True)]


def _references(row: Mapping[str, Any]) -> Iterator[ImageItem]:
    yield from _beside(row, _REFERENCE_COLUMNS, "reference")


def _seen(row: Mapping[str, Any]) -> Iterator[ImageItem]:
    """The references at the size at which the text encoder sees them."""
    yield from _beside(row, _SEEN_COLUMNS, "seen") if row[_SEEN_COLUMNS[0]] else _references(row)


def _beside(row: Mapping[str, Any], names: Sequence[str], part: str) -> Iterator[ImageItem]:
    for number, (item, width, height) in enumerate(zip(*(row[name] for name in names), strict=True)):
        yield ImageItem(item, row["shard"], row["key"], f"{part}{number}", width, height)


def each_once(items: Iterable[Item]) -> Iterator[Item]:
    """The items without those whose id was there before."""
    seen: set[str] = set()
    for item in items:
        if item.id not in seen:
            seen.add(item.id)
            yield item


def picture_bytes(picture: ImageItem, geometry: LatentGeometry, itemsize: int) -> int:
    """Size of one stored item: mean and std of each channel, a mask, or pixels."""
    if picture.form == "pixels":
        return 3 * picture.width * picture.height
    cells = (picture.width // geometry.factor) * (picture.height // geometry.factor)
    return (1 if picture.is_mask else 2 * geometry.channels) * cells * itemsize


def text_bytes(text: TextItem, token_bytes: int) -> int:
    """A guess at one text item's size before it is tokenised; it only decides where a shard ends."""
    return (len((text.caption or "").encode("utf-8", "replace")) // _BYTES_A_TOKEN + _TOKENS_OF_A_TEMPLATE) * token_bytes


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
