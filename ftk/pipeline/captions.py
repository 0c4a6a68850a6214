"""Captions: read, checked, and given their trigger word. Never mojibake: what is no UTF-8 is rejected."""

from dataclasses import dataclass
from pathlib import Path

from ftk.contracts import RejectReason

MAX_CAPTION_BYTES = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why a caption cannot be used."""

    reason: RejectReason
    detail: str


def read(path: Path, fallback: str | None) -> str | Problem:
    """The caption in a `.txt` file, without its byte-order mark and surrounding white space.

    `fallback` (the source's `caption:`) is used when the file does not exist; an empty or broken file is a problem.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CAPTION_BYTES + 1)
    except FileNotFoundError:
        if fallback is not None:
            return fallback
        return Problem(
            reason=RejectReason.CAPTION_MISSING,
            detail=f"no {path.name} beside the image, and the source has no `caption:` to fall back on",
        )
    except OSError as error:
        return Problem(reason=RejectReason.CAPTION_MISSING, detail=f"{path.name} cannot be read: {error.strerror}")
    return _checked(data, path.name)


def _checked(data: bytes, name: str) -> str | Problem:
    if len(data) > MAX_CAPTION_BYTES:
        return Problem(reason=RejectReason.CAPTION_NOT_TEXT, detail=f"{name} is longer than {MAX_CAPTION_BYTES >> 10} KiB")
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        return Problem(
            reason=RejectReason.CAPTION_NOT_TEXT, detail=f"{name} is not UTF-8 at byte {error.start}: save it as UTF-8"
        )
    if "\0" in text:
        return Problem(reason=RejectReason.CAPTION_NOT_TEXT, detail=f"{name} holds NUL characters (UTF-16?)")
    if not text:
        return Problem(reason=RejectReason.CAPTION_EMPTY, detail=f"{name} is empty")
    return text


def with_trigger(caption: str, trigger: str | None) -> str:
    """Put the trigger before a caption that does not contain it."""
    if not trigger or trigger in caption:
        return caption
    return f"{trigger}, {caption}"
