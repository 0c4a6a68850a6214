"""Images that are equal or look alike. Equal: the same bytes. Alike: perceptual hashes that differ in a few bits."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ftk.pipeline.dataset import DUPLICATE_SCHEMA

_HASH_BITS = 64


def find(samples: pa.Table, bits: int) -> pa.Table:
    """A row for each sample that is equal to an earlier one (`bits` -1) or looks like it (the bits that differ).

    `samples`: the columns key, image_id, content_sha256 and perceptual_hash, in the order of the samples. Samples of one
    image (other sizes, crops, its mirror image) are not duplicates of each other.
    """
    keys = samples["key"].to_pylist()
    rows: list[dict[str, Any]] = []
    first_of: dict[str, str] = {}
    first_at: dict[str, int] = {}
    for position, (image_id, content) in enumerate(
        zip(samples["image_id"].to_pylist(), samples["content_sha256"].to_pylist(), strict=True)
    ):
        if (first := first_of.setdefault(image_id, keys[position])) != keys[position]:
            rows.append({"key": keys[position], "like": first, "bits": -1})
        first_at.setdefault(content, position)
    positions = list(first_at.values())
    hashes = np.array(
        [int(text, 16) for text in samples["perceptual_hash"].take(pa.array(positions, pa.int64())).to_pylist()],
        dtype=np.uint64,
    )
    for later, earlier, distance in alike(hashes, bits):
        rows.append({"key": keys[positions[later]], "like": keys[positions[earlier]], "bits": distance})
    return pa.Table.from_pylist(rows, schema=DUPLICATE_SCHEMA)


def alike(hashes: npt.NDArray[np.uint64], bits: int) -> list[tuple[int, int, int]]:
    """(position, earlier position, distance) for each hash within `bits` of an earlier one, which is its nearest.

    Hashes at most `bits` apart agree in at least two of `bits + 2` bands, whichever bits differ; so only those that agree
    in some two bands are compared (multi-index hashing: Norouzi, Punjani and Fleet, 2012, with pairs of bands).
    """
    unique, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    best: dict[int, tuple[int, int]] = {}
    for position in np.flatnonzero(first[inverse] != np.arange(len(hashes))):
        best[int(position)] = (0, int(first[inverse[position]]))
    edges = np.linspace(0, _HASH_BITS, bits + 3).astype(int)
    masks = [((1 << int(high)) - 1) ^ ((1 << int(low)) - 1) for low, high in itertools.pairwise(edges)]
    for one, other in itertools.combinations(masks, 2):
        banded = unique & np.uint64(one | other)
        order = np.argsort(banded, kind="stable")
        for left, right, distance in _close_pairs(unique, banded, order, bits):
            earlier, later = sorted((int(first[left]), int(first[right])))
            best[later] = min(best.get(later, (bits + 1, 0)), (distance, earlier))
    return [(position, earlier, distance) for position, (distance, earlier) in sorted(best.items())]


def _close_pairs(
    unique: npt.NDArray[np.uint64], banded: npt.NDArray[np.uint64], order: npt.NDArray[np.intp], bits: int
) -> Iterator[tuple[int, int, int]]:
    """Pairs of hashes with equal bands and at most `bits` of difference: in sorted order, each against the k-th after it."""
    alive = np.arange(len(order))
    for step in range(1, len(order)):
        alive = alive[alive + step < len(order)]
        left, right = order[alive], order[alive + step]
        same = banded[left] == banded[right]
        alive, left, right = alive[same], left[same], right[same]
        if not len(alive):
            return
        distances = np.bitwise_count(unique[left] ^ unique[right])
        close = distances <= bits
        yield from zip(left[close].tolist(), right[close].tolist(), distances[close].tolist(), strict=True)
