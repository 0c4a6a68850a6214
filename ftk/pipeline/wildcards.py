"""Wildcards in captions: `a {red|blue} car` is two captions.

The rules are those of kohya's sd-scripts, and groups may lie in groups. Of the forms of sd-dynamic-prompts, what draws several
options (`{2$$a|b}`) or weighs them (`{0.5::a|b}`) is left as it is written.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ftk import storage

_MAX_DEPTH = 32
_TOKEN = re.compile(r"\\.|[{|}]", re.DOTALL)
_DRAWS_SEVERAL = re.compile(r"\s*[\d-]*\s*\$\$")
_WEIGHS = re.compile(r"\s*\d*\.?\d+\s*::")


@dataclass(frozen=True, slots=True)
class _Choice:
    """`{a|b}`: one of several sequences."""

    options: tuple["_Sequence", ...]
    count: int


@dataclass(frozen=True, slots=True)
class _Sequence:
    """Text and choices one after the other; `count`: how many texts that gives, equal ones included."""

    parts: tuple["str | _Choice", ...]
    count: int

    def pick(self, index: int) -> str:
        """The text of this number, from 0: the last choice changes fastest."""
        picked: list[str] = []
        for part in reversed(self.parts):
            if isinstance(part, str):
                picked.append(part)
                continue
            index, inner = divmod(index, part.count)
            for option in part.options:
                if inner < option.count:
                    picked.append(option.pick(inner))
                    break
                inner -= option.count
        return "".join(reversed(picked))


@dataclass(slots=True)
class _Group:
    """A brace that is not closed yet."""

    start: int
    options: list[list["str | _Choice"]] = field(default_factory=lambda: [[]])

    def add(self, *parts: "str | _Choice") -> None:
        self.options[-1].extend(parts)


def count(texts: Sequence[str]) -> int:
    """How many variants the texts have together, equal ones included."""
    return math.prod(_parse(text).count for text in texts)


def variants(texts: Sequence[str], most: int) -> Iterator[tuple[str, ...]]:
    """The texts with every combination of options, in the order of `itertools.product`; of more than `most`, some of them.

    Which ones depends on the texts alone: equal captions have equal variants, and are encoded once. With `most` of 0 braces
    are text.
    """
    if not most:
        yield tuple(texts)
        return
    parsed = [_parse(text) for text in texts]
    total = math.prod(sequence.count for sequence in parsed)
    for index in range(total) if total <= most else _drawn(texts, total, most):
        picked: list[str] = []
        for sequence in reversed(parsed):
            index, inner = divmod(index, sequence.count)
            picked.append(sequence.pick(inner))
        yield tuple(reversed(picked))


def _drawn(texts: Sequence[str], total: int, most: int) -> list[int]:
    """Different numbers below `total`: hashed, and not drawn, so that no version of a library changes them."""
    num_digests = total.bit_length() // 256 + 2
    numbers: dict[int, None] = {}
    draw = 0
    while len(numbers) < most:
        digits = "".join(storage.digest([list(texts), draw, part], 64) for part in range(num_digests))
        numbers[int(digits, 16) % total] = None
        draw += 1
    return sorted(numbers)


def _parse(text: str) -> _Sequence:
    if "{" not in text or "|" not in text or _is_json(text):
        return _Sequence((text,), 1)
    groups = [_Group(start=0)]
    position = 0
    for token in _TOKEN.finditer(text):
        groups[-1].add(text[position : token.start()])
        position = token.end()
        if token[0] == "{" and len(groups) <= _MAX_DEPTH:
            groups.append(_Group(start=token.start()))
        elif token[0] == "|" and len(groups) > 1:
            groups[-1].options.append([])
        elif token[0] == "}" and len(groups) > 1:
            group = groups.pop()
            groups[-1].add(*_closed(group, text[group.start : position]))
        else:
            groups[-1].add(token[0])
    groups[-1].add(text[position:])
    while len(groups) > 1:
        # A brace that is never closed is a brace.
        group = groups.pop()
        groups[-1].add("{", *_joined(group.options))
    return _sequence(groups[0].options[0])


def _closed(group: _Group, text: str) -> "list[str | _Choice]":
    """What a group stands for; `text` is all of it, with its braces."""
    inner = [part for part in group.options[0] if part != ""]
    if len(group.options) > 1:
        if unsupported(text):
            return [text]
        options = tuple(_sequence(option) for option in group.options)
        return [_Choice(options, sum(option.count for option in options))]
    if text.startswith("{{") and text.endswith("}}") and len(inner) == 1 and isinstance(inner[0], _Choice):
        # Doubled braces are how sd-scripts writes a brace that is none of a wildcard.
        return [text[1:-1]]
    return ["{", *inner, "}"]


def unsupported(group: str) -> bool:
    """Whether a group in braces has a form of sd-dynamic-prompts that is not read."""
    inner = group[1:-1]
    return _DRAWS_SEVERAL.match(inner) is not None or any(_WEIGHS.match(option) for option in inner.split("|"))


def _joined(options: "list[list[str | _Choice]]") -> "list[str | _Choice]":
    parts: list[str | _Choice] = list(options[0])
    for option in options[1:]:
        parts += ["|", *option]
    return parts


def _sequence(parts: "Sequence[str | _Choice]") -> _Sequence:
    return _Sequence(tuple(parts), math.prod(part.count for part in parts if isinstance(part, _Choice)))


def _is_json(text: str) -> bool:
    """Some models are prompted in JSON, whose braces are no wildcards."""
    try:
        return text.lstrip().startswith(("{", "[")) and isinstance(json.loads(text), (dict, list))
    except (ValueError, RecursionError):
        return False
