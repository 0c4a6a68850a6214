"""What there is to do: the sources cut into units, a pure function of the input. A unit is shared out and redone as a whole."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ftk import locations, storage
from ftk.configs.schema import DataConfig, SourceConfig
from ftk.contracts import PREPARED_SCHEMA, Reject, RejectReason
from ftk.errors import SourceError
from ftk.pipeline.captions import CAPTIONS_VERSION
from ftk.pipeline.images import CHECKS_VERSION, IMAGES_VERSION, ImageRecipe
from ftk.pipeline.outcomes import key_of
from ftk.pipeline.reachability import Reachability
from ftk.pipeline.sources import base as sources
from ftk.pipeline.sources.base import Partition, Record
from ftk.progress import track

Duplicates = dict[int, str]
"""Positions in a unit of records that are equal to an earlier one, and that one's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceUnit:
    """A partition of a source, and what of it is left out as duplicate. Plain values: it can be sent to another machine."""

    number: int
    source: SourceConfig
    partition: Partition
    duplicates: Duplicates

    def shard_name(self, piece: int) -> str:
        """Where the unit's records end up: in one shard, or in several when there are more than one takes."""
        return f"{self.number:05d}" if piece == 0 else f"{self.number:05d}-{piece:04d}"

    @property
    def signature(self) -> str | None:
        """Changes whenever the unit's records might have changed; None when nothing vouches for them."""
        if self.partition.signature is None:
            return None
        settings = sources.without_places(self.source, self.source.settings)
        # Only where there are some: what was prepared without them keeps its signature.
        references = [len(self.source.references)] if self.source.references else []
        return storage.digest([sources.kind(self.source), settings, self.source.caption, *references, self.partition.signature])

    @property
    def listing(self) -> str:
        """Identifies the records by name: two listings of a source that holds still are equal."""
        return storage.digest([self.source.source_name, self.partition.payload])

    def recipe_fingerprint(self, recipe: ImageRecipe, data: DataConfig) -> str:
        """Stands for everything but the records themselves that shapes this unit's shards; `data` as it is for its source."""
        source = self.source.model_dump(mode="json", include={"repeats", "role", "trigger", "prefix", "suffix"})
        captions = data.captions.model_dump(mode="json")
        duplicates = sorted(self.duplicates.items())
        # The rest enters only where it is set: what was prepared without it keeps its fingerprint.
        optional = ("references", "exact_sizes", "aspects", "made")
        shape = {name: value for name, value in asdict(recipe).items() if name not in optional}
        parts = [self.source.source_name, source, captions, data.shard_samples, duplicates, shape]
        if self.source.references:
            assert recipe.references is not None
            parts.append([len(self.source.references), asdict(recipe.references)])
        parts += [{name: value} for name in ("exact_sizes", "aspects") if (value := getattr(recipe, name))]
        parts += [{"made": [made.fingerprint for made in recipe.made]}] if recipe.made else []
        return storage.digest([PREPARED_SCHEMA, IMAGES_VERSION, CHECKS_VERSION, CAPTIONS_VERSION, *parts])


def units(data: DataConfig, duplicates: dict[int, Duplicates]) -> Iterator[SourceUnit]:
    """All units, in the order of the sources; lists the sources anew each time, and holds one unit at a time.

    Raises:
        SourceError: a source is missing or empty.
        EnvironmentFault: the network or the disk failed.
    """
    number = 0
    for config in data.sources:
        source, settings = sources.parse(config)
        for partition in source.partitions(config, settings, data.shard_samples):
            yield SourceUnit(number=number, source=config, partition=partition, duplicates=duplicates.get(number, {}))
            number += 1


def look(data: DataConfig) -> None:
    """Open every local source: what is missing or empty is said before anything is written.

    Raises:
        SourceError: a source is missing or empty.
    """
    for config in data.sources:
        source, settings = sources.parse(config)
        if not locations.is_url(config.path):
            next(source.partitions(config, settings, data.shard_samples), None)


def records(unit: SourceUnit) -> Iterator[Record | Reject]:
    """The unit's inputs in order, with those left out that repeat an earlier one."""
    source, settings = sources.parse(unit.source)
    taken: set[str] = set()
    for position, item in enumerate(source.read(unit.source, settings, unit.partition)):
        if not isinstance(item, Record):
            yield item
        elif item.identity in taken:
            yield reject(unit, item, RejectReason.NAME_TAKEN, "an earlier image of this source has the same name")
        elif position in unit.duplicates:
            yield reject(unit, item, RejectReason.DUPLICATE, f"the same bytes as {unit.duplicates[position]}")
        else:
            yield item
        if isinstance(item, Record):
            taken.add(item.identity)


def reject(unit: SourceUnit, record: Record, reason: RejectReason, detail: str) -> Reject:
    """A record that gives no sample."""
    return Reject(source=unit.source.source_name, path=printable(record), reason=reason, detail=detail)


def printable(record: Record) -> str:
    """A record's name for tables: it may hold bytes that are no UTF-8, and they may not."""
    return record.identity.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def shown_name(unit: SourceUnit, record: Record, data: DataConfig) -> str:
    """What a message calls a record: its path, and before it the source where there are several."""
    path = reject(unit, record, RejectReason.DUPLICATE, "").path
    return path if len(data.sources) == 1 else f"{unit.source.source_name}: {path}"


def find_duplicates(data: DataConfig, known: Callable[[SourceUnit], Mapping[str, str]] = lambda _: {}) -> dict[int, Duplicates]:
    """By unit, the records whose image has the same bytes as one before it; reads every image once.

    Args:
        known: of a unit, the hashes of images that are fetched once and were, by `outcomes.key_of` their record.

    Raises:
        SourceError: under `duplicates: error`, when there are any.
        EnvironmentFault: the network is down.
    """
    if data.duplicates == "keep":
        return {}
    reachability = Reachability(data.max_unreachable_fraction)
    first_of: dict[bytes, str] = {}
    found: defaultdict[int, Duplicates] = defaultdict(dict)
    with track("hash", None, "image") as progress:
        for unit in units(data, {}):
            hashes = known(unit)
            for position, item in enumerate(records(unit)):
                progress.advance(1)
                content = _content(item, reachability, hashes)
                if content is None:
                    continue
                assert isinstance(item, Record)
                name = shown_name(unit, item, data)
                if (first := first_of.setdefault(content, name)) is not name:
                    found[unit.number][position] = first
    if found and data.duplicates == "error":
        raise SourceError(_duplicates_message(found))
    return dict(found)


def _content(item: Record | Reject, reachability: Reachability, hashes: Mapping[str, str]) -> bytes | None:
    """The hash of an image; None where it is, or will be, a reject."""
    if not isinstance(item, Record):
        return None
    if hashes and item.image.fetched_once and (known := hashes.get(key_of(item))):
        return bytes.fromhex(known)[:16]
    content, unreachable = None, ""
    try:
        content = hashlib.sha256(item.image.read()).digest()[:16]
    except (locations.UnreachableError, locations.RefusedError) as error:
        unreachable = error.detail
    except OSError:
        pass  # it becomes a reject when its shard is made
    if item.image.is_remote:
        reachability.note(RejectReason.UNREACHABLE if unreachable else None, unreachable)
        if reachability.stopped:
            raise reachability.error()
    return content


def _duplicates_message(found: dict[int, Duplicates]) -> str:
    firsts = [first for duplicates in found.values() for first in duplicates.values()]
    shown = "".join(f"\n  {first}" for first in list(dict.fromkeys(firsts))[:10])
    return (
        f"{len(firsts)} images have the same bytes as an earlier one, and data.duplicates is `error`. The earlier:{shown}\n"
        f"Remove the copies, or set data.duplicates to `first` or `keep`."
    )


def contents_digest(inputs: list[list[Any]]) -> str:
    """Stands for every input byte of a shard: each record's identity, captions and file hashes, each reject's reason."""
    return storage.digest(inputs)
