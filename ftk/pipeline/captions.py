"""Captions: read, checked, finished with trigger, prefix and shuffled tags. Never mojibake: what is no UTF-8 is rejected."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ftk import locations, storage
from ftk.configs.schema import CaptionsConfig, SourceConfig
from ftk.contracts import RejectReason
from ftk.errors import ConfigError

MAX_CAPTION_BYTES = 64 << 10
MAX_JSON_BYTES = 1 << 20
JSON_KEYS = ("caption", "captions", "text", "prompt")
_CLOSES_UP = tuple(",.;:!?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why a caption cannot be used."""

    reason: RejectReason
    detail: str


def check(text: str | bytes, name: str) -> str | Problem:
    """One caption without its byte-order mark and surrounding white space; `name` says in a problem where it stands."""
    if isinstance(text, bytes):
        if len(text) > MAX_CAPTION_BYTES:
            return _not_text(f"{name} is longer than {MAX_CAPTION_BYTES >> 10} KiB")
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            return _not_text(f"{name} is not UTF-8 at byte {error.start}: save it as UTF-8")
    text = text.removeprefix("\ufeff").strip()
    if not text.isascii():
        try:
            num_bytes = len(text.encode("utf-8"))
        except UnicodeEncodeError:
            return _not_text(f"{name} holds half a character (a lone surrogate): save it as UTF-8")
    else:
        num_bytes = len(text)
    if num_bytes > MAX_CAPTION_BYTES:
        return _not_text(f"{name} is longer than {MAX_CAPTION_BYTES >> 10} KiB")
    if "\0" in text:
        return _not_text(f"{name} holds NUL characters (UTF-16?)")
    if not text:
        return Problem(reason=RejectReason.CAPTION_EMPTY, detail=f"{name} is empty")
    return text


def gather(values: Iterable[object], name: str) -> tuple[str, ...] | Problem:
    """The captions among the values, which are texts or lists of texts; nulls and blanks are skipped.

    One broken caption is a problem of all. When none is left, the reason is `CAPTION_EMPTY` if there was a blank one.
    """
    captions: list[str] = []
    nothing = Problem(reason=RejectReason.CAPTION_MISSING, detail=f"{name} holds no caption")
    for value in _flat(values):
        caption = check(value, name) if isinstance(value, str) else _not_text(f"{name} holds {type(value).__name__}, not text")
        if isinstance(caption, str):
            captions.append(caption)
        elif caption.reason == RejectReason.CAPTION_EMPTY:
            nothing = caption
        else:
            return caption
    return tuple(captions) or nothing


def read(location: str, lines: bool = False) -> tuple[str, ...] | Problem:
    """The captions in a sidecar file: a `.json`, or a text that is one caption or, with `lines`, one a line.

    Raises:
        EnvironmentFault: the network or the disk failed.
    """
    name = locations.printable(location.rpartition("/")[2])
    is_json = name.lower().endswith(".json")
    try:
        data = locations.read_bytes(location, (MAX_JSON_BYTES if is_json else MAX_CAPTION_BYTES) + 1)
    except OSError as error:
        return Problem(reason=RejectReason.CAPTION_MISSING, detail=f"{name} cannot be read: {error.strerror or error}")
    if is_json:
        return _from_json(data, name)
    text = check(data, name)
    if isinstance(text, Problem):
        return text
    return gather(text.replace("\r", "\n").split("\n"), name) if lines else (text,)


def fallback(source: SourceConfig) -> str | None:
    """The source's `caption:`, for images that have none of their own.

    Raises:
        ConfigError: it is blank, or otherwise no caption.
    """
    if source.caption is None:
        return None
    caption = check(source.caption, "`caption`")
    if isinstance(caption, Problem):
        raise ConfigError(f"data.sources: source {source.source_name}: {caption.detail}. Leave it out, or write a caption.")
    return caption


def with_trigger(caption: str, trigger: str | None) -> str:
    """Put the trigger before a caption that does not contain it."""
    if not trigger or trigger in caption:
        return caption
    return f"{trigger}, {caption}"


def finish(captions: tuple[str, ...], source: SourceConfig, config: CaptionsConfig, key: str) -> list[str]:
    """What is trained on: each caption and after it its shuffled variants, with trigger, prefix and suffix; none twice.

    The prefix and suffix are never shuffled, and neither is a trigger that was put in front: it is the first of the
    `keep_tags`. Variants depend on `key`, their number and the tags alone.
    """
    finished: list[str] = []
    for caption in captions:
        for variant in (with_trigger(caption, source.trigger), *_shuffles(caption, source.trigger, config, key)):
            finished.append(_between(source.prefix, variant, source.suffix))
    return list(dict.fromkeys(finished))


def _shuffles(caption: str, trigger: str | None, config: CaptionsConfig, key: str) -> Iterator[str]:
    added = [trigger] if trigger and trigger not in caption else []
    tags = added + [tag.strip() for tag in caption.split(config.tag_separator) if tag.strip()]
    num_kept = max(config.keep_tags, len(added))
    separator = config.tag_separator if config.tag_separator[-1].isspace() else f"{config.tag_separator} "
    rest = list(enumerate(tags[num_kept:]))
    for shuffle in range(config.tag_shuffles if len(rest) > 1 else 0):
        # Sorted by hash, and not drawn: no version of Python or of a library changes the order.
        order = sorted(rest, key=lambda item: storage.digest([key, shuffle, *item]))
        if order != rest:
            yield separator.join([*tags[:num_kept], *(tag for _, tag in order)])


def _between(prefix: str | None, caption: str, suffix: str | None) -> str:
    if prefix:
        caption = f"{prefix}{'' if prefix[-1].isspace() else ' '}{caption}"
    if suffix:
        caption = f"{caption}{'' if suffix[0].isspace() or suffix.startswith(_CLOSES_UP) else ' '}{suffix}"
    return caption


def _from_json(data: bytes, name: str) -> tuple[str, ...] | Problem:
    if len(data) > MAX_JSON_BYTES:
        return _not_text(f"{name} is longer than {MAX_JSON_BYTES >> 20} MiB")
    try:
        value = json.loads(data.decode("utf-8-sig")) if data.strip() else None
    except UnicodeDecodeError as error:
        return _not_text(f"{name} is not UTF-8 at byte {error.start}: save it as UTF-8")
    except (ValueError, RecursionError) as error:
        return _not_text(f"{name} is not JSON: {error}")
    if value is None:
        return Problem(reason=RejectReason.CAPTION_EMPTY, detail=f"{name} is empty")
    if not isinstance(value, dict):
        return gather([value], name)
    found = next((key for key in JSON_KEYS if value.get(key) is not None), None)
    if found is None:
        keys = ", ".join(locations.printable(key) for key in list(value)[:5]) or "nothing"
        detail = f"{name} has none of the keys {', '.join(JSON_KEYS)}; found: {keys}"
        return Problem(reason=RejectReason.CAPTION_MISSING, detail=detail)
    return gather([value[found]], f"{name} ({found})")


def _flat(values: Iterable[object]) -> Iterator[object]:
    for value in values:
        yield from (item for item in (value if isinstance(value, list) else [value]) if item is not None)


def _not_text(detail: str) -> Problem:
    return Problem(reason=RejectReason.CAPTION_NOT_TEXT, detail=detail)
