"""Names of files that mean the same: equal but for case and Unicode form, as they come from other file systems."""

import difflib
import re
import unicodedata
from collections.abc import Iterable

_MOST_COMPARED = 2_000


def folded(name: str) -> str:
    """The name without its case and Unicode form (canonical caseless matching: The Unicode Standard 3.13, D145)."""
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def nearest(name: str, others: Iterable[str]) -> str | None:
    """The one of the other names that this one is probably a misspelling of; numbers in both must be equal."""
    numbers = _numbers(name)
    alike = {folded(other): other for other in others if _numbers(other) == numbers}
    if len(alike) > _MOST_COMPARED:
        return None
    near = difflib.get_close_matches(folded(name), alike, n=1)
    return alike[near[0]] if near else None


def _numbers(name: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"[0-9]+", name)]
