"""A folder of images, searched recursively, each with its caption beside it, in its name, or the same for all."""

import posixpath
import re
from collections.abc import Iterator
from itertools import groupby, islice
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ftk import locations, storage
from ftk.configs.schema import SourceConfig
from ftk.contracts import Reject, RejectReason
from ftk.errors import ConfigError, SourceError, did_you_mean
from ftk.locations import File
from ftk.pipeline import captions
from ftk.pipeline.sources.base import Blob, Partition, Place, Record

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
    | {".avif", ".heic", ".heif", ".hif", ".jp2", ".tga", ".ppm", ".pgm", ".pnm"}
)
SIDECAR_SUFFIXES = (".txt", ".caption", ".json")
TABLES = frozenset({"metadata.jsonl", "metadata.csv", "metadata.parquet"})

Entry = tuple[str, str | None, str | None, tuple[str, ...]]
"""An image in a partition: its path below the source's folder, its sidecar's or None, and below their own folders its
mask's (None where none is asked for) and its controls'; empty where one is missing."""


class FolderSettings(BaseModel):
    """What is written for a folder, beside the fields of every source."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    captions_from: Literal["sidecar", "name", "fixed"] = Field(
        default="sidecar", description="a .txt, .caption or .json beside the image; its name; or always the source's `caption`"
    )
    caption_lines: bool = Field(default=False, description="each line of a .txt or .caption is a caption of its own")
    masks: Annotated[str | None, Place()] = Field(default=None, min_length=1, description="folder of masks named as the images")
    controls: Annotated[tuple[str, ...], Place()] = Field(
        default=(), description="folders of control images named as the images"
    )

    @model_validator(mode="after")
    def _lines_need_sidecars(self) -> Self:
        if self.caption_lines and self.captions_from != "sidecar":
            raise ValueError(f"`caption_lines` has no effect with `captions_from: {self.captions_from}`: leave one of them out")
        return self


class Folder:
    """Images by their exact relative paths: names that differ in case or Unicode form alone are different images.

    Hidden files and folders are left out. A folder's images come before those of the folders in it; each go by the bytes
    of their names.
    """

    Settings: type[BaseModel] = FolderSettings

    def accepts(self, path: str) -> bool:
        """Whatever no other kind of source wants is a folder."""
        return not _suffix(path)

    def partitions(self, config: SourceConfig, settings: FolderSettings, shard_samples: int) -> Iterator[Partition]:
        """Runs of `shard_samples` images; holds one folder's names at a time, and those of all masks and controls."""
        _check_captions(config, settings)
        companions = [_Companions(config.path, folder) for folder in _companion_folders(settings)]
        images = _images(config, settings, companions)
        found = 0
        while batch := list(islice(images, shard_samples)):
            found += len(batch)
            yield Partition(payload=tuple(entry for entry, _ in batch), signature=storage.digest(batch), num_records=len(batch))
        if not found:
            raise SourceError(
                f"data.sources: {_shown(config)} holds no images (looked for {', '.join(sorted(IMAGE_SUFFIXES))}, also in "
                f"subfolders). Found: {_contents(config.path)}.{_hint(config.path)}"
            )

    def read(self, config: SourceConfig, settings: FolderSettings, partition: Partition) -> Iterator[Record | Reject]:
        """Each image with its captions."""
        fallback = captions.fallback(config)
        for entry in partition.payload:
            yield _record(config, settings, entry, fallback)


def _check_captions(config: SourceConfig, settings: FolderSettings) -> None:
    if captions.fallback(config) is None and settings.captions_from == "fixed":
        raise ConfigError(
            f"data.sources: source {config.source_name} has `captions_from: fixed` and no `caption:`. Write the caption there."
        )


def _companion_folders(settings: FolderSettings) -> list[str]:
    return [*([settings.masks] if settings.masks else []), *settings.controls]


def _images(
    config: SourceConfig, settings: FolderSettings, companions: "list[_Companions]"
) -> Iterator[tuple[Entry, list[str | None]]]:
    """Each image of the folder, and the signatures of all its files."""
    places = [_place(folder) for folder in _companion_folders(settings)]
    for directory, group in groupby(_listed(config), key=lambda file: file.relative.rpartition("/")[0]):
        if any(_lies_in(_place(locations.join(config.path, directory)), place) for place in places):
            continue
        files = list(group)
        sidecars = _sidecars(files) if settings.captions_from == "sidecar" else {}
        _refuse_table(config, settings, files)
        for file in files:
            if _suffix(file.relative) not in IMAGE_SUFFIXES:
                continue
            sidecar = sidecars.get(_stem(file.relative))
            beside = [companion.find(file.relative) for companion in companions]
            names = ["" if found is None else found.relative for found in beside]
            mask = names.pop(0) if settings.masks else None
            entry = (file.relative, sidecar.relative if sidecar else None, mask, tuple(names))
            yield entry, [each.signature if each else None for each in (file, sidecar, *beside)]


def _listed(config: SourceConfig) -> Iterator[File]:
    try:
        yield from locations.list_files(config.path)
    except FileNotFoundError:
        raise SourceError(
            f"data.sources: {_shown(config)} does not exist.{_nearest_folder(config.path)} "
            f"Name the folder that holds your images{_or_hub(config.path)}."
        ) from None
    except NotADirectoryError:
        raise SourceError(
            f"data.sources: {_shown(config)} is a file, not a folder. Name the folder that holds your images."
        ) from None
    except PermissionError as error:
        where = locations.printable(str(error.filename))
        raise SourceError(f"data.sources: {where} may not be read: {error.strerror}. Allow it, or move it elsewhere.") from None


def _sidecars(files: list[File]) -> dict[str, File]:
    """By stem, the first in the order of `SIDECAR_SUFFIXES`; a suffix in small letters goes before others."""
    ranked = [
        (SIDECAR_SUFFIXES.index(_suffix(file.relative)), not file.relative.endswith(SIDECAR_SUFFIXES), file)
        for file in files
        if _suffix(file.relative) in SIDECAR_SUFFIXES
    ]
    return {_stem(file.relative): file for *_, file in sorted(ranked, key=lambda item: item[:2], reverse=True)}


def _refuse_table(config: SourceConfig, settings: FolderSettings, files: list[File]) -> None:
    """A table of captions beside the images is never ignored silently, whether there is a `caption:` to fall back on or not."""
    table = next((file.relative for file in files if posixpath.basename(file.relative) in TABLES), None)
    if table and config.format == "auto" and settings.captions_from == "sidecar":
        folder = posixpath.dirname(table)
        others = f" To read those of all subfolders, write `*` in place of {folder}." if folder and "/" not in folder else ""
        raise SourceError(
            f"data.sources: {_shown(config)} holds {table}, which is not read when the folder is named. Write "
            f"`path: {locations.join(config.path, table)}` to use it, or `format: folder` to ignore it.{others}"
        )


def _record(config: SourceConfig, settings: FolderSettings, entry: Entry, fallback: str | None) -> Record | Reject:
    relative, sidecar, mask, controls = entry

    def reject(reason: RejectReason, detail: str) -> Reject:
        return Reject(source=config.source_name, path=locations.printable(relative), reason=reason, detail=detail)

    found = _captions(config, settings, relative, sidecar, fallback)
    if isinstance(found, captions.Problem):
        return reject(found.reason, found.detail)
    if mask == "":
        return reject(RejectReason.MASK_MISSING, "the folder under `masks` has no image of this name")
    if "" in controls:
        # By its number: where the folder lies is no part of a dataset, and two can have the same name.
        number, num_controls = controls.index(""), len(controls) - len(config.references)
        which = f"controls.{number}" if number < num_controls else f"references.{number - num_controls}"
        return reject(RejectReason.CONTROL_MISSING, f"the folder under `{which}` has no image of this name")
    return Record(
        identity=relative,
        image=Blob(location=locations.join(config.path, relative)),
        captions=found,
        mask=Blob(location=locations.join(str(settings.masks), mask)) if mask else None,
        controls=tuple(
            Blob(location=locations.join(folder, name)) for folder, name in zip(settings.controls, controls, strict=True)
        ),
    )


def _captions(
    config: SourceConfig, settings: FolderSettings, relative: str, sidecar: str | None, fallback: str | None
) -> tuple[str, ...] | captions.Problem:
    if settings.captions_from == "name":
        words = _stem(relative).rpartition("/")[2].replace("_", " ").replace("-", " ").split()
        return captions.gather([" ".join(words)], "the file's name")
    if settings.captions_from == "sidecar" and sidecar:
        return captions.read(locations.join(config.path, sidecar), settings.caption_lines, fallback)
    if fallback is not None:
        return (fallback,)
    name = locations.printable(_stem(relative).rpartition("/")[2])
    return captions.Problem(
        reason=RejectReason.CAPTION_MISSING,
        detail=f"no {name}.txt, .caption or .json beside the image, and the source has no `caption:` to fall back on",
    )


class _Companions:
    """A folder of masks or control images, found by the relative path of their image without its suffix.

    Where one of the two lies at the top of its folder the name alone will do, if only one of them has it.
    """

    def __init__(self, root: str, folder: str) -> None:
        if _place(root) == _place(folder):
            raise ConfigError(f"data.sources: {root} cannot be its own folder of masks or controls. Move them to another.")
        self._folder = folder
        self._files: dict[str, File] = {}
        self._stems: dict[str, list[str]] = {}
        self._users: dict[str, str] = {}
        for file in self._images():
            stem = _stem(file.relative)
            if stem in self._files:
                both = " and ".join(locations.printable(name) for name in (self._files[stem].relative, file.relative))
                raise SourceError(
                    f"data.sources: {locations.printable(folder)} holds both {both}: which belongs to an image? Remove one."
                )
            self._files[stem] = file
            self._stems.setdefault(stem.rpartition("/")[2], []).append(stem)

    def find(self, image: str) -> File | None:
        """The one that belongs to an image; `SourceError` when two images would share it."""
        stem = _stem(image)
        if stem in self._files:
            self._users[stem] = stem
            return self._files[stem]
        match, *others = self._stems.get(stem.rpartition("/")[2], [""])
        if not match or others or ("/" in stem and "/" in match):
            return None
        user = self._users.setdefault(match, stem)
        if user == match:
            return None
        if user != stem:
            mask, one, two = (locations.printable(name) for name in (self._files[match].relative, user, stem))
            raise SourceError(
                f"data.sources: {mask} in {locations.printable(self._folder)} fits both {one} and {two}. "
                f"Lay it in a subfolder named as the image's."
            )
        return self._files[match]

    def _images(self) -> Iterator[File]:
        try:
            yield from (file for file in locations.list_files(self._folder) if _suffix(file.relative) in IMAGE_SUFFIXES)
        except OSError as error:
            raise SourceError(
                f"data.sources: {locations.printable(self._folder)}, named under `masks` or `controls`, cannot be listed: "
                f"{error.strerror}.{_nearest_folder(self._folder)} Name a folder of images."
            ) from None


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _stem(relative: str) -> str:
    return posixpath.splitext(relative)[0]


def _place(location: str) -> str:
    """A folder's name by which it can be compared with others."""
    return location.rstrip("/") if locations.is_url(location) else str(locations.local_path(location).resolve())


def _lies_in(place: str, folder: str) -> bool:
    return f"{place}/".startswith(f"{folder}/")


def _shown(config: SourceConfig) -> str:
    return locations.redacted(locations.printable(config.path))


def _contents(root: str) -> str:
    if locations.is_url(root):
        names = [file.relative for file in islice(locations.list_files(root), 6)]
    else:
        names = sorted(locations.printable(entry.name) for entry in locations.local_path(root).iterdir())
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"


def _hint(root: str) -> str:
    """How to name what the folder holds instead of images."""
    suffixes = {_suffix(file.relative) for file in islice(locations.list_files(root), 1000)}
    # Tars first: img2dataset writes a Parquet file of URLs beside each.
    kind = next((kind for kind in (".tar", ".parquet", ".jsonl", ".csv") if kind in suffixes), None)
    return f" To read its tars or tables, name them: `path: {locations.join(root, f'*{kind}')}`." if kind else ""


def _or_hub(path: str) -> str:
    return ", or add `format: hub` if this is a dataset of the Hub" if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) else ""


def _nearest_folder(root: str) -> str:
    if locations.is_url(root):
        return ""
    path = locations.local_path(root)
    siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    return locations.printable(did_you_mean(path.name, siblings, str(path.parent)))


SOURCE = Folder()
