"""Images that are equal or look alike. Equal: the same bytes. Alike: perceptual hashes that differ in a few bits."""

import itertools
from collections.abc import Iterator

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
    ids = _codes(samples["image_id"])
    first_of_id = _firsts(ids)[ids]
    copies = np.flatnonzero(first_of_id != np.arange(len(ids)))
    firsts = np.sort(_firsts(_codes(samples["content_sha256"])))
    hashes = _parsed(samples["perceptual_hash"].take(pa.array(firsts)))
    near = np.array(alike(hashes, bits), dtype=np.int64).reshape(-1, 3)
    later = np.concatenate([copies, firsts[near[:, 0]]])
    earlier = np.concatenate([first_of_id[copies], firsts[near[:, 1]]])
    distances = np.concatenate([np.full(len(copies), -1), near[:, 2]])
    columns = [samples["key"].take(pa.array(later)), samples["key"].take(pa.array(earlier)), pa.array(distances, pa.int32())]
    return pa.table(columns, schema=DUPLICATE_SCHEMA)


def _codes(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Equal numbers for equal strings, which are counted in the order of their first appearance."""
    codes: npt.NDArray[np.int64] = column.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
    return codes


def _firsts(codes: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
    """Where each number stands first."""
    return np.unique(codes, return_index=True)[1]


def _parsed(column: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """64-bit hashes from their 16 hex digits."""
    digits = "".join(column.to_pylist())
    return np.frombuffer(bytes.fromhex(digits), dtype=">u8").astype(np.uint64)


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
