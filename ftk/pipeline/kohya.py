"""Folders named as kohya's sd-scripts wants them: `10_sks dog` is 10 repeats of images whose class tokens are `sks dog`.

The rules are those of `generate_dreambooth_subsets_config_by_subdirs` in sd-scripts: what stands before the first `_` is a
whole number of repeats, and a folder without one, or with fewer than one, is passed over.
"""

from dataclasses import dataclass

_MOST_LIKELY_REPEATS = 999


@dataclass(frozen=True, slots=True, kw_only=True)
class RepeatsFolder:
    """What a folder's name says: `class_tokens` is the caption of images without a caption file, or empty."""

    repeats: int
    class_tokens: str


def parse(name: str) -> RepeatsFolder | None:
    """What the name of a folder says; None where sd-scripts passes the folder over."""
    number, _, class_tokens = name.partition("_")
    try:
        repeats = int(number)
    except ValueError:
        return None
    return RepeatsFolder(repeats=repeats, class_tokens=class_tokens) if repeats >= 1 else None


def looks_meant(name: str) -> RepeatsFolder | None:
    """As `parse`, for a folder that nobody called kohya's: `2024_summer` and `10` are taken for names."""
    folder = parse(name)
    return folder if folder and folder.class_tokens and folder.repeats <= _MOST_LIKELY_REPEATS else None
