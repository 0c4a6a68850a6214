"""Class images of DreamBooth: how many a source has, which are still to be drawn, and with what those there were drawn.

Drawn images lie in `generated/` below the source's folder, each named by its index, with its caption beside it and one
record for all. What lies elsewhere in the folder is the user's own, and counts. `ftk.deliver.draw_class_images` draws.
"""

import itertools
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ftk import locations, storage
from ftk.configs.schema import DataConfig, GenerateConfig, ModelConfig, SourceConfig
from ftk.errors import ConfigError, SourceError
from ftk.pipeline import captions
from ftk.pipeline.sources.folder import DRAWN_RECORD, IMAGE_SUFFIXES
from ftk.run import Run

FOLDER = "generated"
RECORD = DRAWN_RECORD
RECORD_SCHEMA = 1
COMMAND = "`ftk prepare RUN.yaml --make-class-images`"
_NOT_THE_IMAGES = {"count", "batch_size", "device"}
_PLACE = ("model.path", "model.revision", "model.variant", "model.config")

Parts = Mapping[str, Mapping[str, Any]]
"""What images were drawn with: settings by name, under `generate`, `model` and `weights`."""


@dataclass(frozen=True, kw_only=True)
class ClassImages:
    """The class images of one source, as they were found.

    Attributes:
        size: (width, height) in px of what is drawn.
        caption: what is written beside each drawn image.
        num_found: images anywhere in the source's folder.
        taken: names, without their suffixes, of the images in `generated/`.
    """

    source: SourceConfig
    generate: GenerateConfig
    size: tuple[int, int]
    caption: str
    num_found: int
    taken: frozenset[str]

    @property
    def directory(self) -> Path:
        """Where drawn images lie."""
        return locations.local_path(self.source.path) / FOLDER

    @property
    def num_missing(self) -> int:
        """How many are to be drawn."""
        return max(0, self.generate.count - self.num_found)

    @property
    def missing(self) -> list[int]:
        """The indices that are to be drawn: the lowest that no image has."""
        free = (index for index in itertools.count() if stem(index) not in self.taken)
        return list(itertools.islice(free, self.num_missing))

    @property
    def settings(self) -> dict[str, Any]:
        """What shapes the images, of the source's settings."""
        width, height = self.size
        return self.generate.model_dump(mode="json", exclude=_NOT_THE_IMAGES) | {"width": width, "height": height}

    @cached_property
    def record(self) -> dict[str, Any] | None:
        """What the images in `generated/` were drawn with; None when there are none, or nothing is known of them.

        Raises:
            SourceError: the record is damaged, or of another version.
        """
        path = self.directory / RECORD
        if not self.taken:
            return None
        try:
            record = storage.read_json(path)
            version = record.get("schema_version")
            if version == RECORD_SCHEMA and all(isinstance(record[part], dict) for part in ("generate", "model", "weights")):
                return dict(record)
        except FileNotFoundError:
            return None
        except (ValueError, AttributeError, KeyError) as error:
            raise SourceError(f"{path} is damaged: {error}. Delete {path.parent}: its images are then drawn anew.") from None
        raise SourceError(
            f"{path} has schema version {version}; this ftk reads version {RECORD_SCHEMA}. Delete {path.parent}: its images "
            f"are then drawn anew."
        )

    def refuse_changes(self, expected: Parts) -> None:
        """Raise `SourceError`, with a table of what differs, when images are there that were drawn with something else."""
        if self.record is None:
            return
        rows = {
            f"{part}.{name}": (value, self.record[part].get(name))
            for part, values in expected.items()
            for name, value in values.items()
            if value != self.record[part].get(name)
        }
        if not rows:
            return
        table = "\n".join(f"  {name}: expected {wanted!r}, found {found!r}" for name, (wanted, found) in rows.items())
        moved = f" If it is the same model in another place, {COMMAND} sees that by its weights and notes the place."
        raise SourceError(
            f"data.sources: the images in {self.directory} were drawn with something else than this run names:\n{table}\n"
            f"Put that back, or delete {self.directory}: {COMMAND} then draws them anew."
            f"{moved if set(rows) <= set(_PLACE) else ''}"
        )


def wanted(run: Run) -> tuple[ClassImages, ...]:
    """The class images that the run file asks to be drawn where they are missing, one for each such source.

    Raises:
        ConfigError: a prompt that is no caption, or a size that the family does not have.
        SourceError: a folder that cannot be listed.
    """
    return tuple(_look(run, source, source.generate) for source in run.config.data.sources if source.generate)


def listable(data: DataConfig, class_images: Sequence[ClassImages]) -> DataConfig:
    """The same without sources that are empty only because their images are not drawn yet."""
    empty = {one.source.source_name for one in class_images if not one.num_found}
    return data.model_copy(update={"sources": tuple(one for one in data.sources if one.source_name not in empty)})


def refuse_missing(class_images: Sequence[ClassImages]) -> None:
    """Raise `SourceError` when images are missing: nobody trains with fewer than the run file says without knowing."""
    for one in class_images:
        if one.num_missing:
            raise SourceError(
                f"data.sources: {one.source.path} holds {one.num_found:,} of the {one.generate.count:,} class images that "
                f"`generate.count` of source {one.source.source_name} asks for. {COMMAND} draws the other "
                f"{one.num_missing:,} with the base model. Or put more images there, or lower `generate.count`."
            )


def refuse_changes(class_images: Sequence[ClassImages], model: ModelConfig) -> None:
    """Raise `SourceError` when images are there that were drawn with other settings, or a model of another name."""
    for one in class_images:
        one.refuse_changes({"generate": one.settings, "model": model.model_dump(mode="json")})


def stem(index: int) -> str:
    """The name of a drawn image and of its caption, without their suffixes."""
    return f"{index:05d}"


def _look(run: Run, source: SourceConfig, generate: GenerateConfig) -> ClassImages:
    images = [name for name in _names(source) if posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    return ClassImages(
        source=source,
        generate=generate,
        size=run.drawn_size(run.config.data.of(source).resolutions[0], generate, f"source {source.source_name}: generate"),
        caption=_caption(source, generate),
        num_found=len(images),
        taken=frozenset(posixpath.splitext(name)[0] for folder, name in map(posixpath.split, images) if folder == FOLDER),
    )


def _names(source: SourceConfig) -> list[str]:
    """Paths below the source's folder of all files in it; none when there is no folder yet."""
    try:
        return [file.relative for file in locations.list_files(source.path)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SourceError(
            f"data.sources: {locations.printable(source.path)}, where class images are to lie, cannot be listed: "
            f"{error.strerror}. Name a folder."
        ) from None


def _caption(source: SourceConfig, generate: GenerateConfig) -> str:
    caption = captions.check(generate.prompt, "`generate.prompt`")
    if isinstance(caption, captions.Problem):
        raise ConfigError(f"data.sources: source {source.source_name}: {caption.detail}. Write what the class is called.")
    return caption
