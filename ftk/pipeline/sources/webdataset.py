"""Tars in the WebDataset layout, as img2dataset and `ftk prepare` write them: streamed front to back, never extracted.

A member's key is its path up to the first dot of its last part, and what follows that dot is its suffix; neighbouring
members of one key are a sample. A key is only ever text here: `../a` and `/a` lead nowhere.

webdataset groups the members; the tar itself is read by `tar_stream`, which refuses what webdataset's reader passes over.
"""

import contextlib
import functools
import itertools
import json
import posixpath
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field

from ftk import locations, storage
from ftk.configs.schema import SourceConfig
from ftk.contracts import Reject, RejectReason
from ftk.errors import SourceError
from ftk.pipeline import captions, light_webdataset, signatures
from ftk.pipeline.captions import Problem
from ftk.pipeline.names import folded
from ftk.pipeline.sources import folder
from ftk.pipeline.sources.base import Blob, MayLack, Partition, Record, beside
from ftk.pipeline.tar_stream import Tar

IMAGE_SUFFIXES = frozenset(suffix.removeprefix(".") for suffix in folder.IMAGE_SUFFIXES)
CAPTION_ORIGINS = ("txt", "caption", *(f"json:{key}" for key in captions.JSON_KEYS))
MAX_MEMBER_BYTES = 512 << 20
"""No encoded photograph is larger, and this process holds a few members at once."""
MAX_TEXT_BYTES = captions.MAX_JSON_BYTES

_TAR_NAME = re.compile(r"(^|[.,{])(tar|tar\.gz|tgz)[}\]]*$", re.IGNORECASE)
_MEMBER_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)", re.DOTALL)
_PLAIN_NAME = re.compile(r"(?:.*/)?[^/.]+", re.DOTALL)
_JSON = "json:"


def _suffix(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return value if value.startswith(_JSON) else value.removeprefix(".").lower()


Suffix = Annotated[str, BeforeValidator(_suffix)]


class TarSettings(MayLack):
    """Which members of a sample are what. A suffix is what follows the first dot of a member's name: `jpg`, `mask.png`."""

    image: tuple[Suffix, ...] | None = Field(default=None, min_length=1, description="suffixes of the image")
    captions: tuple[Suffix, ...] = Field(
        default=(),
        description="where captions come from: suffixes, or `json:KEY` for a key of the json member; all that are named, "
        "or by default the first of " + ", ".join(CAPTION_ORIGINS),
    )
    mask: Suffix | None = Field(default=None, description="suffix of the mask; an image without one is rejected")
    controls: tuple[Suffix, ...] = Field(default=(), description="suffixes of the control images, in their order")

    @functools.cached_property
    def images(self) -> frozenset[str]:
        """The suffixes that make a member the image."""
        return frozenset(self.image or IMAGE_SUFFIXES - {self.mask, *self.controls})

    @property
    def origins(self) -> tuple[str, ...]:
        """Where captions come from, in order."""
        return self.captions or CAPTION_ORIGINS

    @functools.cached_property
    def wanted(self) -> frozenset[str]:
        """The suffixes that are read; json always, for it says why there is no image. `jpg.txt` is a name that some give."""
        texts = {*(origin for origin in self.origins if not origin.startswith(_JSON)), "json"}
        behind = (f"{image}.{text}" for image in self.images for text in texts)
        return frozenset({*self.images, *texts, *behind, *filter(None, [self.mask]), *self.controls})


@dataclass(slots=True)
class _Member:
    """A file of a tar; `data` is filled in where the settings need it and nothing is wrong."""

    name: str
    suffix: str
    data: bytes | None = None
    problem: Problem | None = None


@dataclass(frozen=True, slots=True)
class _Sample:
    """Neighbouring members of one key; `members` maps a suffix to the member's name and bytes."""

    key: str
    names: list[str]
    members: dict[str, tuple[str, bytes]]
    problem: Problem | None


class WebDataset:
    """One partition a tar; a pattern such as `shards/{00000..00099}.tar` or `s3://bucket/*.tar` names many."""

    Settings: type[BaseModel] = TarSettings

    def accepts(self, path: str) -> bool:
        """Tars by their suffix, packed with gzip or not, also those that a pattern stands for."""
        return _TAR_NAME.search(posixpath.basename(locations.without_secrets(path))) is not None

    def partitions(self, config: SourceConfig, settings: TarSettings, shard_samples: int) -> Iterator[Partition]:
        """One a tar, in the order of the pattern; a tar is never cut, for it is read from its front."""
        tars = locations.expand(config.path)
        if not tars:
            pattern = locations.redacted(config.path)
            raise SourceError(f"data.sources: {pattern} matches no file.{_around(config.path)} Name the tars of your images.")
        for location, name in zip(tars, names_of(tars), strict=True):
            with _readable(location):
                signature = storage.digest([name, locations.signature(location)])
            yield Partition(payload=(location, name), signature=signature, num_records=None)

    def read(self, config: SourceConfig, settings: TarSettings, partition: Partition) -> Iterator[Record | Reject]:
        """One record or reject a key, in the order of the tar.

        Raises:
            SourceError: the tar is damaged or breaks off; what was whole before that was given.
            EnvironmentFault: the network or the disk failed.
        """
        location, name = partition.payload
        keys: set[str] = set()
        without: dict[str, str] = {}
        for sample in _samples(location, settings):
            item = _again(sample) if sample.key in keys else _item(config, settings, location, name, sample)
            keys.add(sample.key)
            if item.is_fallback if isinstance(item, Record) else item.reason is RejectReason.CAPTION_MISSING:
                without[folded(sample.key)] = sample.key
            if isinstance(item, Problem):
                detail = locations.printable(f"{item.detail}{_likely_image(item, sample, without)}")
                path = locations.printable(f"{name}/{sample.key}")
                yield Reject(source=config.source_name, path=path, reason=item.reason, detail=detail)
            else:
                yield item


def _item(config: SourceConfig, settings: TarSettings, location: str, name: str, sample: _Sample) -> Record | Problem:
    found = [suffix for suffix in sample.members if suffix in settings.images]
    # A camera's raw data beside its JPEG, say, is not the image.
    found = found or [suffix for suffix in sample.members if suffix not in settings.wanted]
    if sample.problem is not None:
        return sample.problem
    if not found:
        return _no_image(settings, sample)
    if len(found) > 1:
        both = " and ".join(sample.members[suffix][0] for suffix in found)
        return Problem(
            reason=RejectReason.NAME_TAKEN,
            detail=f"{both} are two images of one sample: rename one, or say which with `image: [{found[0]}]`",
        )
    texts = _captions(config, settings, sample)
    if isinstance(texts, Problem):
        return texts
    for suffixes, reason in (
        ([settings.mask] if settings.mask else [], RejectReason.MASK_MISSING),
        (() if settings.optional else settings.controls, RejectReason.CONTROL_MISSING),
    ):
        if missing := [suffix for suffix in suffixes if suffix not in sample.members]:
            return Problem(reason=reason, detail=f"no {missing[0]} among its members: {_listed(sample)}")
    return Record(
        identity=f"{name}/{sample.key}",
        image=_blob(location, sample, found[0]),
        captions=texts or (str(captions.fallback(config)),),
        is_fallback=not texts,
        mask=_blob(location, sample, settings.mask) if settings.mask else None,
        **beside(
            config,
            [[_blob(location, sample, suffix)] if suffix in sample.members else [] for suffix in settings.controls],
        ),
    )


def _blob(location: str, sample: _Sample, suffix: str) -> Blob:
    member, data = sample.members[suffix]
    return Blob(location=f"{location}#{member}", data=data)


def _again(sample: _Sample) -> Problem:
    return Problem(
        reason=RejectReason.NAME_TAKEN,
        detail=f"the key came earlier in the tar, before other keys; now with {_listed(sample)}. Members of one sample must "
        "be neighbours: pack the tar with its names sorted",
    )


def _no_image(settings: TarSettings, sample: _Sample) -> Problem:
    """Also img2dataset's rows that it could not download, which hold text alone."""
    read = _json(*sample.members.get("json", ("", b"{}")))
    status = read.get("status") if isinstance(read, dict) else None
    if isinstance(read, dict) and isinstance(status, str) and status != "success":
        why = str(read.get("error_message") or "no reason given")[:200]
        return Problem(reason=RejectReason.FILE_MISSING, detail=f"it was never downloaded: status {status[:50]}, {why}")
    wanted = "image" if settings.image is None else " or ".join(settings.image)
    return Problem(
        reason=RejectReason.FILE_MISSING,
        detail=f"no {wanted} among its members: {_listed(sample)} (a key ends at the first dot of a name)",
    )


def _likely_image(problem: Problem, sample: _Sample, without: dict[str, str]) -> str:
    """Of members without an image: the earlier sample without a caption whose key is the same but for case or Unicode form."""
    key = without.get(folded(sample.key)) if problem.reason is RejectReason.FILE_MISSING else None
    return "" if key is None else f"; the image of {key} has no caption: give both the same name, and pack them as neighbours"


def _listed(sample: _Sample) -> str:
    return ", ".join(sample.names[:5]) + (f" and {len(sample.names) - 5} more" if len(sample.names) > 5 else "")


def _captions(config: SourceConfig, settings: TarSettings, sample: _Sample) -> tuple[str, ...] | Problem:
    """All captions that the settings name, or by default those of the first origin that has one; none: the source's."""
    texts: list[str] = []
    empty: Problem | None = None
    for origin in settings.origins:
        found = _texts(settings, sample, origin)
        if isinstance(found, tuple):
            texts.extend(found)
        elif found is not None and found.reason is not RejectReason.CAPTION_EMPTY:
            return found
        empty = found if isinstance(found, Problem) else empty
        if found is not None and not settings.captions:
            break
    if texts:
        return tuple(texts)
    if empty is None and captions.fallback(config) is not None:
        return ()
    return empty or Problem(
        reason=RejectReason.CAPTION_MISSING,
        detail=f"no caption among its members {_listed(sample)} (looked for {', '.join(settings.origins)}), and the source "
        "has no `caption:` to fall back on",
    )


def _texts(settings: TarSettings, sample: _Sample, origin: str) -> tuple[str, ...] | Problem | None:
    """The captions of one origin; None when it is absent, or null."""
    name, data = _text_member(settings, sample, "json" if origin.startswith(_JSON) else origin)
    if not name:
        return None
    if not origin.startswith(_JSON):
        text = captions.check(data, locations.printable(name))
        return text if isinstance(text, Problem) else (text,)
    read = _json(name, data)
    if isinstance(read, Problem):
        return read
    value = read.get(origin.removeprefix(_JSON))
    return None if value is None or value == [] else captions.gather([value], f"{name}: {origin.removeprefix(_JSON)}")


def _text_member(settings: TarSettings, sample: _Sample, suffix: str) -> tuple[str, bytes]:
    """(name, bytes) of `a.txt` or else of `a.jpg.txt`; the name is empty where there is neither."""
    suffixes = (suffix, *(f"{image}.{suffix}" for image in sorted(settings.images)))
    return next((sample.members[each] for each in suffixes if each in sample.members), ("", b""))


def _json(name: str, data: bytes) -> dict[str, Any] | Problem:
    try:
        read = json.loads(data)
    except (ValueError, RecursionError) as error:
        return Problem(reason=RejectReason.CAPTION_NOT_TEXT, detail=f"{name} is not JSON: {str(error)[:200]}")
    if not isinstance(read, dict):
        return Problem(reason=RejectReason.CAPTION_NOT_TEXT, detail=f"{name} holds {type(read).__name__}, not an object")
    return read


@contextlib.contextmanager
def _readable(location: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SourceError(
            f"data.sources: {locations.printable(locations.redacted(location))}: {error.strerror or error}.{_around(location)} "
            "Name tars that are there, and yours to read."
        ) from None


def _samples(location: str, settings: TarSettings) -> Iterator[_Sample]:
    """One sample at a time is in memory; of its members, those that the settings need."""
    webdataset = light_webdataset.load()
    with _readable(location), locations.open_stream(location) as stream:
        members = functools.partial(_members, location, Tar(location, stream), settings)
        grouped = functools.partial(webdataset.tariterators.group_by_keys, keys=lambda name: name, lcase=False)
        for sample in webdataset.DataPipeline(members, grouped):
            yield _sample(sample["__key__"], [member for member in sample.values() if isinstance(member, _Member)])


def _sample(key: str, members: list[_Member]) -> _Sample:
    return _Sample(
        key=key,
        names=[member.name for member in members],
        members={member.suffix: (member.name, member.data) for member in members if member.data is not None},
        problem=next((member.problem for member in members if member.problem is not None), None),
    )


def _members(location: str, tar: Tar, settings: TarSettings) -> Iterator[dict[str, Any]]:
    """A tar's members as webdataset's grouping takes them: `fname` is what its `keys` function gets, here (key, suffix).

    For webdataset the suffix is the member's number: two equal suffixes would end the whole tar with an error there, and a
    suffix `__bad__` would drop the sample silently. The true suffix is in `_Member`.
    """
    key = None
    names: dict[str, str] = {}
    has_problem = False
    for number in itertools.count():
        header = tar.next()
        if header is None:
            return
        match = _MEMBER_NAME.fullmatch(header.name)
        if match is None:
            # A name without a dot is only the name of an image if it is one: it must not part the members of a sample.
            data = _image_bytes(tar, header, settings, "") if _PLAIN_NAME.fullmatch(header.name) else None
            if data is not None:
                names = names if header.name == key else {}
                has_problem, key = has_problem and header.name == key, header.name
                yield {"fname": (key, str(number)), "data": _Member(header.name, "", data), "__url__": location}
            continue
        suffix = match[2].lower()
        if not header.isreg() and suffix not in settings.wanted:
            continue
        if match[1] != key:
            key, names, has_problem = match[1], {}, False
        member = _Member(header.name, suffix)
        yield {"fname": (key, str(number)), "data": member, "__url__": location}
        # Read only now that webdataset has handed on the sample before, so that two samples are never in memory.
        if suffix in settings.wanted and not has_problem:
            _fill(member, tar, header, settings, names.get(suffix))
            has_problem = member.problem is not None
            names[suffix] = header.name
        elif suffix not in settings.wanted:
            member.data = _image_bytes(tar, header, settings, suffix)


def _image_bytes(tar: Tar, header: tarfile.TarInfo, settings: TarSettings, suffix: str) -> bytes | None:
    """The bytes of a member whose suffix says nothing, if they begin as an image does; None of any other.

    Whoever names the suffix of images wants no others. A suffix with a dot, as in `1.depth.exr`, says what else it is.
    """
    says_nothing = settings.image is None and "." not in suffix and f".{suffix}" not in signatures.OTHER_SUFFIXES
    if not says_nothing or not header.isreg() or header.size > MAX_MEMBER_BYTES:
        return None
    return tar.read_if(header, signatures.HEAD_BYTES, lambda head: signatures.name(head) is not None)


def _fill(member: _Member, tar: Tar, header: tarfile.TarInfo, settings: TarSettings, namesake: str | None) -> None:
    """Read a member, or say why not; `namesake` is an earlier one of the same key and suffix."""
    is_image = member.suffix in (*settings.images, settings.mask, *settings.controls)
    limit = MAX_MEMBER_BYTES if is_image else MAX_TEXT_BYTES
    if not header.isreg():
        member.problem = Problem(reason=RejectReason.NOT_A_FILE, detail=f"{header.name} is {_kind(header)}, not a file")
    elif namesake is not None:
        both = f"{namesake} and {header.name}"
        member.problem = Problem(reason=RejectReason.NAME_TAKEN, detail=f"{both} have the same key and suffix: rename one")
    elif header.size > limit:
        detail = f"{header.name} has {header.size:,} bytes, more than the {limit:,} that are read"
        member.problem = Problem(reason=RejectReason.UNREADABLE, detail=detail)
    else:
        member.data = tar.read(header)


def _kind(member: tarfile.TarInfo) -> str:
    kinds = {
        tarfile.SYMTYPE: f"a symbolic link to {member.linkname}",
        tarfile.LNKTYPE: f"a hard link to {member.linkname}",
        tarfile.CHRTYPE: "a device",
        tarfile.BLKTYPE: "a device",
        tarfile.FIFOTYPE: "a pipe",
        tarfile.DIRTYPE: "a folder",
    }
    return kinds.get(member.type, f"of the unknown type {member.type!r}")


def names_of(tars: list[str]) -> list[str]:
    """What the tars are called: their file names, or where those are not unique their paths below the common folder."""
    paths = [locations.without_secrets(location) for location in tars]
    names = [posixpath.basename(path) for path in paths]
    if len(set(names)) == len(names):
        return names
    parts = [path.split("/") for path in paths]
    common = 0
    while len({tuple(part[: common + 1]) for part in parts}) == 1:
        common += 1
    return ["/".join(part[common:]) for part in parts]


def _around(pattern: str) -> str:
    """What lies in the local folder that a pattern looks into, for an error's message."""
    if locations.is_url(pattern):
        return ""
    directory = locations.local_path(re.split(r"[*{]", pattern)[0].rpartition("/")[0] or ".")
    if not directory.is_dir():
        return f" There is no folder {locations.printable(str(directory))}."
    try:
        names = sorted(entry.name for entry in directory.iterdir())
    except OSError:
        return ""
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return locations.printable(f" {directory} holds {shown or 'nothing'}.")


SOURCE = WebDataset()
