"""Captions: read, checked, finished with wildcards, trigger, prefix and shuffled tags.

Never mojibake: what is neither UTF-8 nor marked as UTF-16 or UTF-32 is rejected.
"""

import codecs
import json
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ftk import locations, storage
from ftk.configs.schema import CaptionsConfig, SourceConfig
from ftk.contracts import RejectReason
from ftk.errors import ConfigError
from ftk.pipeline import wildcards

MAX_CAPTION_BYTES = 64 << 10
MAX_JSON_BYTES = 1 << 20
JSON_KEYS = ("caption", "captions", "text", "prompt")
CAPTIONS_VERSION = 3
"""Raised when equal inputs give other captions than before: shards are then made again. Their images are not encoded again."""

_CLOSES_UP = tuple(",.;:!?")
_PLACEHOLDER = "[trigger]"
KEEP_MARK = "|||"
"""sd-scripts' usual `keep_tokens_separator`: tags before it are not shuffled, nor those behind a second one."""
# Of UTF-32 first: the mark of UTF-16 begins it.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
# What `str.isspace` says, and what is white space to the eye alone: zero-width space, word joiner, byte-order mark.
_BLANKS = "".join(
    map(chr, (*range(0x09, 0x0E), *range(0x1C, 0x21), 0x85, 0xA0, 0x1680, *range(0x2000, 0x200C), 0x2028, 0x2029, 0x202F,
              0x205F, 0x2060, 0x3000, 0xFEFF))
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why a caption cannot be used."""

    reason: RejectReason
    detail: str


def check(text: str | bytes, name: str) -> str | Problem:
    """One caption without surrounding white space; `name` says in a problem where it stands.

    Its lines end in LF, whatever they ended in. Bytes are UTF-8, or what their byte-order mark says.
    """
    if isinstance(text, bytes):
        if len(text) > MAX_CAPTION_BYTES:
            return _not_text(f"{name} is longer than {MAX_CAPTION_BYTES >> 10} KiB")
        try:
            text = _decoded(text)
        except UnicodeDecodeError as error:
            return _not_text(f"{name} is not {error.encoding.upper()} at byte {error.start}: save it as UTF-8")
    text = _trimmed(text.replace("\r\n", "\n").replace("\r", "\n"))
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


def _decoded(data: bytes) -> str:
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8")
    return data.decode(encoding)


def _trimmed(text: str) -> str:
    """Without blanks at either end; nothing where all of it is joiners and marks of direction, which show nothing."""
    text = text.strip(_BLANKS)
    return "" if all(unicodedata.category(character) == "Cf" for character in text) else text


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


def read(location: str, lines: bool = False, has_fallback: bool = False) -> tuple[str, ...] | Problem:
    """The captions in a sidecar file: a `.json`, or a text that is one caption or, with `lines`, one a line.

    Args:
        has_fallback: a JSON file without a caption, which says other things of its image, gives none and is no problem.

    Raises:
        EnvironmentFault: the network or the disk failed.
    """
    name = locations.printable(location.rpartition("/")[2])
    is_json = name.lower().endswith(".json")
    try:
        data = locations.read_bytes(location, (MAX_JSON_BYTES if is_json else MAX_CAPTION_BYTES) + 1)
    except OSError as error:
        return Problem(reason=RejectReason.CAPTION_MISSING, detail=f"{name} cannot be read: {error.strerror or error}")
    return parse(data, name, lines, has_fallback)


def parse(data: bytes, name: str, lines: bool = False, has_fallback: bool = False) -> tuple[str, ...] | Problem:
    """As `read`, of a sidecar file's bytes."""
    if name.lower().endswith(".json"):
        captions = _from_json(data, name)
        is_absent = isinstance(captions, Problem) and captions.reason == RejectReason.CAPTION_MISSING
        return () if is_absent and has_fallback else captions
    text = check(data, name)
    if isinstance(text, Problem):
        return text
    return gather(text.split("\n"), name) if lines else (text,)


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


def _has_words(caption: str, words: str) -> bool:
    """Whether the words stand in the caption by themselves: `man` is not in `a woman`."""
    start = caption.find(words)
    while start >= 0:
        end = start + len(words)
        if not (_joins(caption[start - 1 : start], words[0]) or _joins(words[-1], caption[end : end + 1])):
            return True
        start = caption.find(words, start + 1)
    return False


def _joins(before: str, after: str) -> bool:
    """Whether two neighbouring characters are of one word. Chinese and Japanese have no spaces between words."""
    both = before + after
    return len(both) == 2 and all((c.isalnum() or c == "_") and unicodedata.east_asian_width(c) not in "WF" for c in both)


def finish(captions: tuple[str, ...], source: SourceConfig, config: CaptionsConfig, key: str) -> list[str]:
    """What is trained on: each variant of a caption, then its shuffles, with trigger, prefix and suffix; none twice.

    The prefix and suffix are never shuffled, and neither is a trigger that was put in front: it is the first of the
    `keep_tags`. Shuffles depend on `key`, their number and the tags alone.
    """
    finished: list[str] = []
    for caption in captions:
        for prefix, text, suffix in wildcards.variants(_pattern(caption, source), config.wildcards):
            tags = _Tags.of(_trimmed(text), source.trigger, config)
            for variant in (tags.text, *tags.shuffles(config.tag_shuffles, key)):
                finished.append(between(prefix, variant, suffix) if variant else _trimmed(f"{prefix} {suffix}"))
    # Of `{|a cat}` one variant says nothing; where none says anything the caption stays as it is.
    return list(dict.fromkeys(filter(_trimmed, finished))) or list(dict.fromkeys(captions))


def num_cut(captions: tuple[str, ...], source: SourceConfig, config: CaptionsConfig) -> int:
    """How many of the captions have more variants than are taken."""
    patterns = (_pattern(caption, source) for caption in captions)
    return sum(wildcards.count(pattern) > config.wildcards > 0 for pattern in patterns)


def _pattern(caption: str, source: SourceConfig) -> tuple[str, str, str]:
    return source.prefix or "", caption, source.suffix or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tags:
    """A caption with its trigger, and its tags: `joints[n]` stands between tags n and n + 1, as it was written.

    Those from `first` to before `last` are shuffled.
    """

    text: str
    tags: list[str]
    joints: list[str]
    first: int
    last: int

    @classmethod
    def of(cls, caption: str, trigger: str | None, config: CaptionsConfig) -> "_Tags":
        caption = caption.replace(_PLACEHOLDER, trigger) if trigger else caption
        separator = config.tag_separator
        parts = [_split(part, separator) for part in ([caption] if KEEP_MARK in separator else caption.split(KEEP_MARK))]
        written = next((joints[0] for _, joints in parts if joints), None)
        joint = written or (f"{separator} " if separator in _CLOSES_UP else separator)
        tags, joints = _joined(parts, joint)
        text = _together(tags, joints) if len(parts) > 1 else caption
        num_first = len(parts[0][0]) if len(parts) > 1 else config.keep_tags
        last = len(tags) - sum(len(part) for part, _ in parts[2:])
        if trigger and not _has_words(caption, trigger):
            # Before a sentence too: a comma and a space, however it writes its own.
            joint = ", " if separator == "," else joint
            text = f"{trigger}{joint}{text}" if text else trigger
            tags, joints = [trigger, *tags], [joint, *joints] if tags else joints
            num_first, last = num_first + 1 if len(parts) > 1 else max(num_first, 1), last + 1
        return cls(text=text, tags=tags, joints=joints, first=min(num_first, last), last=last)

    def shuffles(self, number: int, key: str) -> Iterator[str]:
        """The tags in so many other orders."""
        movable = list(enumerate(self.tags[self.first : self.last]))
        for shuffle in range(number if len(movable) > 1 else 0):
            # Sorted by hash, and not drawn: no version of Python or of a library changes the order.
            order = sorted(movable, key=lambda item: storage.digest([key, shuffle, *item]))
            if order != movable:
                tags = [*self.tags[: self.first], *(tag for _, tag in order), *self.tags[self.last :]]
                yield _together(tags, self.joints)


def _split(text: str, separator: str) -> tuple[list[str], list[str]]:
    """(tags, what stands between them); empty tags are left out."""
    tags: list[str] = []
    joints: list[str] = []
    start = end = 0
    for piece in text.split(separator):
        if tag := piece.strip():
            first = start + piece.index(tag[0])
            joints += [text[end:first]] if tags else []
            tags.append(tag)
            end = first + len(tag)
        start += len(piece) + len(separator)
    return tags, joints


def _joined(parts: Iterable[tuple[list[str], list[str]]], joint: str) -> tuple[list[str], list[str]]:
    all_tags: list[str] = []
    all_joints: list[str] = []
    for tags, joints in parts:
        all_joints += [*([joint] if all_tags and tags else []), *joints]
        all_tags += tags
    return all_tags, all_joints


def _together(tags: list[str], joints: list[str]) -> str:
    return "".join(piece for pair in zip(tags, [*joints, ""], strict=True) for piece in pair)


def between(prefix: str | None, caption: str, suffix: str | None) -> str:
    """The caption with its source's prefix and suffix, a space between where one is due."""
    if prefix:
        caption = f"{prefix}{'' if prefix[-1].isspace() else ' '}{caption}"
    if suffix:
        caption = f"{caption}{'' if suffix[0].isspace() or suffix.startswith(_CLOSES_UP) else ' '}{suffix}"
    return caption


def _from_json(data: bytes, name: str) -> tuple[str, ...] | Problem:
    if len(data) > MAX_JSON_BYTES:
        return _not_text(f"{name} is longer than {MAX_JSON_BYTES >> 20} MiB")
    try:
        value = json.loads(_decoded(data).removeprefix("\ufeff")) if data.strip() else None
    except UnicodeDecodeError as error:
        return _not_text(f"{name} is not {error.encoding.upper()} at byte {error.start}: save it as UTF-8")
    except (ValueError, RecursionError) as error:
        return _not_text(f"{name} is not JSON: {error}")
    if value is None:
        return Problem(reason=RejectReason.CAPTION_EMPTY, detail=f"{name} is empty")
    if not isinstance(value, dict):
        return gather([value], name)
    found = next((key for key in JSON_KEYS if value.get(key) is not None), None)
    if found is None:
        keys = ", ".join(locations.printable(key) for key in list(value)[:5]) or "nothing"
        null = next((key for key in JSON_KEYS if key in value), None)
        detail = f"{name}: {null} is null" if null else f"{name} has none of the keys {', '.join(JSON_KEYS)}; found: {keys}"
        return Problem(reason=RejectReason.CAPTION_MISSING, detail=detail)
    return gather([value[found]], f"{name} ({found})")


def _flat(values: Iterable[object]) -> Iterator[object]:
    for value in values:
        yield from (item for item in (value if isinstance(value, list) else [value]) if item is not None)


def _not_text(detail: str) -> Problem:
    return Problem(reason=RejectReason.CAPTION_NOT_TEXT, detail=detail)
