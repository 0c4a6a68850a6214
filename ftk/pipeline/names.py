"""Names of files that mean the same: equal but for case and Unicode form, as they come from other file systems."""

import difflib
import re
import unicodedata
from collections.abc import Iterable

_MOST_COMPARED = 500


def folded(name: str) -> str:
    """The name without its case and Unicode form (canonical caseless matching: The Unicode Standard 3.13, D145)."""
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


class Nearest:
    """Finds the name that another one is probably a misspelling of; numbers in both must be equal."""

    def __init__(self, names: Iterable[str]) -> None:
        self._by_numbers: dict[tuple[int, ...], dict[str, str]] = {}
        for name in names:
            self._by_numbers.setdefault(_numbers(name), {})[folded(name)] = name

    def to(self, name: str) -> str | None:
        """The nearest one; None where none is near, or too many would have to be compared."""
        alike = self._by_numbers.get(_numbers(name), {})
        if len(alike) > _MOST_COMPARED:
            return None
        near = difflib.get_close_matches(folded(name), alike, n=1)
        return alike[near[0]] if near else None


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"[0-9]{1,4000}", name))
