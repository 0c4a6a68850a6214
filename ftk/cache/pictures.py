"""Reads the picture files of a unit's batches from the prepared tars, ahead of the decoders.

A shard of which most samples are needed is read by webdataset in one pass from its front. A shard of which few are needed, as
after a handful of images was added, or where several processes share a shard, is read by offset. Both ways give the same
files, and the batches are planned beforehand, so the way of reading never shows in the cache.
"""

import itertools
from collections.abc import Iterator, Sequence

from ftk.cache.plan import ImageItem
from ftk.pipeline.dataset import PreparedDataset, Span

File = bytes | Span | None
"""A picture's encoded file, or where it lies; None for an image of a prompt, which is in no dataset."""

# One pass reads a tar in bulk, and by offset costs an open, a seek and an index. They cost about the same for half a shard.
_STREAMED_SHARE = 0.5
_MAX_HELD_BYTES = 256 << 20


class PictureReader:
    """Gives the files of planned batches. Pictures of several sizes alternate in a tar, so files wait for their batch.

    The files that wait hold no more than 256 MiB; those beyond are read by offset when their turn comes.
    """

    def __init__(self, dataset: PreparedDataset, pictures: Sequence[ImageItem]) -> None:
        self._dataset = dataset
        self._coming = zip(pictures, _files(dataset, pictures), strict=True)
        self._waiting: dict[str, File] = {}
        self._held_bytes = 0

    def files(self, batch: Sequence[ImageItem]) -> list[File]:
        """The batch's files. Batches come in the order in which the last of their pictures lies in the dataset.

        Raises:
            DatasetError: a prepared shard is damaged.
        """
        while batch[-1].id not in self._waiting:
            picture, file = next(self._coming)
            if _num_bytes(file) + self._held_bytes > _MAX_HELD_BYTES and picture is not batch[-1]:
                file = place(self._dataset, picture)
            self._waiting[picture.id] = file
            self._held_bytes += _num_bytes(file)
        files = [self._waiting.pop(picture.id) for picture in batch]
        self._held_bytes -= sum(map(_num_bytes, files))
        return files


def in_order_of_reading(batches: Sequence[Sequence[ImageItem]], pictures: Sequence[ImageItem]) -> list[Sequence[ImageItem]]:
    """The batches of a unit in the order in which a pass over its pictures completes them."""
    position = {picture.id: number for number, picture in enumerate(pictures)}
    return sorted(batches, key=lambda batch: position[batch[-1].id])


def place(dataset: PreparedDataset, picture: ImageItem) -> Span | None:
    """Where a picture's file lies in the dataset; None for an image of a prompt."""
    return dataset.span(picture.shard, picture.key, picture.part) if picture.shard else None


def _num_bytes(file: File) -> int:
    return len(file) if isinstance(file, bytes) else 0


def _files(dataset: PreparedDataset, pictures: Sequence[ImageItem]) -> Iterator[File]:
    """The file of each picture, in order."""
    for shard, neighbours in itertools.groupby(pictures, key=lambda picture: picture.shard):
        members = list(neighbours)
        num_samples = len({picture.key for picture in members})
        if not shard or num_samples < _STREAMED_SHARE * dataset.num_samples(shard):
            yield from (place(dataset, picture) for picture in members)
        else:
            yield from dataset.stream(shard, [(picture.key, picture.part) for picture in members])
