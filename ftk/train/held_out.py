"""Which samples are kept for validation: whole images, whatever variants of them there are, chosen by a hash of their names.

Shape legend: S samples.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from ftk.errors import CacheError, ConfigError

_HASHED_AT_ONCE = 2**16
KEY_SUFFIX = r"-?[0-9a-f]{12}$"
"""What `ftk prepare` puts behind the readable part of a key: a hash of path and variant."""

Integers = npt.NDArray[np.integer[Any]]
Words = npt.NDArray[np.uint64]


def held_out(samples: pa.Table, hash_S: Words, is_class_S: npt.NDArray[np.bool_], share: float) -> npt.NDArray[np.int64]:
    """The samples kept for validation: all those of the images whose hashes are the smallest. None of a class image.

    Image by image in the order of the hashes, so that the first ones are as good a choice as all.

    Args:
        hash_S: of each sample's key and the seed.
        share: of the images.

    Raises:
        ConfigError: nothing would be left to train on.
    """
    if not share:
        return np.zeros(0, np.int64)
    image_S = _images(samples)
    hash_of_image = np.zeros(len(image_S), np.uint64)
    # A sum, so that the order of an image's samples does not count.
    np.add.at(hash_of_image, image_S, hash_S)
    is_candidate = np.zeros(len(image_S), np.bool_)
    is_candidate[image_S] = True
    is_candidate[image_S[is_class_S]] = False
    candidates = np.flatnonzero(is_candidate)
    count = max(1, round(share * len(candidates)))
    if count >= len(candidates):
        raise ConfigError(
            f"train.validation.share {share:g} leaves nothing to train on: of {len(candidates)} images that are not class "
            f"images it holds out {count}. Add images, or set it to 0."
        )
    chosen = candidates[np.argsort(hash_of_image[candidates], kind="stable")[:count]]
    rank_of_image = np.full(len(image_S), count)
    rank_of_image[chosen] = np.arange(count)
    held_out = np.flatnonzero(rank_of_image[image_S] < count)
    return held_out[np.argsort(rank_of_image[image_S[held_out]], kind="stable")].astype(np.int64)


def _images(samples: pa.Table) -> Integers:
    """[S]: the image that each sample was made from, as a number below S.

    Sizes, crops and the mirror image of one file share the readable part of the key, the file's size and the first
    caption (only its shuffled variants depend on the variant). Files with equal bytes share latents. Whatever shares
    either is one image: files that the table cannot tell apart are held out together, never split.
    """
    name_S, _ = encoded(hashes(samples, _file_names))
    latents_S, _ = encoded(hashes(samples, lambda rows: rows["latents"]))
    image_S = name_S
    while True:
        # Each image takes the smallest number among those it shares latents, then a name, with.
        before = image_S
        for shared_S in (latents_S, name_S):
            smallest = np.full(len(image_S), len(image_S), np.int32)
            np.minimum.at(smallest, shared_S, image_S)
            image_S = smallest[shared_S]
        if np.array_equal(image_S, before):
            return image_S


def _file_names(rows: pa.RecordBatch) -> pa.Array:
    readable = pc.replace_substring_regex(rows["key"].cast(pa.string()), KEY_SUFFIX, "")
    size = (rows[name].cast(pa.string()) for name in ("width", "height"))
    return pc.binary_join_element_wise(readable, *size, pc.list_element(rows["texts"], 0), "\n")


def hashes(samples: pa.Table, naming: Callable[[pa.RecordBatch], pa.Array], seed: int = 0) -> Words:
    """A 64-bit hash of each sample's name."""
    parts = [np.zeros(0, np.uint64)]
    for rows in samples.to_batches(max_chunksize=_HASHED_AT_ONCE):
        names = naming(rows).cast(pa.binary()).to_pylist()
        parts.append(np.fromiter((xxhash.xxh3_64_intdigest(name, seed) for name in names), np.uint64, len(names)))
    return np.concatenate(parts)


def encoded(values: npt.NDArray[Any]) -> tuple[Integers, npt.NDArray[Any]]:
    """Where each value stands among the distinct ones, and those: hashed, not sorted, so in no order to rely on."""
    encoded = pa.array(values).dictionary_encode()
    return encoded.indices.to_numpy(), encoded.dictionary.to_numpy()


def refuse_doubled_keys(keys: pa.ChunkedArray, hash_S: Words) -> None:
    """`CacheError` if two samples have one key: they would have the same noise."""
    ordered = np.sort(hash_S)
    if not (ordered[1:] == ordered[:-1]).any():
        return
    doubled = [entry["values"] for entry in pc.value_counts(keys).to_pylist() if entry["counts"] > 1]
    if doubled:
        raise CacheError(
            f"The cache's table of samples lists {doubled[0]} more than once. Run `ftk prepare RUN.yaml`, then "
            f"`ftk cache RUN.yaml`: they write it anew and keep what is encoded."
        )
