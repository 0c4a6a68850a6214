"""Equal and alike images: the search agrees with comparing every pair, and knows variants of one image from copies."""

import numpy as np
import pyarrow as pa
import pytest

from ftk.pipeline.duplicates import alike, find


def _flipped(value: int, bits: np.ndarray) -> int:
    for bit in bits:
        value ^= 1 << int(bit)
    return value


@pytest.mark.parametrize("bits", [0, 1, 4, 9])
def test_agrees_with_comparing_every_pair(bits: int) -> None:
    random = np.random.default_rng(bits)
    hashes = random.integers(0, 2**63, 800, dtype=np.uint64)
    for position in range(300):
        changed = random.choice(64, random.integers(0, bits + 3), replace=False)
        hashes[500 + position] = _flipped(int(hashes[random.integers(0, 500)]), changed)
    distances = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    expected = {later: int(distances[later, :later].min()) for later in range(1, 800) if distances[later, :later].min() <= bits}
    assert len(expected) > 20
    found = {later: distance for later, _, distance in alike(hashes, bits)}
    assert found == expected
    assert all(earlier < later for later, earlier, _ in alike(hashes, bits))


def test_many_equal_hashes_are_no_quadratic_work() -> None:
    hashes = np.zeros(200_000, dtype=np.uint64)
    assert alike(hashes, 4) == [(position, 0, 0) for position in range(1, 200_000)]


def _table(*rows: tuple[str, str, str, int]) -> pa.Table:
    names = ("key", "image_id", "content_sha256", "perceptual_hash")
    return pa.table(
        {
            name: pa.array([f"{row[at]:016x}" if at == 3 else row[at] for row in rows], pa.string())
            for at, name in enumerate(names)
        }
    )


def test_equal_pixels_under_another_key_are_equal_and_other_crops_are_not() -> None:
    samples = _table(("a", "i1", "c1", 7), ("a-crop", "i2", "c1", 7), ("b", "i1", "c1", 7), ("c", "i3", "c2", 7 ^ 3))
    assert find(samples, 4).to_pylist() == [
        {"key": "b", "like": "a", "bits": -1},
        {"key": "c", "like": "a", "bits": 2},
    ]


def test_no_samples_have_no_duplicates() -> None:
    assert find(_table(), 4).num_rows == 0
