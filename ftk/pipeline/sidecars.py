"""Which caption file belongs to which image of a folder, and which text files belong to none."""

import posixpath
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ftk import locations
from ftk.contracts import UnmatchedCaption
from ftk.locations import File
from ftk.pipeline.names import Nearest, folded

SUFFIXES = (".txt", ".caption", ".json")
_MOST_EXAMPLES = 100
_MOST_REMEMBERED = 50_000
_TEXT_SUFFIXES = frozenset(
    {".txt", ".text", ".caption", ".captions", ".cap", ".tag", ".tags", ".prompt", ".prompts", ".desc", ".description"}
    | {".json", ".md", ".markdown", ".yaml", ".yml", ".xml", ".toml", ".html", ".htm", ".rst", ".rtf", ".doc", ".docx", ".odt"}
)
# What lies beside images under their names and is never a caption.
_NEVER_TEXT = frozenset(
    {".npz", ".npy", ".pt", ".pth", ".pkl", ".bin", ".safetensors", ".parquet", ".arrow", ".tar", ".zip", ".gz", ".7z", ".rar"}
    | {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mp3", ".wav", ".flac", ".aac", ".thm", ".db", ".ini", ".exe", ".py"}
    | {".xmp", ".aae", ".pp3", ".csv", ".tsv", ".jsonl", ".svg", ".psd", ".xcf", ".pdf", ".ai", ".eps", ".blend", ""}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderFiles:
    """One folder's files, by their names in it: its images, and what else lies there."""

    images: Sequence[str]
    others: Mapping[str, File]


@dataclass(frozen=True, slots=True, kw_only=True)
class Matches:
    """Of one folder: the caption file of each image that has one, and the text files that are no image's."""

    captions: Mapping[str, File]
    unmatched: Sequence[tuple[str, str, str]]
    """(file, likely image or "", why) by their names in the folder."""


def match(files: FolderFiles, suffixes: Sequence[str] = SUFFIXES) -> Matches:
    """Find each image's caption file: `a.txt` or `a.jpg.txt` for `a.jpg`, the first of `suffixes` that is there.

    Where no file has the exact name, one that differs in case or Unicode form alone is taken, if it fits one image only
    and is the only one that fits.
    """
    named = _by_base(files.others, suffixes)
    exact = {base for image in files.images for base in _bases(image)}
    captions: dict[str, File] = {}
    stems = {_stem(image) for image in files.images}
    for image in files.images:
        # `a.jpg.txt` belongs to `a.jpg`, unless there is an image `a.jpg.png`.
        base = next((base for base in _bases(image) if base in named and (base == _stem(image) or base not in stems)), None)
        if base is not None:
            captions[image] = files.others[named[base]]
    alike = _Alike(files.images, {base: name for base, name in named.items() if base not in exact})
    for image in files.images:
        if image not in captions and (base := alike.only_fit(image)) is not None:
            captions[image] = files.others[named[base]]
            exact.add(base)
    strays = (name for name in files.others if not any(base in exact for base in _caption_bases(name, suffixes)))
    return Matches(captions=captions, unmatched=list(_unmatched(strays, files, captions, alike, suffixes)))


class _Alike:
    """Images and spare caption files whose names differ in case or Unicode form alone."""

    def __init__(self, images: Iterable[str], spare: Mapping[str, str]) -> None:
        self._images: dict[str, dict[str, str]] = {}
        for image in images:
            for base in _bases(image):
                # By base: images of one stem, such as a.jpg and a.png, share their caption.
                self._images.setdefault(folded(base), {})[base] = image
        self._spare: dict[str, dict[str, str]] = {}
        for base, name in spare.items():
            self._spare.setdefault(folded(base), {})[base] = name

    def images(self, base: str) -> list[str]:
        """The images that a caption file of this base fits, those of one stem once."""
        return sorted(self._images.get(folded(base), {}).values())

    def files(self, image: str) -> dict[str, str]:
        """By base, the spare caption files that fit an image."""
        return {base: name for image_base in _bases(image) for base, name in self._spare.get(folded(image_base), {}).items()}

    def only_fit(self, image: str) -> str | None:
        """The base of the caption file that fits this image alone, and is the only one."""
        fitting = list(self.files(image))
        return fitting[0] if len(fitting) == 1 and len(self.images(fitting[0])) == 1 else None


def _unmatched(
    strays: Iterable[str], files: FolderFiles, captions: Collection[str], alike: _Alike, suffixes: Sequence[str]
) -> Iterator[tuple[str, str, str]]:
    for name in strays:
        bases = list(_caption_bases(name, suffixes))
        images = [image for base in bases or [_stem(name)] for image in alike.images(base)]
        without = [image for image in images if image not in captions]
        if bases and images:
            yield name, (without or images)[0], _ambiguous(name, images, alike)
        elif without and _suffix(name) not in _NEVER_TEXT:
            yield name, without[0], f"{_suffix(name)} files are not read: set `caption_suffix: {_suffix(name)}`"
        elif not images and (bases or _suffix(name) in _TEXT_SUFFIXES):
            yield name, "", "no image has this name"


def _ambiguous(name: str, images: list[str], alike: _Alike) -> str:
    if len(images) > 1:
        return f"fits {' and '.join(images)}: name it exactly as its image"
    competitors = sorted({file for file in alike.files(images[0]).values() if file != name})
    rival = " and ".join(competitors) or "the caption file of exactly this name"
    return f"fits {images[0]}, as {rival} does: name it exactly as its image"


class Unmatched:
    """The text files of a whole source that are no image's caption: how many, and the first with the likely image."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._examples: list[UnmatchedCaption] = []
        self._homeless: dict[str, str] = {}
        self.number = 0

    def add(self, directory: str, files: FolderFiles, matches: Matches) -> None:
        """Take in one folder; `directory` ends in `/`, or is empty at the top."""
        without = [image for image in files.images if image not in matches.captions]
        for image in without[: max(0, _MOST_REMEMBERED - len(self._homeless))]:
            self._homeless.setdefault(folded(_stem(image)), directory + image)
        self.number += len(matches.unmatched)
        examples = matches.unmatched[: _MOST_EXAMPLES - len(self._examples)]
        likely_images = [_likely_images(names) for names in ((without, files.images) if examples else ())]
        for name, image, detail in examples:
            likely = image or next(filter(None, (find(name) for find in likely_images)), "")
            self._examples.append(
                UnmatchedCaption(
                    source=self._source,
                    path=locations.printable(directory + name),
                    likely_image=locations.printable(directory + likely) if likely else "",
                    detail=locations.printable(detail),
                )
            )

    def examples(self) -> tuple[UnmatchedCaption, ...]:
        """The first of them; call it when all folders are in, for an image may lie in another folder than its caption."""
        return tuple(example if example.likely_image else self._elsewhere(example) for example in self._examples)

    def _elsewhere(self, example: UnmatchedCaption) -> UnmatchedCaption:
        image = self._homeless.get(folded(_stem(posixpath.basename(example.path))))
        if image is None:
            return example
        return replace(
            example, likely_image=locations.printable(image), detail="its image lies in another folder: put it beside"
        )


def _likely_images(images: Sequence[str]) -> Callable[[str], str | None]:
    """A function that gives the one of the images that a text file probably belongs to."""
    image_of = {_stem(image): image for image in reversed(images)}
    nearest = Nearest(image_of)
    return lambda name: image_of.get(nearest.to(_stem(name)) or "")


def _by_base(files: Iterable[str], suffixes: Sequence[str]) -> dict[str, str]:
    """By what stands before a caption's suffix, the first in the order of `suffixes`; one in small letters before others."""
    ranked = [
        ((rank, not name.endswith(suffix)), name[: -len(suffix)], name)
        for name in files
        for rank, suffix in enumerate(suffixes)
        if _ends(name, suffix)
    ]
    return {base: name for _, base, name in sorted(ranked, key=lambda item: item[0], reverse=True)}


def _caption_bases(name: str, suffixes: Sequence[str]) -> Iterator[str]:
    return (name[: -len(suffix)] for suffix in suffixes if _ends(name, suffix))


def _ends(name: str, suffix: str) -> bool:
    return len(name) > len(suffix) and name[-len(suffix) :].lower() == suffix


def _bases(image: str) -> tuple[str, str]:
    return _stem(image), image


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()
