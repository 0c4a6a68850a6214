"""The files that a table's rows name: what a cell says, where the file lies, and what tells that it has changed."""

import json
import os
import posixpath
from collections.abc import Iterator, Sequence

from ftk import locations
from ftk.pipeline.labels import is_null
from ftk.pipeline.sources.base import Blob
from ftk.pipeline.sources.folder import IMAGE_SUFFIXES


def several(cell: object) -> list[object]:
    """The values of a cell that may hold a list, also one that is written as JSON; of a null none, `datasets`' null too."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            return [cell]
    if isinstance(cell, list):
        return cell
    if isinstance(cell, dict) and cell.keys() <= {"bytes", "path"} and cell.get("bytes") is None:
        return [] if is_null(cell.get("path")) else [cell]
    return [] if is_null(cell) else [cell]


def has_image_suffix(name: str) -> bool:
    """Whether a file's name ends as those of images do."""
    return posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES


def is_relative(name: str) -> bool:
    """Whether a name starts from the table's root."""
    return not name.startswith("/") and locations.scheme_of(name) == ""


def local_signature(location: str) -> str:
    """As `locations.signature` of a local file, `missing` when there is none; empty for a remote one."""
    if locations.is_url(location):
        return ""
    try:
        return locations.signature(location)
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError as error:
        return f"unreadable: {error.errno}"


class TableFiles:
    """The files below a table's root. Those of an object store are looked up by listing their folder, others one by one."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._is_listed = locations.is_url(root) and not locations.is_web(root)
        self._folder: str | None = None
        self._listed: dict[str, str] = {}
        self._stems_of: tuple[str | None, dict[str, list[str]]] = (None, {})

    def name(self, value: object) -> str | None:
        """The name of a file in a cell; None when no file can be called so.

        An image's suffix may be missing, and a number is taken for such a name, where one file fits.
        """
        if isinstance(value, int) and not isinstance(value, bool):
            return self._only_fitting(str(value))
        if not isinstance(value, str) or is_null(value) or "\0" in value:
            return None
        try:
            os.fsencode(value)
        except UnicodeEncodeError:
            return None
        if has_image_suffix(value) or not is_relative(value):
            return value
        return (None if self._exists(value) else self._only_fitting(value)) or value

    def fitting(self, name: str) -> list[str]:
        """The images that a name means which has no suffix, in the order of their names."""
        if has_image_suffix(name) or not is_relative(name):
            return []
        folder, slash, stem = name.rpartition("/")
        return [f"{folder}{slash}{file}" for file in sorted(self._stems(folder).get(stem, []))]

    def blob(self, name: str) -> Blob:
        """The file of this name."""
        location = self._location(name)
        return Blob(location=location, fetched_once=locations.is_url(location) and self._is_unlisted(name))

    def signatures(self, names: Sequence[str]) -> list[str]:
        """Of what nothing vouches for, on the web or outside of the table's own store, the location: it is fetched once."""
        below = [name for name in names if is_relative(name)]
        if self._is_listed and below:
            self._list(_common_folder(below))
        return [self._signature(name) for name in names]

    def _location(self, name: str) -> str:
        return locations.join(self._root, name) if is_relative(name) else name

    def _is_unlisted(self, name: str) -> bool:
        """Whether no listing of the table's own store tells when a remote file changes."""
        hidden = any(part.startswith(".") for part in name.split("/"))
        return hidden or not is_relative(name) or not self._is_listed

    def _signature(self, name: str) -> str:
        location = self._location(name)
        if not locations.is_url(location):
            return local_signature(location)
        return f"at {location}" if self._is_unlisted(name) else self._listed.get(name, "missing")

    def _list(self, folder: str) -> None:
        if self._folder is not None and f"{folder}/".startswith(self._folder):
            return
        self._folder = f"{folder}/" if folder else ""
        try:
            files = locations.list_files(locations.join(self._root, folder))
            self._listed = {f"{self._folder}{file.relative}": file.signature for file in files}
        except FileNotFoundError:
            self._listed = {}

    def _only_fitting(self, name: str) -> str | None:
        fitting = self.fitting(name)
        return fitting[0] if len(fitting) == 1 else None

    def _exists(self, name: str) -> bool:
        if not locations.is_url(self._root):
            return local_signature(self._location(name)) != "missing"
        if not self._is_listed:
            return True  # nothing can be asked without fetching it
        self._list(name.rpartition("/")[0])
        return name in self._listed

    def _stems(self, folder: str) -> dict[str, list[str]]:
        """By what comes before their suffixes, the images of one folder; those of the last that was asked for are kept."""
        if self._stems_of[0] != folder:
            stems: dict[str, list[str]] = {}
            for name in self._names(folder):
                if has_image_suffix(name):
                    stems.setdefault(posixpath.splitext(name)[0], []).append(name)
            self._stems_of = folder, stems
        return self._stems_of[1]

    def _names(self, folder: str) -> Iterator[str]:
        if self._is_listed:
            self._list(folder)
            below = f"{folder}/" if folder else ""
            yield from (name.removeprefix(below) for name in self._listed if name.rpartition("/")[0] == folder)
        elif not locations.is_url(self._root):
            try:
                place = locations.local_path(locations.join(self._root, folder) if folder else self._root)
                yield from (entry.name for entry in place.iterdir())
            except (OSError, ValueError):
                return


def _common_folder(names: Sequence[str]) -> str:
    folders = {name.rpartition("/")[0] for name in names}
    return posixpath.commonpath(folders) if "" not in folders else ""
