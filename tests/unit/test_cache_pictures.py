"""How the cache reads pictures: in one pass or by offset, and never more held than allowed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ftk.cache import pictures
from ftk.cache.pictures import PictureReader
from ftk.cache.plan import ImageItem
from ftk.contracts import SampleRow
from ftk.pipeline.dataset import PreparedDataset, Span

Batch = list[ImageItem]


def _row(number: int) -> SampleRow:
    width, height = ((32, 48), (48, 32), (40, 40))[number % 3]
    return SampleRow(
        key=f"k{number}", source="s", content_sha256="", image_id=f"i{number}", width=width, height=height,
        bucket_width=width, bucket_height=height, resize_width=width, resize_height=height, crop_x=0, crop_y=0, flipped=False,
        copied=False, perceptual_hash="", captions=["a"], repeats=1, role="instance", num_controls=0, control_ids=[],
        has_mask=False, mask_id="", shard="",
    )  # fmt: skip


@pytest.fixture
def prepared(tmp_path: Path, written_dataset: Callable[..., PreparedDataset]) -> PreparedDataset:
    """Two shards of twelve pictures of three sizes."""
    return written_dataset(tmp_path, [[_row(number) for number in range(first, first + 12)] for first in (0, 12)])


@pytest.fixture
def items(prepared: PreparedDataset) -> Batch:
    return [
        ImageItem(row.image_id, row.shard, row.key, "image", row.bucket_width, row.bucket_height) for row in prepared.rows()
    ]


def _batches(items: Batch, size: int) -> list[Batch]:
    """Batches of one size of picture, in the order of reading."""
    groups = [items[start::3] for start in range(3)]
    batches = [group[start : start + size] for group in groups for start in range(0, len(group), size)]
    return pictures.in_order_of_reading(batches, items)  # type: ignore[return-value]


def _read(file: bytes | Span) -> bytes:
    return file if isinstance(file, bytes) else file.read()


def test_batches_are_completed_one_after_another_in_one_pass(items: Batch) -> None:
    completed = [items.index(batch[-1]) for batch in _batches(items, 3)]
    assert completed == sorted(completed)
    assert sorted(item.id for batch in _batches(items, 3) for item in batch) == sorted(item.id for item in items)


def test_a_shard_is_streamed_when_most_of_it_is_needed_and_read_by_offset_when_little_is(
    prepared: PreparedDataset, items: Batch
) -> None:
    needed = [*items[:12:2], *items[12:17]]  # six of twelve, and five of twelve
    reader = PictureReader(prepared, needed)
    files = [reader.files([item])[0] for item in needed]
    assert [type(file) for file in files] == [bytes] * 6 + [Span] * 5
    assert [_read(file) for file in files] == [prepared.span(item.shard, item.key, item.part).read() for item in needed]


@pytest.mark.parametrize("share", [0.0, 2.0], ids=["stream", "offset"])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_batch_gets_its_own_files_whatever_the_way_of_reading(
    prepared: PreparedDataset, items: Batch, monkeypatch: pytest.MonkeyPatch, share: float, size: int
) -> None:
    monkeypatch.setattr(pictures, "_STREAMED_SHARE", share)
    reader = PictureReader(prepared, items)
    for batch in _batches(items, size):
        expected = [prepared.span(item.shard, item.key, item.part).read() for item in batch]
        assert [_read(file) for file in reader.files(batch)] == expected
    assert reader._waiting == {}
    assert reader._held_bytes == 0


def test_files_that_wait_for_their_batch_are_held_within_a_bound(
    prepared: PreparedDataset, items: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 3 * len(prepared.span("00000", "k0", "image").read())
    monkeypatch.setattr(pictures, "_MAX_HELD_BYTES", limit)
    reader, held, kinds = PictureReader(prepared, items), [], set()
    for batch in _batches(items, 4):
        files = reader.files(batch)
        held.append(sum(len(file) for file in reader._waiting.values() if isinstance(file, bytes)))
        kinds |= {type(file) for file in files}
        assert [_read(file) for file in files] == [prepared.span(item.shard, item.key, item.part).read() for item in batch]
    assert 0 < max(held) <= limit
    assert kinds == {bytes, Span}
