"""Captions: what is read, what is refused and why, and what is made of them."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftk.configs.schema import CaptionsConfig, SourceConfig
from ftk.contracts import RejectReason
from ftk.errors import ConfigError
from ftk.pipeline import captions

TEXTS = [
    (b"a cat", "a cat"),
    (b"  a cat \r\n", "a cat"),
    ("größe 猫 🐈".encode(), "größe 猫 🐈"),
    ("a cat".encode("utf-8-sig"), "a cat"),
    (b"first\nsecond", "first\nsecond"),
    (b"x" * captions.MAX_CAPTION_BYTES, "x" * captions.MAX_CAPTION_BYTES),
]
BROKEN = {
    "empty": (b"", RejectReason.CAPTION_EMPTY, "is empty"),
    "blank": (b" \n\t", RejectReason.CAPTION_EMPTY, "is empty"),
    "only-mark": (b"\xef\xbb\xbf", RejectReason.CAPTION_EMPTY, "is empty"),
    "latin-1": ("größe".encode("latin-1"), RejectReason.CAPTION_NOT_TEXT, "not UTF-8 at byte 2"),
    "half a utf-16": ("a cat".encode("utf-16")[:-1], RejectReason.CAPTION_NOT_TEXT, "not UTF-16"),
    "utf-16-le": ("a cat".encode("utf-16-le"), RejectReason.CAPTION_NOT_TEXT, "NUL"),
    "nul": (b"a\0cat", RejectReason.CAPTION_NOT_TEXT, "NUL"),
    "long": (b"x" * (captions.MAX_CAPTION_BYTES + 1), RejectReason.CAPTION_NOT_TEXT, "longer than 64 KiB"),
    "a-megabyte": (b"x" * (1 << 20), RejectReason.CAPTION_NOT_TEXT, "longer than 64 KiB"),
}


def _read(path: Path, data: bytes, lines: bool = False) -> tuple[str, ...] | captions.Problem:
    path.write_bytes(data)
    return captions.read(str(path), lines)


def _problem(found: object) -> captions.Problem:
    assert isinstance(found, captions.Problem)
    return found


@pytest.mark.parametrize(("data", "text"), TEXTS)
def test_text_is_read_without_mark_and_margins(tmp_path: Path, data: bytes, text: str) -> None:
    assert captions.check(data, "a.txt") == text
    assert captions.check(data.decode(), "row 1") == text
    assert _read(tmp_path / "a.txt", data) == (text,)


@pytest.mark.parametrize(("data", "reason", "detail"), BROKEN.values(), ids=BROKEN)
def test_a_broken_caption_is_a_problem(tmp_path: Path, data: bytes, reason: RejectReason, detail: str) -> None:
    for problem in (_problem(captions.check(data, "a.txt")), _problem(_read(tmp_path / "a.txt", data))):
        assert problem.reason == reason
        assert detail in problem.detail
        assert "a.txt" in problem.detail


@pytest.mark.parametrize("text", ["é" * captions.MAX_CAPTION_BYTES, "a\0b", "half a cat \ud83d", "caf\udce9"])
def test_broken_text_is_a_problem(text: str) -> None:
    assert _problem(captions.check(text, "row 1")).reason == RejectReason.CAPTION_NOT_TEXT


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), os.mkfifo, lambda path: None], ids=["folder", "fifo", "nothing"])
def test_a_caption_that_is_no_file_is_a_problem(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "a.txt")
    problem = _problem(captions.read(str(tmp_path / "a.txt")))
    assert problem.reason == RejectReason.CAPTION_MISSING
    assert "a.txt" in problem.detail


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_same_lines_are_the_same_caption_however_they_end(tmp_path: Path, end: str) -> None:
    data = f"a cat{end}on a mat{end}".encode()
    assert _read(tmp_path / "a.txt", data) == ("a cat\non a mat",)
    assert captions.check(data.decode(), "row 1") == "a cat\non a mat"


@pytest.mark.parametrize(
    "text", ["\u200b", " \u200b\n\ufeff", "\u2060", "\u200d", "\u200e\u202c", "\u00a0", "\u3000", "\u00ad"]
)
def test_a_caption_that_shows_nothing_is_empty(tmp_path: Path, text: str) -> None:
    assert _problem(captions.check(text, "row 1")).reason == RejectReason.CAPTION_EMPTY
    assert _problem(_read(tmp_path / "a.txt", text.encode())).reason == RejectReason.CAPTION_EMPTY


def test_all_white_space_of_unicode_is_cut_at_the_ends() -> None:
    blanks = [chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace()]
    assert len(blanks) > 20
    assert captions.check("".join(blanks) + "a cat" + "".join(blanks), "row 1") == "a cat"


def test_what_shows_nothing_is_kept_inside_and_cut_at_the_ends() -> None:
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    assert captions.check(f"\ufeff\u200b a {family} \u200b\n", "row 1") == f"a {family}"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("order", ["", "-le", "-be"])
def test_a_byte_order_mark_says_what_a_caption_is_written_in(tmp_path: Path, encoding: str, order: str) -> None:
    text = "größe 猫 \U0001f408"
    data = text.encode(encoding)
    if order and encoding != "utf-8-sig":
        data = ("\ufeff" + text).encode(encoding + order)
    assert _read(tmp_path / "a.txt", data) == (text,)
    quoted = json.dumps({"caption": text}, ensure_ascii=False)
    data = quoted.encode(encoding) if not order or encoding == "utf-8-sig" else ("\ufeff" + quoted).encode(encoding + order)
    assert _read(tmp_path / "a.json", data) == (text,)


def test_a_json_file_without_a_caption_leaves_it_to_the_fallback(tmp_path: Path) -> None:
    for data in (b'{"caption": null}', b'{"width": 5}', b"[]"):
        (tmp_path / "a.json").write_bytes(data)
        assert captions.read(str(tmp_path / "a.json"), has_fallback=True) == ()
    for data in (b'{"caption": " "}', b'{"caption": 5}', b"{"):
        (tmp_path / "a.json").write_bytes(data)
        _problem(captions.read(str(tmp_path / "a.json"), has_fallback=True))
    _problem(captions.read(str(tmp_path / "nothing.json"), has_fallback=True))


def test_lines_are_captions_when_asked_for(tmp_path: Path) -> None:
    assert _read(tmp_path / "a.txt", b"\xef\xbb\xbfa cat\r\n\n  a dog \ra bird\n", lines=True) == ("a cat", "a dog", "a bird")
    assert _problem(_read(tmp_path / "a.txt", b"\n", lines=True)).reason == RejectReason.CAPTION_EMPTY


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a cat", ("a cat",)),
        (["a cat", " ", None, "a dog"], ("a cat", "a dog")),
        ({"caption": "a cat", "text": "a dog"}, ("a cat",)),
        ({"caption": None, "text": "a dog"}, ("a dog",)),
        ({"captions": ["a cat", "a dog"], "width": 5}, ("a cat", "a dog")),
        ({"prompt": "größe"}, ("größe",)),
    ],
)
def test_json_holds_captions(tmp_path: Path, value: object, expected: tuple[str, ...]) -> None:
    for suffix in ("json", "JSON"):
        assert _read(tmp_path / f"a.{suffix}", json.dumps(value).encode("utf-8-sig")) == expected


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (b"", RejectReason.CAPTION_EMPTY, "is empty"),
        (b"null", RejectReason.CAPTION_EMPTY, "is empty"),
        (b'{"caption": " "}', RejectReason.CAPTION_EMPTY, "is empty"),
        (b"[]", RejectReason.CAPTION_MISSING, "holds no caption"),
        (b'{"caption": null}', RejectReason.CAPTION_MISSING, "caption is null"),
        (b'{"tags": "a cat", "score": 5}', RejectReason.CAPTION_MISSING, "none of the keys .*found: tags, score"),
        (b"{", RejectReason.CAPTION_NOT_TEXT, "is not JSON"),
        (b"[" * 100_000, RejectReason.CAPTION_NOT_TEXT, "is not JSON"),
        (b"5", RejectReason.CAPTION_NOT_TEXT, "holds int, not text"),
        (b'["a cat", 5]', RejectReason.CAPTION_NOT_TEXT, "holds int, not text"),
        (b'"caf\xe9"', RejectReason.CAPTION_NOT_TEXT, "not UTF-8 at byte 4"),
        (b'"\\ud83d"', RejectReason.CAPTION_NOT_TEXT, "half a character"),
        (b'"\\u0000"', RejectReason.CAPTION_NOT_TEXT, "NUL"),
        (b'"' + b"x" * (1 << 20), RejectReason.CAPTION_NOT_TEXT, "longer than 1 MiB"),
    ],
)
def test_broken_json_is_a_problem(tmp_path: Path, data: bytes, reason: RejectReason, detail: str) -> None:
    problem = _problem(_read(tmp_path / "a.json", data))
    assert problem.reason == reason
    with pytest.raises(ValueError, match=detail):
        raise ValueError(problem.detail)


def test_gather_skips_blanks_and_gives_the_reason_when_nothing_is_left() -> None:
    assert captions.gather(["a", None, [" b ", ""], []], "row 1") == ("a", "b")
    assert _problem(captions.gather([None, []], "row 1")).reason == RejectReason.CAPTION_MISSING
    assert _problem(captions.gather([None, " "], "row 1")).reason == RejectReason.CAPTION_EMPTY
    assert _problem(captions.gather(["a", "b\0"], "row 1")).reason == RejectReason.CAPTION_NOT_TEXT


def test_a_blank_fallback_is_refused() -> None:
    assert captions.fallback(SourceConfig(path="photos")) is None
    assert captions.fallback(SourceConfig(path="photos", caption=" a photo ")) == "a photo"
    with pytest.raises(ConfigError, match="source photos: `caption` is empty"):
        captions.fallback(SourceConfig(path="photos", caption=" "))


@pytest.mark.parametrize(
    ("caption", "trigger", "expected"),
    [
        ("a cat", "ohwx", "ohwx, a cat"),
        ("a photo of ohwx cat", "ohwx", "a photo of ohwx cat"),
        ("a cat", None, "a cat"),
        ("a cat", "", "a cat"),
        ("a woman in a park", "man", "man, a woman in a park"),
        ("a woman and a man", "man", "a woman and a man"),
        ("he asks for help", "sks", "sks, he asks for help"),
        ("sks_old, a cat", "sks", "sks, sks_old, a cat"),
        ("the sks's hat", "sks", "the sks's hat"),
        ("(sks:1.2), a cat", "sks", "(sks:1.2), a cat"),
        ("sks dog on grass", "sks dog", "sks dog on grass"),
        ("sks dogs on grass", "sks dog", "sks dog, sks dogs on grass"),
        ("été", "t", "t, été"),
        ("一只猫在草地上", "猫", "一只猫在草地上"),
        ("<sks> on grass", "<sks>", "<sks> on grass"),
        ("a photo of [trigger] on grass", "sks", "a photo of sks on grass"),
        ("a photo of [trigger]", None, "a photo of [trigger]"),
    ],
)
def test_the_trigger_stands_once(caption: str, trigger: str | None, expected: str) -> None:
    assert _finish(caption, trigger=trigger) == [expected]


def _finish(
    *texts: str,
    key: str = "key",
    shuffles: int = 0,
    keep: int = 1,
    separator: str = ",",
    wildcards: int = 32,
    **source: Any,
) -> list[str]:
    config = CaptionsConfig(tag_shuffles=shuffles, keep_tags=keep, tag_separator=separator, wildcards=wildcards)
    return captions.finish(texts, SourceConfig(path="photos", **source), config, key)


@pytest.mark.parametrize(
    ("prefix", "suffix", "expected"),
    [
        (None, None, "a cat"),
        ("photo of", "on a mat", "photo of a cat on a mat"),
        ("photo of\n", "\ton a mat", "photo of\na cat\ton a mat"),
        ("photo: ", ", best quality", "photo: a cat, best quality"),
        ("photo:", "!", "photo: a cat!"),
        ("", "", "a cat"),
    ],
)
def test_prefix_and_suffix_are_joined_by_one_space(prefix: str | None, suffix: str | None, expected: str) -> None:
    assert _finish("a cat", prefix=prefix, suffix=suffix) == [expected]


def test_the_prefix_goes_before_the_trigger() -> None:
    assert _finish("a cat", "an ohwx dog", trigger="ohwx", prefix="photo of") == [
        "photo of ohwx, a cat",
        "photo of an ohwx dog",
    ]


def test_equal_captions_stand_once() -> None:
    assert _finish("a", "b", "a") == ["a", "b"]
    assert _finish("ohwx, a", "a", trigger="ohwx") == ["ohwx, a"]


TAGS = "1girl, red hair, blue eyes, smile, outdoors, hat"


def test_shuffles_follow_their_caption_and_keep_its_tags() -> None:
    first, *variants = _finish(TAGS, shuffles=4, keep=2, suffix="at night")
    assert first == f"{TAGS} at night"
    assert len(variants) == 4
    for variant in variants:
        body = variant.removesuffix(" at night")
        assert body.startswith("1girl, red hair, ")
        assert sorted(body.split(", ")) == sorted(TAGS.split(", "))
    assert len({first, *variants}) == 5
    two = _finish(TAGS, "a, b, c", shuffles=4, keep=0)
    assert two.index("a, b, c") > two.index(TAGS) + 3


def test_an_added_trigger_is_the_first_of_the_kept_tags() -> None:
    for keep in (0, 1):
        variants = _finish(TAGS, shuffles=8, keep=keep, trigger="ohwx")
        assert all(variant.startswith("ohwx, ") for variant in variants)
        assert any(not variant.startswith("ohwx, 1girl, ") for variant in variants)
    assert all(item.startswith("ohwx, 1girl, ") for item in _finish(TAGS, shuffles=8, keep=2, trigger="ohwx"))
    assert all(item.startswith("ohwx cat, ") for item in _finish(f"ohwx cat, {TAGS}", shuffles=8, keep=1, trigger="ohwx"))


def test_shuffles_depend_on_the_key_and_never_on_the_version() -> None:
    assert _finish(TAGS, shuffles=2) == _finish(TAGS, shuffles=3)[:3]
    assert _finish(TAGS, shuffles=2) != _finish(TAGS, shuffles=2, key="other")
    assert _finish("a, b, c, d", shuffles=2, keep=0) == GOLDEN


# Written down once; a change would silently train on other captions after an update.
GOLDEN = ["a, b, c, d", "c, a, b, d", "a, c, b, d"]


def test_what_cannot_be_shuffled_is_left_alone() -> None:
    assert _finish("a cat", shuffles=8, keep=0) == ["a cat"]
    assert _finish("a, b", shuffles=8, keep=1) == ["a, b"]
    assert set(_finish("a,b", shuffles=32, keep=0)) == {"a,b", "b,a"}
    assert set(_finish("a|b", shuffles=32, keep=0, separator="|")) == {"a|b", "b|a"}
    assert set(_finish("a b", shuffles=32, keep=0, separator=" ")) == {"a b", "b a"}


@pytest.mark.parametrize(
    ("text", "separator", "expected"),
    [
        ("a|b|c", "|", "|"),
        ("a | b | c", "|", " | "),
        ("a,b,c", ",", ","),
        ("a, b, c", ",", ", "),
        ("a;b;c", ";", ";"),
        ("a\nb\nc", "\n", "\n"),
        ("a ||| b ||| c", "|||", " ||| "),
    ],
)
def test_tags_are_joined_as_they_were_written(text: str, separator: str, expected: str) -> None:
    variants = _finish(text, shuffles=16, keep=0, separator=separator)
    assert len(variants) > 3
    assert {tuple(sorted(variant.split(expected))) for variant in variants} == {("a", "b", "c")}


def test_separators_stay_where_they_are() -> None:
    assert set(_finish("a,b | c", shuffles=32, keep=0)) == {"a,b | c", "b | c,a"}
    assert set(_finish("a,b, c", shuffles=32, keep=1)) == {"a,b, c", "a,c, b"}
    assert set(_finish(" a, b, ", shuffles=32, keep=0)) == {"a, b,", "b, a"} | {_finish(" a, b, ")[0]}


@pytest.mark.parametrize(
    ("text", "separator", "expected"),
    [
        ("a|b", "|", "sks|a|b"),
        ("a | b", "|", "sks | a | b"),
        ("a,b", ",", "sks, a,b"),
        ("a;b", ";", "sks;a;b"),
        ("a", ";", "sks; a"),
    ],
)
def test_the_trigger_is_joined_as_a_tag(text: str, separator: str, expected: str) -> None:
    first, *variants = _finish(text, trigger="sks", separator=separator, shuffles=8)
    assert first == expected
    assert all(variant.startswith("sks") for variant in variants)


def test_tags_before_the_mark_of_sd_scripts_stay_in_place_and_so_do_those_behind_a_second_one() -> None:
    text = "1girl, solo ||| red hair, hat, smile ||| night, masterpiece"
    first, *variants = _finish(text, shuffles=16, keep=0)
    assert first == "1girl, solo, red hair, hat, smile, night, masterpiece"
    assert {tuple(sorted(variant.split(", ")[2:5])) for variant in variants} == {("hat", "red hair", "smile")}
    assert all(variant.startswith("1girl, solo, ") and variant.endswith(", night, masterpiece") for variant in variants)
    assert len(variants) > 3


def test_the_mark_of_sd_scripts_is_never_trained_on() -> None:
    assert _finish("1girl ||| red hair, hat") == ["1girl, red hair, hat"]
    assert _finish("1girl|||red hair,hat") == ["1girl,red hair,hat"]
    assert _finish("||| red hair, hat") == ["red hair, hat"]
    assert _finish("1girl |||") == ["1girl"]
    assert _finish("a|b|||c|d", separator="|", shuffles=1, keep=0)[0] == "a|b|c|d"
    assert _finish("1girl ||| a, b", trigger="sks") == ["sks, 1girl, a, b"]
    variants = _finish("1girl ||| a, b, c", trigger="sks", shuffles=16, keep=0)
    assert all(variant.startswith("sks, 1girl, ") for variant in variants)
    assert len(variants) > 3


TAG = st.text(alphabet="ab猫 '-", min_size=1, max_size=6).filter(lambda tag: tag.strip() == tag)


@given(st.text())
def test_checking_a_caption_twice_changes_nothing_more(text: str) -> None:
    once = captions.check(text, "row 1")
    if isinstance(once, str):
        assert captions.check(once, "row 1") == once
        assert captions.check(once.encode(), "row 1") == once
        assert captions.check(once.replace("\n", "\r\n"), "row 1") == once


@given(st.lists(TAG, min_size=1, max_size=6), st.sampled_from([", ", ",", "|", " | ", "; "]), st.integers(0, 3))
def test_a_shuffle_has_the_same_tags_and_keeps_the_first(tags: list[str], joint: str, keep: int) -> None:
    text = joint.join(tags)
    for variant in _finish(text, shuffles=3, keep=keep, separator=joint.strip()):
        found = variant.split(joint)
        assert sorted(found) == sorted(tags)
        assert found[:keep] == tags[:keep]


@given(st.text(alphabet="ab sk, ", max_size=20))
def test_finishing_a_finished_caption_changes_nothing(text: str) -> None:
    caption = captions.check(text, "row 1")
    if isinstance(caption, str):
        once = _finish(caption, trigger="sks")
        assert _finish(*once, trigger="sks") == once
