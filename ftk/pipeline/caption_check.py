"""A look at captions as they will be trained on: what is probably not meant is counted and named, and nothing is changed.

Nothing here is a reject. Thresholds are such that captions in plain sentences and lists of tags pass without a word.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from ftk.configs.schema import SourceConfig
from ftk.contracts import CaptionFinding
from ftk.pipeline.captions import between

COLUMNS = ["key", "source", "role", "captions"]
_EXAMPLES = 3
_EXCERPT_CHARS = 60
_SHORT_CHARS = 40
_LEAD_WORDS = 12
# Of captions in one word: where they are more, a word is the dataset's way to caption.
_MOST_ONE_WORD = 0.2
# Fewer captions may well begin alike by chance.
_LEAST_CAPTIONS = 5
_ARTICLES = frozenset(
    ("a", "an", "the", "this", "that", "these", "those", "there", "here", "it", "is", "are", "of", "in", "on", "at", "with")
)
_JSON = r'\{\s*"[^"]*"\s*:|^\s*\[\s*"'
# For RE2, which has no look-behind, and for Python's own `re`, which finds the excerpt.
PATTERNS = {
    "weights": "|".join(
        (
            r"(?:^|[^\\])\([^()]*[^\s\d()\\]\s*:\s*-?[0-9](?:\.[0-9]+)?\)",
            r"[^\s\d\\]\s*:\s*-?[0-9]\.[0-9]+\)",
            r"(?:^|[^\\])\(\([^()]+\)\)",
            r"\{\{[^{}|]+\}\}",
            r"\[[^\[\]:]*:[^\[\]:]*:\s*[0-9.]+\]",
        )
    ),
    "networks": r"<(?:lora|lyco|lycoris|hypernet|lora_[a-z]+):[^<>]+>",
    "placeholders": r"\[[A-Za-z_][A-Za-z0-9_ ]{0,30}\]|(?:^|[^{\\])\{[A-Za-z0-9_ ]{0,30}\}(?:$|[^}])",
    "wildcards": "|".join(
        (
            r"(?:^|[^\\])\{[^{}]*\|[^{}]*\}",
            r"\{[^{}]*(?:\$\$|::)[^{}]*\}",
            r"(?:^|[\s,({|])__[A-Za-z0-9*][A-Za-z0-9_/*-]*__(?:$|[\s,)}|.])",
        )
    ),
}
"""What of a caption is meant for a program that draws, and is mere text for a text encoder in training."""
_ADVICE = {
    "weights": "only programs that draw understand (tag:1.2). Training takes it as plain text: remove it",
    "networks": "only programs that draw understand <lora:name:1>. Training takes it as plain text: remove it",
    "placeholders": "words in brackets look like placeholders: fill them in, or set the source's `trigger` for [trigger]",
    "wildcards": "these wildcards are not expanded: write them as {a|b}, and see `data.captions.wildcards`",
    "short": "at most one word: describe what the image shows",
}


def check(tables: Iterable[pa.Table], sources: Sequence[SourceConfig]) -> list[CaptionFinding]:
    """What the captions of all samples show.

    Args:
        tables: shard by shard, with `COLUMNS`.
        sources: their trigger, prefix and suffix are meant to be in all captions.
    """
    findings = {kind: _Finding() for kind in (*PATTERNS, "short")}
    by_source = {source.source_name: _SourceCaptions(source) for source in sources}
    for table in tables:
        parents = pc.list_parent_indices(table["captions"])
        captions = pc.list_flatten(table["captions"])
        is_json = pc.match_substring_regex(captions, _JSON)
        for kind, pattern in PATTERNS.items():
            matches = pc.match_substring_regex(captions, pattern, ignore_case=kind == "networks")
            if kind in ("placeholders", "wildcards"):
                matches = pc.and_(matches, pc.invert(is_json))
            for key, caption in _per_sample(table, captions, parents, matches):
                findings[kind].add(key, _excerpt(caption, pattern))
        for name, source in by_source.items():
            source.add(table.filter(pc.equal(table["source"], name)))
    for source in by_source.values():
        findings["short"].include(source.near_empty)
    counted = [finding.done(kind, _ADVICE[kind]) for kind, finding in findings.items() if finding.num_samples]
    return [*counted, *(finding for source in by_source.values() for finding in source.invariants())]


def sentence(finding: CaptionFinding) -> str:
    """A finding in words."""
    examples = f", for example {', '.join(finding.examples)}" if finding.examples else ""
    samples = "1 sample has" if finding.num_samples == 1 else f"{finding.num_samples:,} samples have"
    return f"{samples} captions with {finding.kind}: {finding.detail}{examples}."


@dataclass(slots=True)
class _Finding:
    num_samples: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, key: str, excerpt: str) -> None:
        self.num_samples += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{key} ({excerpt})")

    def include(self, other: "_Finding") -> None:
        self.num_samples += other.num_samples
        self.examples = [*self.examples, *other.examples][:_EXAMPLES]

    def done(self, kind: str, detail: str) -> CaptionFinding:
        return CaptionFinding(kind=kind, detail=detail, num_samples=self.num_samples, examples=self.examples)


class _SourceCaptions:
    """The captions of one source without what its settings add: the short ones, and what all of them share."""

    def __init__(self, source: SourceConfig) -> None:
        self._source = source
        self._added = sum(len(text or "") for text in (source.trigger, source.prefix, source.suffix))
        self._num_samples = 0
        self._tiny = _Finding()
        self._one_word = _Finding()
        self._lead: list[str] | None = None
        self._tags: set[str] | None = None
        self._different: set[str] = set()

    def add(self, table: pa.Table) -> None:
        self._num_samples += len(table)
        parents = pc.list_parent_indices(table["captions"])
        captions = pc.list_flatten(table["captions"])
        short = pc.less_equal(pc.utf8_length(captions), self._added + _SHORT_CHARS)
        for key, caption in _per_sample(table, captions, parents, short):
            self._look_at_length(key, self._bare(caption))
        if self._source.role == "instance" and self._may_share():
            for caption in captions.to_pylist():
                self._share(self._bare(caption))
                if not self._may_share():
                    break

    @property
    def near_empty(self) -> _Finding:
        both = _Finding()
        both.include(self._tiny)
        if self._one_word.num_samples <= _MOST_ONE_WORD * self._num_samples:
            both.include(self._one_word)
        return both

    def invariants(self) -> Iterator[CaptionFinding]:
        if len(self._different) < _LEAST_CAPTIONS:
            return
        lead = " ".join(self._lead or []).rstrip(",.;:")
        says_something = any(word.strip(",.;:").lower() not in _ARTICLES for word in lead.split())
        tags = sorted(tag for tag in self._tags or () if tag and tag not in lead)
        if lead and says_something:
            yield self._invariant(f"begins with {lead!r}")
        if tags:
            yield self._invariant(f"has the tag{'s' if len(tags) > 1 else ''} {', '.join(map(repr, tags[:5]))}")

    def _invariant(self, what: str) -> CaptionFinding:
        name = self._source.source_name
        detail = (
            f"every caption of source {name} {what}, so what it means is learned together with them. "
            "Keep it if you mean it as a trigger, and set the source's `trigger`; otherwise remove it"
        )
        return CaptionFinding(kind="invariant", detail=detail, num_samples=self._num_samples, examples=[])

    def _look_at_length(self, key: str, bare: str) -> None:
        words = bare.split()
        # The trigger or the source's `caption` alone are somebody's decision.
        if len(words) != 1 or bare == self._source.caption or any(_is_whole_word(letter) for letter in bare):
            return
        (self._tiny if len(bare) <= 2 else self._one_word).add(key, bare)

    def _may_share(self) -> bool:
        return self._lead is None or bool(self._lead) or bool(self._tags)

    def _share(self, bare: str) -> None:
        if not bare or bare == self._source.caption:
            return
        if len(self._different) < _LEAST_CAPTIONS:
            self._different.add(bare)
        words, tags = bare.split()[:_LEAD_WORDS], {tag.strip() for tag in bare.split(",")}
        tags = tags if len(tags) > 2 else set()
        if self._lead is None or self._tags is None:
            self._lead, self._tags = words, tags
            return
        same = (first == second for first, second in zip(self._lead, words, strict=False))
        self._lead = self._lead[: next((number for number, is_same in enumerate(same) if not is_same), len(words))]
        self._tags &= tags

    def _bare(self, caption: str) -> str:
        """The caption without the source's prefix, suffix and trigger."""
        before, _, behind = between(self._source.prefix, "\0", self._source.suffix).partition("\0")
        caption = caption.removeprefix(before).removesuffix(behind)
        if self._source.trigger:
            caption = caption.removeprefix(self._source.trigger)
        return caption.strip(" ,;|\n")


def _is_whole_word(letter: str) -> bool:
    """Whether a letter may say by itself what an image shows, as Chinese ones do."""
    return unicodedata.east_asian_width(letter) in "WF"


def _per_sample(table: pa.Table, captions: pa.Array, parents: pa.Array, matches: pa.Array) -> Iterator[tuple[str, str]]:
    """(key, first caption that matches) of each sample that has one."""
    rows = parents.filter(matches).to_pylist()
    first = dict(zip(reversed(rows), reversed(captions.filter(matches).to_pylist()), strict=True))
    keys = table["key"].take(pa.array(sorted(first), pa.int64())).to_pylist()
    return zip(keys, (first[row] for row in sorted(first)), strict=True)


def _excerpt(caption: str, pattern: str) -> str:
    match = re.search(pattern, caption, re.IGNORECASE)
    return " ".join((match[0] if match else caption).split())[:_EXCERPT_CHARS]
