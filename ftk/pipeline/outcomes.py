"""What became of each input of a committed shard, so that a shard that is made again takes over what needs no fetching."""

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftk import storage
from ftk.contracts import Reject, RejectReason, SampleRow
from ftk.pipeline.sources.base import Blob, Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one input, other than `UNREACHABLE`.

    `key` stands for its name and for the URLs of files that are fetched once, `line` for all that decided the outcome.
    `contents` are the hashes of its files, `num_rows` is how many samples it gave, `num_empty_masks` how many of
    these have a mask that leaves nothing to train, and `reject` the reason and detail if it gave none.
    """

    key: str
    line: str
    contents: list[str]
    num_rows: int
    reject: list[str] | None
    num_empty_masks: int = 0


@dataclass(frozen=True, slots=True)
class Reused:
    """An input whose outcome is taken over: its samples, or its reject."""

    record: Record
    outcome: Outcome
    rows: list[SampleRow]
    shard: "EarlierShard"

    @property
    def reject(self) -> tuple[RejectReason, str] | None:
        """(reason, detail) if it gave no sample."""
        return None if self.outcome.reject is None else (RejectReason(self.outcome.reject[0]), self.outcome.reject[1])

    def files(self, row: SampleRow) -> Iterator[tuple[str, bytes]]:
        """(suffix, bytes) of a sample's files in the order of the tar; only now are they read."""
        return self.shard.files(row)


def key_of(record: Record) -> str:
    """Identifies an input, with the URLs of its files that are fetched once; a digest, for URLs may hold secrets."""
    urls = [blob.location for blob in record.blobs if blob.fetched_once]
    return storage.digest([record.identity.encode("utf-8", "surrogateescape").hex(), urls])


def plain(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """As JSON values, for a shard's receipt."""
    return [asdict(outcome) for outcome in outcomes]


class EarlierShard:
    """The outcomes of a whole committed shard, and its samples, which are read when one is asked for.

    Args:
        is_same: the source vouches that all its files are those that the shard was made from.
    """

    def __init__(self, tar: Path, table: Path, outcomes: Sequence[Outcome], *, is_same: bool) -> None:
        self._tar, self._table, self._is_same = tar, table, is_same
        self._outcomes: dict[str, tuple[Outcome, int]] = {}
        first_row = 0
        for outcome in outcomes:
            self._outcomes[outcome.key] = outcome, first_row
            first_row += outcome.num_rows
        self._rows: list[SampleRow] | None = None
        self._members: dict[str, list[tarfile.TarInfo]] = {}

    def knows(self, record: Record) -> bool:
        """Whether it has an outcome of this input, made from the same things or not."""
        return key_of(record) in self._outcomes

    def has_fetched(self, item: Record | Reject) -> bool:
        """Whether it knows the files that are fetched once, of an input that has some."""
        if isinstance(item, Reject) or not any(blob.fetched_once for blob in item.blobs):
            return True
        return self.knows(item)

    def content(self, record: Record, position: int, blob: Blob) -> str | None:
        """The hash of a record's file, if that is known without reading it."""
        outcome, _ = self._outcomes.get(key_of(record), (None, 0))
        if outcome is None or position >= len(outcome.contents) or not (blob.fetched_once or self._is_same):
            return None
        return outcome.contents[position] or None

    def reuse(self, record: Record, line: str) -> Reused | None:
        """The record's outcome, if it was made from the same things as now."""
        outcome, first_row = self._outcomes.get(key_of(record), (None, 0))
        if outcome is None or outcome.line != line:
            return None
        rows = self._all_rows()[first_row : first_row + outcome.num_rows]
        return Reused(record, outcome, rows, self)

    def _all_rows(self) -> list[SampleRow]:
        if self._rows is None:
            self._rows = [SampleRow(**row) for row in storage.read_table(self._table).to_pylist()]
            with tarfile.open(self._tar, mode="r:") as tar:
                for member in tar:
                    self._members.setdefault(member.name.partition(".")[0], []).append(member)
        return self._rows

    def files(self, row: SampleRow) -> Iterator[tuple[str, bytes]]:
        """(suffix, bytes) of a sample's files, in the order of the tar."""
        with self._tar.open("rb") as file:
            for member in self._members[row.key]:
                file.seek(member.offset_data)
                yield member.name.partition(".")[2], file.read(member.size)
