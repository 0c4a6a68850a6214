"""A folder of images, searched recursively, each with its caption in a `.txt` file of the same stem beside it."""

import difflib
import os
from collections.abc import Iterator
from pathlib import Path

from ftk import storage
from ftk.configs.schema import SourceConfig
from ftk.contracts import Reject
from ftk.errors import SourceError
from ftk.pipeline import captions
from ftk.pipeline.sources.base import Record

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".jfif"})


class Folder:
    """Images in the order of their relative paths' bytes; hidden files and folders are left out."""

    def records(self, config: SourceConfig) -> Iterator[Record | Reject]:
        """Raise `SourceError` when the folder is missing or holds no image."""
        root = storage.local_path(config.path)
        if not root.is_dir():
            what = "is a file, not a folder" if root.exists() else "does not exist"
            raise SourceError(f"data.sources: {root} {what}.{_nearest_folder(root)} Name the folder that holds your images.")
        found = 0
        for path in _images(root):
            found += 1
            yield _record(config, root, path)
        if not found:
            raise SourceError(
                f"data.sources: {root} holds no images (looked for {', '.join(sorted(IMAGE_SUFFIXES))}, also in "
                f"subfolders). Found: {_contents(root)}."
            )


def _record(config: SourceConfig, root: Path, path: Path) -> Record | Reject:
    identity = path.relative_to(root).as_posix()
    caption = captions.read(path.with_suffix(".txt"), fallback=config.caption)
    if isinstance(caption, captions.Problem):
        return Reject(
            source=config.source_name,
            path=_printable(identity),
            reason=caption.reason,
            detail=_printable(caption.detail),
        )
    return Record(
        source=config.source_name,
        identity=identity,
        location=path,
        captions=(captions.with_trigger(caption, config.trigger),),
        repeats=config.repeats,
        role=config.role,
    )


def _images(root: Path) -> Iterator[Path]:
    files: list[Path] = []
    for directory, folders, names in os.walk(root, followlinks=True):
        here = Path(directory).resolve()
        # A link to a folder that it lies in would be followed round and round.
        folders[:] = [
            name for name in folders if not name.startswith(".") and not here.is_relative_to(Path(directory, name).resolve())
        ]
        files.extend(
            Path(directory, name) for name in names if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
        )
    yield from sorted(files, key=lambda path: os.fsencode(path.relative_to(root).as_posix()))


def _printable(text: str) -> str:
    """File names may hold bytes that are no UTF-8; tables may not."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def _contents(root: Path) -> str:
    names = sorted(entry.name for entry in root.iterdir())
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"


def _nearest_folder(root: Path) -> str:
    siblings = [entry.name for entry in root.parent.iterdir() if entry.is_dir()] if root.parent.is_dir() else []
    close = difflib.get_close_matches(root.name, siblings, n=1, cutoff=0.5)
    return f" Did you mean {root.parent / close[0]}?" if close else ""


SOURCE = Folder()
