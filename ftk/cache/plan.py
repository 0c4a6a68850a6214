"""What has to be encoded: the difference between what the samples need and what is there, cut into shards."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ftk import storage
from ftk.configs.schema import SampleConfig
from ftk.contracts import SampleRow
from ftk.models.base import LatentGeometry

Item = TypeVar("Item")

_TOKENS_OF_A_TEMPLATE = 8
_BYTES_A_TOKEN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit(Generic[Item]):
    """One cache shard to be; `number` follows those that are there."""

    number: int
    items: tuple[Item, ...]


def text_id(caption: str) -> str:
    """Names a caption by its content: equal captions are stored once."""
    return storage.digest(["text", caption])


def needed_captions(rows: Iterable[SampleRow], sample: SampleConfig) -> list[str]:
    """Every text that training and its sample images need, each once: captions, the empty one, the prompts."""
    captions = [caption for row in rows for caption in row.captions]
    prompts = [*sample.prompts, sample.negative_prompt] if sample.prompts else []
    return list(dict.fromkeys([*captions, "", *prompts]))


def needed_images(rows: Iterable[SampleRow]) -> list[SampleRow]:
    """One row for each distinct image: equal pixels are stored once."""
    return list({row.image_id: row for row in reversed(list(rows))}.values())[::-1]


def latent_bytes(row: SampleRow, geometry: LatentGeometry, itemsize: int) -> int:
    """Size of one latent item: mean and std."""
    cells = (row.bucket_width // geometry.factor) * (row.bucket_height // geometry.factor)
    return 2 * geometry.channels * cells * itemsize


def text_bytes(caption: str, token_bytes: int) -> int:
    """A guess at one text item's size before it is tokenised; it only decides where a shard ends."""
    return (len(caption.encode("utf-8", "replace")) // _BYTES_A_TOKEN + _TOKENS_OF_A_TEMPLATE) * token_bytes


def cut(items: Sequence[Item], size: Callable[[Item], int], shard_bytes: int, first: int) -> list[Unit[Item]]:
    """Fill shards in order up to `shard_bytes`: a prefix of the items always gives a prefix of the shards.

    So a run that was killed after some shards plans the same remaining shards when it starts again.
    """
    units: list[Unit[Item]] = []
    pending: list[Item] = []
    filled = 0
    for item in items:
        if pending and filled + size(item) > shard_bytes:
            units.append(Unit(number=first + len(units), items=tuple(pending)))
            pending, filled = [], 0
        pending.append(item)
        filled += size(item)
    if pending:
        units.append(Unit(number=first + len(units), items=tuple(pending)))
    return units
