"""What cells of a table mean as text: nothing, a caption, or a number that stands for a label of the `datasets` library."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_NULL_TEXTS = frozenset({"nan", "NaN", "None", "null", "NULL", "<NA>"})
"""How programs write a missing value where they write text."""


def is_null(value: object) -> bool:
    """Whether a cell stands for no value: null, not a number, blank, or the text that programs write for these."""
    if isinstance(value, str):
        return not value.strip() or value.strip() in _NULL_TEXTS
    return value is None or (isinstance(value, float) and math.isnan(value))


@dataclass(frozen=True, slots=True)
class Labels:
    """The names of each column of labels, by their numbers."""

    names: Mapping[str, list[str]]

    def text(self, column: str, cell: object) -> object:
        """A cell of captions with labels as their names, and with nulls as None, as is -1 of a label; also within lists."""
        if isinstance(cell, list):
            return [self.text(column, each) for each in cell]
        if is_null(cell):
            # A blank text stays one: it is an empty caption, and not a missing one.
            return cell if isinstance(cell, str) and not cell.strip() else None
        names = self.names.get(column)
        if names is None or not isinstance(cell, int):
            return cell
        return None if cell == -1 else names[cell] if 0 <= cell < len(names) else cell


def of_parquet(parquet: Any) -> Labels:
    """The labels of a Parquet file that `datasets` wrote: it leaves its features in the schema's metadata."""
    metadata = parquet.schema_arrow.metadata or {}
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return Labels({name: names for name, feature in features.items() if (names := _label_names(feature))})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Labels({})


def _label_names(feature: Any) -> list[str]:
    """Of a feature as JSON, itself or within a list."""
    if isinstance(feature, list):
        return _label_names(feature[0]) if feature else []
    if not isinstance(feature, dict):
        return []
    if feature.get("_type") == "ClassLabel":
        names = feature.get("names")
        return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []
    return _label_names(feature.get("feature"))
