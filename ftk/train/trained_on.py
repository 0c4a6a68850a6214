"""What samples a run is trained on, so that a resumed run can say in words what has changed.

A checkpoint holds a sum of hashes for each kind of content: that finds every change, whatever the number of samples. The
run's folder holds `trained-on.parquet`, a row of hashes per sample, which counts them; not above `MOST_ROWS` samples.

Shape legend: S samples.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from ftk import storage
from ftk.cache.store import CacheStore
from ftk.train import held_out

LOGGER = logging.getLogger("ftk")
FILE = "trained-on.parquet"
MOST_ROWS = 1_000_000
Words = npt.NDArray[np.uint64]
_AT_ONCE = 2**16
_FACTS = b"ftk"
_CONTENTS = {
    "latents": "image",
    "texts": "caption",
    "mask": "mask",
    "controls": "control image",
    "references": "reference",
    "repeats": "repeat count",
    "role": "role",
}
"""Columns of the cache's table that say what is trained on, and what a user calls one of them."""


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """The samples of a cache, as hashes.

    Attributes:
        identity: sums of hashes over the samples, whatever their order, for a checkpoint.
        repeats: of each source, as the run file has them.
        table: a row per sample, ordered by key; None where there are too many.
    """

    identity: Mapping[str, Any]
    repeats: Mapping[str, Any]
    table: pa.Table | None

    @classmethod
    def of(cls, store: CacheStore) -> "TrainedOn":
        """Hash the samples of a cache."""
        num_samples, parts, sums = len(store.table), [], dict.fromkeys(["key", *_CONTENTS], 0)
        for rows in store.table.to_batches(max_chunksize=_AT_ONCE):
            key_S = _hashed(rows["key"])
            content_S = {name: _content(rows, name) for name in _CONTENTS}
            for name, hash_S in {"key": key_S, **{name: _mixed(each ^ key_S) for name, each in content_S.items()}}.items():
                sums[name] = (sums[name] + int(hash_S.sum(dtype=np.uint64))) % 2**64
            if num_samples <= MOST_ROWS:
                columns = {**content_S, **_picture(rows)}
                # Half a hash will do to see that the content of a known sample is another.
                halves = {name: pa.array(each.astype(np.uint32)) for name, each in columns.items()}
                parts.append(pa.table({"key": pa.array(key_S), **halves}))
        sources = store.manifest.prepared_recipe.get("sources", {})
        return cls(
            identity={"samples": num_samples, **{name: f"{value:016x}" for name, value in sums.items()}},
            repeats={name: settings.get("repeats") for name, settings in sources.items()},
            table=pa.concat_tables(parts).sort_by("key") if parts else None,
        )

    @classmethod
    def read(cls, directory: Path) -> "TrainedOn | None":
        """What a run's folder holds; None where it holds nothing, or something damaged: it only helps to count."""
        try:
            table = storage.read_table(directory / FILE)
            facts = json.loads(table.schema.metadata[_FACTS])
            return cls(identity=dict(facts["identity"]), repeats=dict(facts["repeats"]), table=table)
        except FileNotFoundError:
            return None
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            LOGGER.warning("%s is damaged (%s): it is written again", directory / FILE, error)
            return None

    def commit(self, directory: Path) -> None:
        """Write it into a run's folder, unless it is there."""
        committed = TrainedOn.read(directory)
        if self.table is None or (committed is not None and committed.identity == self.identity):
            return
        facts = {"identity": dict(self.identity), "repeats": dict(self.repeats)}
        storage.commit_table(directory / FILE, self.table.replace_schema_metadata({_FACTS: json.dumps(facts, sort_keys=True)}))

    def changes(self, before: Mapping[str, Any], directory: Path) -> list[str]:
        """In words, what is other than in a checkpoint of `before`, another `identity`; counted where `directory` helps."""
        changed = [name for name in self.identity if before.get(name) not in (None, self.identity[name])]
        committed = TrainedOn.read(directory) if changed else None
        if committed is None or self.table is None or committed.table is None or committed.identity != before:
            return _uncounted(self.identity, before, changed)
        old, new = committed.table, self.table
        is_old, is_new = (pc.is_in(one["key"], value_set=other["key"]) for one, other in ((new, old), (old, new)))
        counts = {"added": _pictures(new.filter(pc.invert(is_old))), "removed": _pictures(old.filter(pc.invert(is_new)))}
        words = [f"{_counted(count, 'image')} {what}" for what, count in counts.items() if count]
        # Both are ordered by key, so what is in both has the same order.
        old, new = old.filter(is_new), new.filter(is_old)
        for name, what in _CONTENTS.items():
            count = _pictures(new.filter(pc.not_equal(old[name], new[name])))
            words += self._changed(name, what, count, committed.repeats) if count else []
        return words or _uncounted(self.identity, before, changed)

    def _changed(self, name: str, what: str, count: int, repeats: Mapping[str, Any]) -> list[str]:
        if name == "repeats":
            sources = [source for source in self.repeats if repeats.get(source) not in (None, self.repeats[source])]
            if sources:
                return [
                    f"repeats of source {source} changed: {repeats[source]}, now {self.repeats[source]}" for source in sources
                ]
        if name in ("controls", "references"):
            return [f"{what}s of {_counted(count, 'image')} changed"]
        return [f"{_counted(count, what)} changed"]


def _uncounted(now: Mapping[str, Any], before: Mapping[str, Any], changed: list[str]) -> list[str]:
    """What sums alone tell."""
    words = [f"{before['samples']:,} samples, now {now['samples']:,}"] if "samples" in changed else []
    if "key" in changed:
        # Each sum is over keys too, so nothing can be told of the rest.
        return words or ["some images are others"]
    return [f"some {_CONTENTS[name]}s changed" for name in changed if name in _CONTENTS]


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def _pictures(samples: pa.Table) -> int:
    """How many images the samples are made from: its variants (sizes, crops, the mirror image) share an image's name.

    Two samples of one name and one variant are two images.
    """
    variants = samples.group_by(["name", "variant"]).aggregate([([], "count_all")])
    images = variants.group_by("name").aggregate([("count_all", "max")])
    return int(pc.sum(images["count_all_max"]).as_py() or 0)


def _picture(rows: pa.RecordBatch) -> dict[str, Words]:
    """For `_pictures`: what the variants of an image share, and what they differ in."""
    readable = pc.replace_substring_regex(rows["key"], held_out.KEY_SUFFIX, "")
    columns = {"name": ("width", "height"), "variant": ("bucket_width", "bucket_height", "crop_x", "crop_y", "flipped")}
    picture = {"name": _hashed(readable), "variant": np.zeros(len(rows), np.uint64)}
    for kind, names in columns.items():
        for name in names:
            picture[kind] = _mixed(picture[kind] + _hashed(rows[name]) + np.uint64(1))
    return picture


def _content(rows: pa.RecordBatch, name: str) -> Words:
    """[S]: a hash of each sample's content of a kind; 0 where it has none, as where the cache has no such column."""
    return _hashed(rows[name]) if name in rows.schema.names else np.zeros(len(rows), np.uint64)


def _hashed(column: pa.Array) -> Words:
    """[S]: a hash of each value of a column of texts, numbers, or lists of texts; 0 of what is empty."""
    if pa.types.is_dictionary(column.type):
        hash_of_value: Words = _hashed(column.dictionary)[column.indices.to_numpy()]
        return hash_of_value
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return _joined(_hashed(column.flatten()), pc.list_value_length(column).to_numpy())
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        if not pc.max(pc.binary_length(column)).as_py():
            return np.zeros(len(column), np.uint64)
        texts = column.cast(pa.binary()).to_pylist()
        return np.fromiter((xxhash.xxh3_64_intdigest(text) if text else 0 for text in texts), np.uint64, len(texts))
    return _mixed(column.cast(pa.float64()).to_numpy().view(np.uint64))


def _joined(values: Words, length_S: npt.NDArray[Any]) -> Words:
    """[S]: a hash of each run of values, of the given lengths one after the other; 0 of an empty one."""
    length_S = length_S.astype(np.int64)
    end_S = np.cumsum(length_S)
    place = np.arange(len(values)) - np.repeat(end_S - length_S, length_S)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(_mixed(values + place.astype(np.uint64) + np.uint64(1)))])
    return _mixed(sums[end_S] - sums[end_S - length_S])


def _mixed(words: Words) -> Words:
    """Each word with its bits stirred: the finalizer of SplitMix64 (Steele et al. 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
