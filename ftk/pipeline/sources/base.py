"""The Source protocol: where images and captions come from. One file in this folder is one kind of source.

A source knows nothing of buckets. It cuts itself into partitions, which are what machines share out, and reads a partition
as a stream of records; whatever cannot become a record is a reject with its reason.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

from pydantic import BaseModel, ConfigDict, Field

from ftk import locations
from ftk.configs import load
from ftk.configs.schema import SourceConfig
from ftk.contracts import Reject, UnmatchedCaption
from ftk.errors import ConfigError
from ftk.pipeline.conditions import base as conditions

MOST_EXAMPLES = 100
"""Files that are named where more of them are counted."""
A_PLACE = "a place"
"""Stands in a recipe for a place that a setting names."""


@dataclass(frozen=True, slots=True)
class Place:
    """Marks a setting of a source that says where something lies: `masks: Annotated[str | None, Place()]`.

    What a dataset is made of stays the same when it is moved. So recipes and signatures keep that such a setting is there,
    and how many places it names, but not the places. With `only_outside`, names below the source's own path are no places:
    they select what is read, and are kept.
    """

    only_outside: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """The bytes of one file: those that the source has streamed past already, or a path or URL to read them from.

    `fetched_once`: nothing but its URL tells whether the file has changed. It is taken to stay as it was, and is not
    fetched again once it has given a sample.
    """

    location: str
    data: bytes | None = None
    fetched_once: bool = False

    @property
    def name(self) -> str:
        """What to call it in a table of rejects: a member's name in its archive, or a file's, without where that lies."""
        member = self.location if self.data is None else self.location.rpartition("#")[2]
        return locations.file_name(member) if self.data is None or is_outside(member) else locations.printable(member)

    @property
    def is_remote(self) -> bool:
        """Whether reading it takes a network."""
        return self.data is None and locations.is_url(self.location)

    def read(self, seconds: float = locations.FETCH_SECONDS) -> bytes:
        """The bytes; see `locations.read_bytes` for what it raises, and for `seconds`."""
        return locations.read_bytes(self.location, seconds=seconds) if self.data is None else self.data


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One image of a source, before anything was decoded.

    `identity` is stable and unique within the source (the relative path, the tar's name and the key), and may hold
    surrogate escapes for bytes that are no UTF-8. `captions` are as found: at least one, none empty. `controls` are
    followed by the source's references, see `parse`: by `num_references` of them, where that is not one for each that the
    source names. `made_at`: where among its control images those lie that are made from the image, if not where the source
    lists them, because it found none or several in place of one before them. `is_fallback`: the image has no caption of its
    own, and took the source's. `repeats` multiplies the source's own.
    """

    identity: str
    image: Blob
    captions: tuple[str, ...]
    mask: Blob | None = None
    controls: tuple[Blob, ...] = ()
    num_references: int | None = None
    made_at: tuple[int, ...] | None = None
    is_fallback: bool = False
    repeats: int = 1

    @property
    def blobs(self) -> tuple[Blob, ...]:
        """All its files: the image, the mask if there is one, and the controls."""
        return (self.image, *([self.mask] if self.mask else []), *self.controls)

    @property
    def is_remote(self) -> bool:
        """Whether reading it takes a network."""
        return any(blob.is_remote for blob in self.blobs)


class Beside(TypedDict):
    """What `beside` gives: fields of `Record`."""

    controls: tuple[Blob, ...]
    num_references: int | None
    made_at: tuple[int, ...] | None


def beside(config: SourceConfig, found: Sequence[Sequence[Blob]]) -> Beside:
    """The fields of `Record` for what a source found under each of its `controls`, and after these of its `references`."""
    first = len(found) - len(config.references)
    num_references = sum(map(len, found[first:]))
    is_usual = num_references == len(config.references)
    return {
        "controls": tuple(blob for blobs in found for blob in blobs),
        "num_references": None if is_usual else num_references,
        "made_at": _made_at(config, [len(blobs) for blobs in found[:first]]),
    }


def _made_at(config: SourceConfig, numbers: Sequence[int]) -> tuple[int, ...] | None:
    """See `Record`; `numbers`: how many control images were found for each that the source names."""
    made = {position for position, _ in config.made_controls}
    if not made or all(number == 1 for number in numbers):
        return None
    given = iter(numbers)
    sizes = [1 if position in made else next(given) for position in range(len(made) + len(numbers))]
    return tuple(sum(sizes[:position]) for position in sorted(made))


class MayLack(BaseModel):
    """Of kinds of source that have control images and references: whether an image may be without."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    optional: bool = Field(default=False, description="an image may lack control images and references, some or all")


@dataclass(frozen=True, slots=True, kw_only=True)
class Notes:
    """What a listing shows that a user should see: text files that are no image's caption, and sentences of advice."""

    num_unmatched_captions: int = 0
    unmatched_captions: tuple[UnmatchedCaption, ...] = ()
    hints: tuple[str, ...] = ()

    def and_also(self, other: "Notes") -> "Notes":
        """Both together, with no more examples than one has."""
        return Notes(
            num_unmatched_captions=self.num_unmatched_captions + other.num_unmatched_captions,
            unmatched_captions=(*self.unmatched_captions, *other.unmatched_captions)[:MOST_EXAMPLES],
            hints=(*self.hints, *other.hints),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """A part of a source that is read in one go: plain values, so that it can be sent to another machine.

    `signature` changes whenever anything that `read` would give might have changed, and is cheap: names, sizes, times,
    entity tags. It is None when nothing vouches for the content. `num_records` is None when only reading can tell. `notes`,
    on a source's last partition, are about the whole source and shape no sample.
    """

    payload: tuple[Any, ...]
    signature: str | None
    num_records: int | None
    notes: Notes = Notes()


class Source(Protocol):
    """What a kind of source must provide."""

    Settings: type[BaseModel]
    """What a user may write for this kind of source, beside the fields of `SourceConfig`. Where something other than
    `path` lies is annotated with `Place`."""

    def accepts(self, path: str) -> bool:
        """Whether a source with `format: auto` and this path is of this kind; looks at the name alone."""

    def partitions(self, config: SourceConfig, settings: Any, shard_samples: int) -> Iterator[Partition]:
        """The parts in a stable order, of `shard_samples` records each where the source can be cut anywhere.

        Raises:
            SourceError: the source is missing or empty; the message says what was found and what to do.
            EnvironmentFault: the network or the disk failed.
        """

    def read(self, config: SourceConfig, settings: Any, partition: Partition) -> Iterator[Record | Reject]:
        """Every input of one partition, in a stable order, each either a record or a reject."""


def available() -> list[str]:
    """Names of all kinds of source: the files of this folder."""
    package = importlib.import_module("ftk.pipeline.sources")
    return sorted(item.name for item in pkgutil.iter_modules(package.__path__) if item.name != "base")


def get(name: str) -> Source:
    """The kind of source called `name`; `ConfigError` names the valid ones."""
    if name not in available():
        raise ConfigError(f"data.sources: there is no format {name!r}. Valid: auto, {', '.join(available())}")
    source: Source = importlib.import_module(f"ftk.pipeline.sources.{name}").SOURCE
    return source


def kind(config: SourceConfig) -> str:
    """The format that a run file names, or the one that its path's suffix tells."""
    if config.format != "auto":
        return config.format
    accepting = [name for name in available() if name != "folder" and get(name).accepts(config.path)]
    return accepting[0] if accepting else "folder"


def parse(config: SourceConfig, place: str = "data.sources") -> tuple[Source, Any]:
    """The kind of source that a run file names at `place`, and its settings validated by the kind's own model.

    Their `controls` then name the source's `references` too, after its control images.

    Looks at names alone. `ConfigError` lists every mistake.
    """
    name = kind(config)
    source = get(name)
    fields: dict[str, Any] = {"model_config": ConfigDict(extra="forbid", frozen=True)}
    # Both models at once, so that a misspelt key is compared with the common ones and with this kind's own.
    both = type("Source", (source.Settings, SourceConfig), fields)
    where, tree = f"source {config.source_name} ({name})", config.model_dump(exclude_unset=True)
    if conditions.of(config):
        # Its kind knows only the control images that it has to find.
        tree = {**{key: value for key, value in tree.items() if key != "controls"}, **config.settings}
    settings: Any = load.validate(both, tree, where, prefix=f"{place}.")
    if getattr(settings, "optional", False) and not (settings.controls or config.references):
        raise ConfigError(f"{where}: `optional` has no effect without `controls` or `references`. Leave it out, or name some.")
    if not config.references:
        return source, settings
    if "controls" not in source.Settings.model_fields:
        raise ConfigError(f"{where}: `references`: this kind of source has no images beside its images. Leave it out.")
    # A source finds references as it finds control images: they come after those, and are told apart by their number.
    both_kinds = {**tree, "controls": [*settings.controls, *config.references]}
    return source, load.validate(both, both_kinds, where, prefix=f"{place}.")


def places(config: SourceConfig) -> dict[str, Place]:
    """The settings of this kind of source that name places, by their names."""
    fields = get(kind(config)).Settings.model_fields
    marks = ((name, mark) for name, field in fields.items() for mark in field.metadata)
    found = {name: mark for name, mark in marks if isinstance(mark, Place)}
    # References are found as control images are: where those are places, so are they.
    return {**found, "references": found["controls"]} if "controls" in found else found


def without_places(config: SourceConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings with `A_PLACE` where they name a place; of several places in a list each is replaced."""
    marks = places(config)
    return {name: _hidden(value, marks[name]) if name in marks else value for name, value in settings.items()}


def is_outside(name: str) -> bool:
    """Whether a file's name leads out of the folder or dataset that it is looked up in."""
    return locations.is_url(name) or name.startswith(("/", "~", "file://")) or ".." in name.split("/")


def _hidden(value: Any, place: Place) -> Any:
    if isinstance(value, str):
        return value if place.only_outside and not is_outside(value) else A_PLACE
    if isinstance(value, Mapping) and "make" in value:
        return dict(value)
    if isinstance(value, Mapping):
        return {key: _hidden(item, place) for key, item in value.items()}
    return [_hidden(item, place) for item in value] if isinstance(value, (list, tuple)) else value
