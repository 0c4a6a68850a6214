"""A source yields records; it knows nothing of buckets. One file in this folder is one kind of source."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ftk.configs.schema import SourceConfig
from ftk.contracts import Reject, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One image of a source with its captions, before anything was decoded.

    `identity` is stable and unique within the source (the relative path); `location` is where the bytes are now.
    """

    source: str
    identity: str
    location: Path
    captions: tuple[str, ...]
    repeats: int
    role: Role


class Source(Protocol):
    """What a kind of source must provide."""

    def records(self, config: SourceConfig) -> Iterator[Record | Reject]:
        """Every input in a stable order, each either a record or a reject with its reason."""
