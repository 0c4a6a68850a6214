"""A folder of images, searched recursively, each with its caption beside it, in its name, or the same for all."""

import posixpath
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import groupby, islice
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

from ftk import locations, storage
from ftk.configs.schema import SourceConfig
from ftk.contracts import Reject, RejectReason
from ftk.errors import ConfigError, SourceError, did_you_mean
from ftk.locations import File
from ftk.pipeline import captions, kohya, sidecars, signatures
from ftk.pipeline.names import folded
from ftk.pipeline.sources.base import Blob, MayLack, Notes, Partition, Place, Record, beside

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
    | {".avif", ".heic", ".heif", ".hif", ".jp2", ".jxl", ".tga", ".ppm", ".pgm", ".pnm"}
)
_MOST_REMOTE_LOOKS = 200
"""Files of unknown suffixes whose first bytes are asked of object storage at each listing: every one is a request."""
TABLES = frozenset({"metadata.jsonl", "metadata.csv", "metadata.parquet"})
DRAWN_RECORD = "generated.json"
"""What class images were drawn with: it lies beside them, and is no caption."""
_MOST_NAMED = 3
_NUMBERED = re.compile(r"(.*[^/])_([0-9]{1,9})", re.DOTALL)
"""One of several control images of an image: its name, and the number."""
_KNOWN_NAMES = frozenset({*TABLES, DRAWN_RECORD})

Entry = tuple[str, str | None, str | None, tuple[str | tuple[str, ...], ...]]
"""An image in a partition: its path below the source's folder, its sidecar's or None, and below their own folders its
mask's (None where none is asked for) and its controls'; empty where one is missing, and several where they are numbered."""


def _suffixes(value: Any) -> Any:
    """One suffix will do; `tags` means `.tags`."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(one, str) for one in values):
        return value
    return tuple(f".{one}".lower() if one[:1].isalnum() else one.lower() for one in values)


def _end_caption_files(suffixes: tuple[str, ...]) -> tuple[str, ...]:
    for suffix in suffixes:
        if not suffix.strip(".") or "/" in suffix or suffix.isspace():
            raise ValueError(f"{suffix!r} is not how a file's name ends: write for example `.tags`")
        if suffix in IMAGE_SUFFIXES:
            raise ValueError(f"{suffix} is the suffix of images, and none of captions")
    if len(set(suffixes)) < len(suffixes):
        raise ValueError("a suffix is named twice")
    return suffixes


CaptionSuffixes = Annotated[tuple[str, ...], BeforeValidator(_suffixes), AfterValidator(_end_caption_files)]


class FolderSettings(MayLack):
    """What is written for a folder, beside the fields of every source."""

    layout: Literal["any", "kohya"] = Field(
        default="any", description="kohya: only folders such as `10_sks dog` are read, each with its repeats and class tokens"
    )
    captions_from: Literal["sidecar", "name", "fixed"] = Field(
        default="sidecar", description="a caption file beside the image; its name; or always the source's `caption`"
    )
    caption_suffix: CaptionSuffixes = Field(
        default=sidecars.SUFFIXES, min_length=1, description="how caption files end, the first that is there"
    )
    caption_lines: bool = Field(default=False, description="each line of a .txt or .caption is a caption of its own")
    masks: Annotated[str | None, Place()] = Field(default=None, min_length=1, description="folder of masks named as the images")
    controls: Annotated[tuple[str, ...], Place()] = Field(
        default=(), description="folders of control images named as the images"
    )

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        for name in ("caption_lines", "caption_suffix", "layout") if self.captions_from != "sidecar" else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"`{name}` has no effect with `captions_from: {self.captions_from}`: leave one of them out")
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
        listing = _Listing(config, settings)
        images = _images(config, settings, companions, listing)
        last: Partition | None = None
        while batch := list(islice(images, shard_samples)):
            if last is not None:
                yield last
            last = Partition(
                payload=tuple(entry for entry, _ in batch), signature=storage.digest(batch), num_records=len(batch)
            )
        if last is None:
            raise SourceError(_no_images(config, settings))
        yield replace(last, notes=listing.notes())

    def read(self, config: SourceConfig, settings: FolderSettings, partition: Partition) -> Iterator[Record | Reject]:
        """Each image with its captions."""
        fallback = captions.fallback(config)
        for entry in partition.payload:
            yield _record(config, settings, entry, fallback)


def _no_images(config: SourceConfig, settings: FolderSettings) -> str:
    if settings.layout == "kohya":
        above = kohya.parse(posixpath.basename(config.path.rstrip("/")))
        advice = " Name the folder above." if above else " Leave out `layout: kohya` to read any folder."
        contents = _contents(config.path)
        return f"data.sources: {_shown(config)} holds no folder of images such as `10_dog`. Found: {contents}.{advice}"
    return (
        f"data.sources: {_shown(config)} holds no images (looked for {', '.join(sorted(IMAGE_SUFFIXES))}, also in "
        f"subfolders). Found: {_contents(config.path)}.{_hint(config.path)}"
    )


def _check_captions(config: SourceConfig, settings: FolderSettings) -> None:
    if captions.fallback(config) is None and settings.captions_from == "fixed":
        raise ConfigError(
            f"data.sources: source {config.source_name} has `captions_from: fixed` and no `caption:`. Write the caption there."
        )


def _companion_folders(settings: FolderSettings) -> list[str]:
    return [*([settings.masks] if settings.masks else []), *settings.controls]


class _Counted:
    """Files that are counted, and the first of them."""

    def __init__(self) -> None:
        self.number = 0
        self._first: list[str] = []

    def add(self, file: File) -> None:
        self.number += 1
        if len(self._first) < _MOST_NAMED:
            self._first.append(locations.printable(file.relative))

    def hint(self, what: str) -> Iterator[str]:
        """A sentence, if there are any."""
        if self.number:
            yield f"{self.number:,} {what}: {', '.join(self._first)}"


class _Listing:
    """What is seen beside the images while a folder is listed."""

    def __init__(self, config: SourceConfig, settings: FolderSettings) -> None:
        self._config = config
        self._is_kohya = settings.layout == "kohya"
        self._unmatched = sidecars.Unmatched(config.source_name)
        self._folders: Counter[str] = Counter()
        self._passed_over = _Counted()
        self._beside_images = _Counted()
        self._unknown = _Counted()
        self._num_looks = 0

    def images(self, files: list[File], settings: FolderSettings) -> list[File]:
        """Those of one folder's files that become a sample or a reject.

        They are the files with the suffix of an image, and of all others those that have a caption or begin as an image
        does. What has the name of an image beside it belongs to that: a camera's raw data, layers, a film.
        """
        images = [file for file in files if _suffix(file.relative) in IMAGE_SUFFIXES]
        candidates = [file for file in files if _may_be_image(file, settings)]
        if not candidates:
            return images
        stems = {folded(_stem(file.relative)) for file in images}
        names = {folded(file.relative) for file in files}
        chosen = set(images)
        for file in candidates:
            if folded(_stem(file.relative)) in stems:
                self._beside_images.add(file)
            elif _has_caption(file, names, settings) or self._begins_as_image(file):
                chosen.add(file)
        return [file for file in files if file in chosen]

    def _begins_as_image(self, file: File) -> bool:
        if locations.is_url(file.location):
            self._num_looks += 1
            if self._num_looks > _MOST_REMOTE_LOOKS:
                self._unknown.add(file)
                return False
        try:
            return signatures.name(locations.read_bytes(file.location, signatures.HEAD_BYTES)) is not None
        except OSError:
            return False

    def captions(self, directory: str, settings: FolderSettings, images: list[File], others: list[File]) -> dict[str, File]:
        """By image, the caption files of one folder; `directory` ends in `/`, or is empty at the top."""
        self._folders[directory.partition("/")[0]] += len(images)
        if settings.captions_from != "sidecar":
            return {}
        files = sidecars.FolderFiles(
            images=[posixpath.basename(file.relative) for file in images],
            others={posixpath.basename(file.relative): file for file in others},
        )
        matches = sidecars.match(files, settings.caption_suffix)
        self._unmatched.add(directory, files, matches)
        return {directory + image: file for image, file in matches.captions.items()}

    def pass_over(self, images: list[File]) -> None:
        for file in images:
            self._passed_over.add(file)

    def notes(self) -> Notes:
        return Notes(
            num_unmatched_captions=self._unmatched.number,
            unmatched_captions=self._unmatched.examples(),
            hints=tuple(f"source {self._config.source_name}: {hint}" for hint in self._hints()),
        )

    def _hints(self) -> Iterator[str]:
        yield from self._beside_images.hint("files have the name of an image beside them and are not read")
        yield from self._unknown.hint(
            f"files have no known suffix and no caption, and were not looked at: {_MOST_REMOTE_LOOKS} others were"
        )
        yield from self._passed_over.hint(
            "images do not lie in a folder such as `10_dog` and are not read, as sd-scripts would pass them over"
        )
        named = [name for name, number in self._folders.items() if number and kohya.looks_meant(name)]
        if named and not self._is_kohya:
            yield (
                f"{locations.printable(named[0])} is called as sd-scripts calls its folders, REPEATS_NAME, and is read as any "
                "other. Set `layout: kohya` to take repeats and captions from such names"
            )
        kohya_folder = kohya.looks_meant(posixpath.basename(self._config.path.rstrip("/")))
        if kohya_folder and not self._is_kohya and "repeats" not in self._config.model_fields_set:
            yield (
                f"the folder's name asks for {kohya_folder.repeats} repeats in sd-scripts. "
                f"Set `repeats: {kohya_folder.repeats}`, or name the "
                "folder above with `layout: kohya`"
            )


def _images(
    config: SourceConfig, settings: FolderSettings, companions: "list[_Companions]", listing: _Listing
) -> Iterator[tuple[Entry, list[str | None]]]:
    """Each image of the folder, and the signatures of all its files."""
    places = [_place(folder) for folder in _companion_folders(settings)]
    for directory, group in groupby(_listed(config), key=lambda file: file.relative.rpartition("/")[0]):
        if any(_lies_in(_place(locations.join(config.path, directory)), place) for place in places):
            continue
        files = list(group)
        if settings.layout == "kohya" and ("/" in directory or not kohya.parse(directory)):
            listing.pass_over([file for file in files if _suffix(file.relative) in IMAGE_SUFFIXES])
            continue
        _refuse_table(config, settings, files)
        images = listing.images(files, settings)
        taken = set(images)
        candidates = [file for file in files if file not in taken and posixpath.basename(file.relative) not in _KNOWN_NAMES]
        captions_of = listing.captions(f"{directory}/" if directory else "", settings, images, candidates)
        # Images of one stem count once: they share their masks.
        alike = Counter(folded(stem) for stem in {_stem(file.relative) for file in images})
        image_names = {posixpath.basename(_stem(file.relative)) for file in images}
        for file in images:
            sidecar = captions_of.get(file.relative)
            is_alone = alike[folded(_stem(file.relative))] == 1
            matches = [companion.find(file.relative, is_alone) for companion in companions]
            numbered = [
                () if match or (settings.masks and not number) else companions[number].find_numbered(file.relative, image_names)
                for number, match in enumerate(matches)
            ]
            names: list[Any] = [
                match.relative if match else tuple(each.relative for each in others) or ""
                for match, others in zip(matches, numbered, strict=True)
            ]
            mask = names.pop(0) if settings.masks else None
            entry = (file.relative, sidecar.relative if sidecar else None, mask, tuple(names))
            files_of_image = (file, sidecar, *matches, *(each for others in numbered for each in others))
            yield entry, [each.signature if each else None for each in files_of_image]


def _may_be_image(file: File, settings: FolderSettings) -> bool:
    """Whether a file without the suffix of an image is worth a look."""
    other_suffixes = (IMAGE_SUFFIXES, signatures.OTHER_SUFFIXES, settings.caption_suffix)
    is_other = any(_suffix(file.relative) in suffixes for suffixes in other_suffixes)
    return not is_other and posixpath.basename(file.relative) not in _KNOWN_NAMES


def _has_caption(file: File, names: Collection[str], settings: FolderSettings) -> bool:
    """Whether there is a caption file of this file's name among its folder's files, whose names are folded."""
    if settings.captions_from != "sidecar":
        return False
    bases = {folded(_stem(file.relative)), folded(file.relative)}
    return any(f"{base}{suffix}" in names for base in bases for suffix in settings.caption_suffix)


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

    folder = kohya.parse(relative.partition("/")[0]) if settings.layout == "kohya" else None
    if folder and folder.class_tokens.strip():
        fallback = folder.class_tokens
    texts = _captions(config, settings, relative, sidecar, fallback)
    if isinstance(texts, captions.Problem):
        return reject(texts.reason, texts.detail)
    if mask == "":
        return reject(RejectReason.MASK_MISSING, "the folder under `masks` has no image of this name")
    if "" in controls and not settings.optional:
        # By its number: where the folder lies is no part of a dataset, and two can have the same name.
        which = config.place_of_control(controls.index(""))
        return reject(RejectReason.CONTROL_MISSING, f"the folder under `{which}` has no image of this name")
    return Record(
        identity=relative,
        image=Blob(location=locations.join(config.path, relative)),
        captions=texts or (str(fallback),),
        is_fallback=not texts,
        repeats=folder.repeats if folder else 1,
        mask=Blob(location=locations.join(str(settings.masks), mask)) if mask else None,
        **beside(config, [_blobs(folder, names) for folder, names in zip(settings.controls, controls, strict=True)]),
    )


def _blobs(folder: str, names: str | tuple[str, ...]) -> list[Blob]:
    return [Blob(location=locations.join(folder, name)) for name in ((names,) if isinstance(names, str) else names) if name]


def _captions(
    config: SourceConfig, settings: FolderSettings, relative: str, sidecar: str | None, fallback: str | None
) -> tuple[str, ...] | captions.Problem:
    """The image's own captions; empty where it takes the fallback."""
    if settings.captions_from == "name":
        words = _stem(relative).rpartition("/")[2].replace("_", " ").replace("-", " ").split()
        return captions.gather([" ".join(words)], "the file's name")
    if settings.captions_from == "fixed":
        return (str(fallback),)
    if sidecar:
        return captions.read(locations.join(config.path, sidecar), settings.caption_lines, has_fallback=fallback is not None)
    if fallback is not None:
        return ()
    name = locations.printable(_stem(relative).rpartition("/")[2])
    *suffixes, last = settings.caption_suffix
    wanted = f"{', '.join(suffixes)} or {last}" if suffixes else last
    return captions.Problem(
        reason=RejectReason.CAPTION_MISSING,
        detail=f"no {name}{wanted} beside the image, and the source has no `caption:` to fall back on",
    )


class _Companions:
    """A folder of masks or control images, found by the relative path of their image without its suffix, or with it.

    Where one of the two lies at the top of its folder the name alone will do, if only one of them has it. Case and Unicode
    form may differ where one file alone fits.
    """

    def __init__(self, root: str, folder: str) -> None:
        if _place(root) == _place(folder):
            raise ConfigError(f"data.sources: {root} cannot be its own folder of masks or controls. Move them to another.")
        self._folder = folder
        self._files: dict[str, File] = {}
        self._names: dict[str, list[str]] = {}
        self._folded_paths: dict[str, list[str]] = {}
        self._folded_names: dict[str, list[str]] = {}
        self._users: dict[str, tuple[str, bool]] = {}
        self._numbered: dict[str, list[tuple[int, str]]] = {}
        for file in self._images():
            stem = _stem(file.relative)
            if number := _NUMBERED.fullmatch(stem):
                self._numbered.setdefault(number[1], []).append((int(number[2]), stem))
            if stem in self._files:
                both = " and ".join(locations.printable(name) for name in (self._files[stem].relative, file.relative))
                raise SourceError(
                    f"data.sources: {locations.printable(folder)} holds both {both}: which belongs to an image? Remove one."
                )
            self._files[stem] = file
            name = posixpath.basename(stem)
            self._names.setdefault(name, []).append(stem)
            self._folded_paths.setdefault(folded(stem), []).append(stem)
            self._folded_names.setdefault(folded(name), []).append(stem)

    def find(self, image: str, is_alone: bool) -> File | None:
        """The one that belongs to an image; `SourceError` when two images would share it.

        Args:
            is_alone: no other image of its folder has the same name but for case and Unicode form.
        """
        stem = _stem(image)
        exact = next((base for base in (stem, image) if base in self._files), None)
        match = exact or self._alike(stem, image, is_alone)
        return None if match is None else self._taken(match, stem, exact is not None)

    def find_numbered(self, image: str, names: Collection[str]) -> list[File]:
        """Those of an image that has none of its own name: NAME_0, NAME_1 and so on, in this order.

        Args:
            names: of all images of its folder: what has the name of another image belongs to that.
        """
        stem = _stem(image)
        named = self._numbered.get(stem) or self._numbered.get(posixpath.basename(stem), [])
        matches = [self._taken(each, stem, False) for _, each in sorted(named) if posixpath.basename(each) not in names]
        return [match for match in matches if match is not None]

    def _taken(self, match: str, stem: str, is_exact: bool) -> File | None:
        """The file, now that of the image; None if it has the exact name of another."""
        user, is_its_own = self._users.setdefault(match, (stem, is_exact))
        if user != stem and is_its_own and not is_exact:
            return None
        if user != stem:
            mask, one, two = (locations.printable(name) for name in (self._files[match].relative, user, stem))
            raise SourceError(
                f"data.sources: {mask} in {locations.printable(self._folder)} fits both {one} and {two}. "
                f"Lay it in a subfolder named as the image's."
            )
        return self._files[match]

    def _alike(self, stem: str, image: str, is_alone: bool) -> str | None:
        """By path without regard to case and Unicode form, then by name; never one of several."""
        stem_name, image_name = posixpath.basename(stem), posixpath.basename(image)
        paths = [(self._folded_paths, folded(stem)), (self._folded_paths, folded(image))] if is_alone else []
        names = [(self._folded_names, folded(stem_name)), (self._folded_names, folded(image_name))] if is_alone else []
        for index, name in paths:
            if matches := index.get(name):
                return matches[0] if len(matches) == 1 else None
        for index, name in [(self._names, stem_name), (self._names, image_name), *names]:
            if matches := index.get(name):
                return matches[0] if len(matches) == 1 and not ("/" in stem and "/" in matches[0]) else None
        return None

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
    kind = next((kind for kind in (".tar", ".zip", ".parquet", ".jsonl", ".csv") if kind in suffixes), None)
    if kind is None and ".arrow" in suffixes:
        return " To read a dataset that `save_to_disk` of `datasets` wrote, add `format: hub`."
    return f" To read its archives or tables, name them: `path: {locations.join(root, f'*{kind}')}`." if kind else ""


def _or_hub(path: str) -> str:
    return ", or add `format: hub` if this is a dataset of the Hub" if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) else ""


def _nearest_folder(root: str) -> str:
    if locations.is_url(root):
        return ""
    path = locations.local_path(root)
    siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    return locations.printable(did_you_mean(path.name, siblings, str(path.parent)))


SOURCE = Folder()
