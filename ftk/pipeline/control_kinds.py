"""What kinds of control images a prepared dataset has: those that its sources were given, and those that were made."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ftk.pipeline.sources.base import A_PLACE

GIVEN = "given"
COLUMNS = ["source", "num_controls"]


def labels(source: Mapping[str, Any]) -> list[str]:
    """What to call each of a source's control images, in their order; `source` is its part of a dataset's recipe."""
    return [_label(entry) for entry in source.get("controls") or []]


def _label(entry: Any) -> str:
    if not isinstance(entry, Mapping):
        return GIVEN if entry == A_PLACE else str(entry)
    settings = (f"{name} {_plain(value)}" for name, value in entry.items() if name != "make")
    return ", ".join([str(entry["make"]), *settings])


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def count(num_samples: int, num_controls: int, source: Mapping[str, Any]) -> Counter[str]:
    """Control images by kind, of samples of one source that have `num_controls` in all; each of them has every made one."""
    made = [entry["make"] for entry in source.get("controls") or [] if isinstance(entry, Mapping)]
    counts = Counter({kind: number * num_samples for kind, number in Counter(made).items()})
    counts[GIVEN] = num_controls - len(made) * num_samples
    return +counts


def count_tables(tables: Iterable[pa.Table], recipe: Mapping[str, Any]) -> dict[str, int]:
    """Control images by kind, of the tables of shards; each table holds samples of one source."""
    counts: Counter[str] = Counter()
    for table in tables:
        if len(table):
            source = recipe.get("sources", {}).get(table["source"][0].as_py()) or {}
            counts += count(len(table), pc.sum(table["num_controls"]).as_py(), source)
    return dict(sorted(counts.items()))
