"""What `resolutions` may hold: edges, exact sizes, and the sizes that the model's family publishes. All sides in pixels."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator

from ftk.errors import did_you_mean

NATIVE = "native"
"""Stands for the sizes that a family publishes for its model: `Family.native_sizes`."""
MOST_PX = 16_384
_EDGE = re.compile(r"[0-9]{1,9}")
_SIZE = re.compile(r"([0-9]{1,9}) *[xX×] *([0-9]{1,9})")


def parse_size(resolution: str) -> tuple[int, int]:
    """(width, height) of a size that was validated."""
    width, _, height = resolution.partition("x")
    return int(width), int(height)


def a_size(value: Any) -> tuple[int, int]:
    """(width, height) of WIDTHxHEIGHT as a user writes it.

    Raises:
        ValueError: it is something else.
    """
    size = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if size is None:
        raise ValueError(f"a size is WIDTHxHEIGHT in px, such as 768x1024 (found {value!r})")
    return _side(int(size[1])), _side(int(size[2]))


def _side(px: int) -> int:
    if not 1 <= px <= MOST_PX:
        raise ValueError(f"a side has 1 to {MOST_PX:,} px")
    return px


def _resolution(value: Any) -> int | str:
    """An edge as an integer, a size as WIDTHxHEIGHT; a union of types would complain of both."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip() if isinstance(value, (int, str)) and not isinstance(value, bool) else ""
    if _EDGE.fullmatch(text):
        return _side(int(text))
    if size := _SIZE.fullmatch(text):
        return f"{_side(int(size[1]))}x{_side(int(size[2]))}"
    if text.lower() == NATIVE:
        return NATIVE
    raise ValueError(
        f"a resolution is an edge (1024), a size (512x288), or `{NATIVE}` for the sizes that the model's family publishes."
        f"{did_you_mean(text, [NATIVE])}"
    )


Resolution = Annotated[int | str, BeforeValidator(_resolution)]


def label(resolution: int | str) -> str:
    """A resolution as it is shown to people."""
    return NATIVE if resolution == NATIVE else f"{resolution} px"
