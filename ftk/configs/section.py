"""What every section of a run file is made of."""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
)

from ftk.errors import did_you_mean

Device = Literal["auto", "cpu", "cuda", "mps"]


def _compiles(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is not a regular expression: {error}") from None
    return value


RegularExpression = Annotated[str, Field(min_length=1), AfterValidator(_compiles)]


class Section(BaseModel):
    """A part of the run file: frozen, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def require_default(section: Section, name: str, needed: str) -> None:
    """Refuse a setting that does nothing; its default does no harm, and a resolved file writes it out."""
    if getattr(section, name) != type(section).model_fields[name].default:
        raise ValueError(f"`{name}` has no effect without `{needed}`")


def require_text(prompt: str) -> None:
    if not prompt.isascii() and prompt.encode("utf-8", "ignore").decode() != prompt:
        raise ValueError("half of a surrogate pair is no text: write the character itself")


def refuse_misspelt(tree: Any, required: tuple[str, ...]) -> Any:
    """Refuse a key that is near to a required one which is missing."""
    missing = [name for name in required if name not in tree] if isinstance(tree, dict) else []
    for key in tree if missing else ():
        if meant := did_you_mean(str(key), missing):
            raise ValueError(f"`{key}` is not a setting.{meant}")
    return tree
