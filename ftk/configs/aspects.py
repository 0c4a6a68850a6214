"""What `aspects` may hold: ratios of width to height, and the image's own."""

import re
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BeforeValidator

from ftk.errors import did_you_mean

ORIGINAL = "original"
"""Stands for the image's own aspect ratio."""
_RATIO = re.compile(r"([0-9]{1,4}) *[:/] *([0-9]{1,4})")


def ratio(aspect: str) -> Fraction | None:
    """Width over height of an aspect that was validated; None of the image's own."""
    return None if aspect == ORIGINAL else Fraction(aspect.replace(":", "/"))


def _aspect(value: Any) -> str:
    # YAML reads 16:9 as a number to base 60, as it would a time of day.
    if isinstance(value, int) and not isinstance(value, bool) and value >= 60:
        value = f"{value // 60}:{value % 60}"
    text = value.strip().lower() if isinstance(value, str) else ""
    sides = _RATIO.fullmatch(text)
    if sides and int(sides[1]) and int(sides[2]):
        return f"{int(sides[1])}:{int(sides[2])}"
    if text == ORIGINAL:
        return ORIGINAL
    raise ValueError(
        f"an aspect is a ratio of width to height such as 4:3, or `{ORIGINAL}` for the image's own."
        f"{did_you_mean(text, [ORIGINAL])}"
    )


Aspect = Annotated[str, BeforeValidator(_aspect)]
